"""The tool that says whether a change moved the numbers: what it must see, and what it must not."""

import json
import shutil

import digests
import pytest

RUNS = {"cls fp32 seed0": {"weights": "a" * 20, "data": "d", "test accuracy": "0.5",
                           "array target": "b"},
        "seg fp32 seed0": {"weights": "c" * 20, "data": "e", "test map": "nan"}}


@pytest.fixture
def against(monkeypatch, tmp_path, capsys):
    """Exit code and last lines of a comparison of RUNS, kept in a file, with runs changed so."""
    def compare(run: str, **changed: str) -> tuple[int, list[str]]:
        (tmp_path / "kept.json").write_text(json.dumps(RUNS))
        now = {**RUNS, run: {**RUNS.get(run, RUNS["cls fp32 seed0"]), **changed}}
        monkeypatch.setattr(digests, "measure", lambda tree, root, only: now)
        code = digests.main(["--against", str(tmp_path / "kept.json")])
        return code, capsys.readouterr().out.splitlines()[len(now):]
    return compare


def test_the_same_numbers_pass_and_so_does_a_metric_that_was_added(against):
    assert against("seg fp32 seed0") == (0, ["0 of 2 runs differ"])
    assert against("seg fp32 seed0", **{"test fwiou": "0.3"}) == (0, ["0 of 2 runs differ"])
    assert against("another run")[0] == 0


@pytest.mark.parametrize("fact", ["weights", "test accuracy", "array target", "data"])
def test_a_run_that_ends_otherwise_is_named_with_what_differs(against, fact):
    code, lines = against("cls fp32 seed0", **{fact: "f"})
    before = RUNS["cls fp32 seed0"][fact][:16]
    assert code == 1 and lines == [f"cls fp32 seed0: {fact} {before} -> f", "1 of 2 runs differ"]


def test_a_metric_that_is_gone_and_runs_of_other_names_are_no_pass(against, monkeypatch, tmp_path):
    gone = {"seg fp32 seed0": {"weights": "c" * 20, "data": "e"}}
    assert digests.differences(RUNS, gone) == ["seg fp32 seed0: test map nan -> none"]
    (tmp_path / "kept.json").write_text(json.dumps(RUNS))
    monkeypatch.setattr(digests, "measure", lambda *_: {"renamed": RUNS["cls fp32 seed0"]})
    assert digests.main(["--against", str(tmp_path / "kept.json")]) == 1


def test_a_real_change_of_the_source_is_seen(tmp_path, tiny_root):
    """The same run of this tree and of a copy whose loss counts every class alike."""
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in (*digests.REPO.glob("*.py"), digests.REPO / "lab"):
        (changed / file.name).symlink_to(file)
    (changed / "train_seg.py").unlink()
    source = (digests.REPO / "train_seg.py").read_text()
    assert source.count("weight=weights") == 1
    (changed / "train_seg.py").write_text(source.replace("weight=weights", "weight=None"))
    run = "seg fp32 seed1"
    trees = (digests.REPO, digests.REPO, changed)
    ours, again, theirs = (digests.measure(tree, tiny_root, run) for tree in trees)
    assert digests.differences(ours, again) == [] and set(ours) == {run}
    assert len(differing := digests.differences(ours, theirs)) == 1 and "weights" in differing[0]


def test_an_unknown_revision_and_a_run_that_fails_say_so(tiny_root):
    with pytest.raises(SystemExit, match="a run failed: .*0000.jpg has no eecs442_0000.png"):
        (tiny_root / "mini_facade/train/eecs442_0000.png").unlink()
        digests.measure(digests.REPO, tiny_root, "unet")
    if shutil.which("git"):
        with pytest.raises(SystemExit, match="--against-revision typo: "):
            digests.measure_revision("typo", tiny_root)
