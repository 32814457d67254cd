"""A run's files: what does not match is refused in one line; so is where they cannot be written."""

import errno
import fcntl
import os
import resource
import zipfile
from pathlib import Path

import pytest
import torch
from conftest import one_error, result, run_seg

import models
from lab import engine, files
from lab.files import BadInput
from lab.runfiles import RunFiles

# ---- refusals: the file, the difference, the remedy, exit code 2 ----

@pytest.mark.parametrize("finished", [True, False])
def test_another_configuration_in_the_same_place_is_refused(tiny_root, tmp_path, capsys, finished):
    run_seg(tiny_root, tmp_path)
    if not finished:
        (tmp_path / "seed0.json").unlink()
    assert run_seg(tiny_root, tmp_path, "--dropout", "0") == 2
    assert "dropout 0.2 there, 0.0 here" in one_error(capsys)


def test_other_data_in_the_same_place_are_refused(tiny_root, tmp_path, capsys):
    run_seg(tiny_root, tmp_path)
    mask = tiny_root / "mini_facade/train/eecs442_0000.png"
    mask.write_bytes((tiny_root / "mini_facade/train/eecs442_0001.png").read_bytes())
    assert run_seg(tiny_root, tmp_path) == 2
    assert "made with other settings (data" in one_error(capsys)


def hostile(path):
    class Evil:
        def __reduce__(self):
            return os.system, ("touch pwned",)
    torch.save(Evil(), path)


@pytest.mark.parametrize("damage", [
    lambda p: p.write_bytes(p.read_bytes()[:-2000]),
    lambda p: torch.save({"weights": torch.zeros(3)}, p), hostile, lambda p: p.write_bytes(b""),
    lambda p: p.write_text("not a checkpoint"), lambda p: zipfile.ZipFile(p, "w").close()],
    ids=["truncated", "foreign", "hostile", "empty", "text", "empty zip"])
def test_a_damaged_or_foreign_checkpoint_is_refused(tiny_root, tmp_path, capsys, damage):
    run_seg(tiny_root, tmp_path)
    (tmp_path / "seed0.json").unlink()
    damage(tmp_path / "seed0.pt")
    assert run_seg(tiny_root, tmp_path) == 2
    assert "seed0.pt is no checkpoint of this project, or damaged" in one_error(capsys)
    assert not Path("pwned").exists()


def test_the_file_to_delete_is_the_one_that_was_read(tiny_root, tmp_path, capsys):
    run_seg(tiny_root, tmp_path)
    (tmp_path / "seed0.json").unlink()
    (tmp_path / "seed0.pt").rename(tmp_path / "seed0.prev.pt")
    assert run_seg(tiny_root, tmp_path, "--dropout", "0") == 2
    assert f"or delete {tmp_path / 'seed0.prev.pt'}" in one_error(capsys)


def test_what_cannot_be_read_is_not_called_damaged(tiny_root, tmp_path, capsys):
    """Else the advice would be to delete it, and a run would go back to the epoch before."""
    run_seg(tiny_root, tmp_path)
    (tmp_path / "seed0.json").unlink()
    (tmp_path / "seed0.pt").rename(tmp_path / "seed0.prev.pt")
    (tmp_path / "seed0.pt").mkdir()
    assert run_seg(tiny_root, tmp_path) == 2
    assert one_error(capsys).endswith("seed0.pt: Is a directory")


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"config": 3}'])
def test_a_damaged_record_is_refused(tiny_root, tmp_path, capsys, content):
    run_seg(tiny_root, tmp_path)
    (tmp_path / "seed0.json").write_text(content)
    assert run_seg(tiny_root, tmp_path) == 2
    assert "seed0.json is no run record, or damaged" in one_error(capsys)


def test_weights_of_another_version_of_the_model_are_refused(
        tiny_root, tmp_path, capsys, monkeypatch):
    run_seg(tiny_root, tmp_path)
    (tmp_path / "seed0.json").unlink()
    monkeypatch.setattr(models, "build", lambda *_: models.HourGlass(1, 4))
    assert run_seg(tiny_root, tmp_path) == 2
    assert f"{tmp_path}/seed0.pt holds the weights of another version" in one_error(capsys)
    (tmp_path / "seed0.pt").rename(tmp_path / "seed0.prev.pt")
    assert run_seg(tiny_root, tmp_path) == 2
    assert f"{tmp_path}/seed0.prev.pt holds the weights" in one_error(capsys)  # to be deleted


# ---- places that cannot be written ----

def test_a_full_disk_is_said_before_training_starts(tiny_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "fit", lambda *a, **k: pytest.fail("trained"))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    # no file can grow past 20 kB: a write fails midway
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        code = run_seg(tiny_root, tmp_path / "out")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert code == 2 and "seed0.pt" in one_error(capsys)
    assert [path.name for path in (tmp_path / "out").iterdir()] == [".seed0.lock"]


@pytest.mark.parametrize("write", [2, 4, 5, 6],
                         ids=["a checkpoint", "the trained model", "the arrays", "the record"])
def test_a_disk_that_fills_up_later_loses_nothing(tiny_root, tmp_path, capsys, monkeypatch, write):
    run_seg(tiny_root, tmp_path / "whole")
    real, calls = os.fsync, []

    def full(descriptor):
        calls.append(descriptor)
        if len(calls) == write:
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        assert run_seg(tiny_root, tmp_path / "broken") == 2
    message = one_error(capsys)
    assert "No space left on device" in message and "seed0" in message
    left = {path.name for path in (tmp_path / "broken").iterdir()}
    left -= {"seed0.prev.pt", ".seed0.lock"}
    assert left == ({"seed0.pt", "seed0.npz"} if write == 6 else {"seed0.pt"})
    assert run_seg(tiny_root, tmp_path / "broken") == 0
    assert result(tmp_path / "broken") == result(tmp_path / "whole")


def test_a_read_only_folder_is_said_before_training_starts(
        tiny_root, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(engine, "fit", lambda *a, **k: pytest.fail("trained"))
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    out = locked / "out" if os.geteuid() else Path("/sys/out")  # root may write anywhere but there
    assert run_seg(tiny_root, out) == 2
    assert one_error(capsys).startswith(f"error: {out}: ")


def test_a_complete_run_is_read_where_nothing_can_be_written(
        tiny_root, tmp_path, capsys, monkeypatch):
    assert run_seg(tiny_root, tmp_path) == 0

    def refuse(*args, **more):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "open", refuse)
    monkeypatch.setattr(Path, "unlink", refuse)
    assert run_seg(tiny_root, tmp_path) == 0


def test_a_file_system_without_locks_is_named(tiny_root, tmp_path, capsys, monkeypatch):
    def refuse(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    assert run_seg(tiny_root, tmp_path) == 2
    assert ".seed0.lock cannot be locked (Function not implemented)" in one_error(capsys)


def test_links_in_the_run_folder_are_not_followed(tiny_root, tmp_path, capsys):
    victim, record = tmp_path / "victim", tmp_path / "seed0.json"
    victim.write_text("precious")
    (tmp_path / f".seed0.json.{os.getpid()}.tmp").symlink_to(victim)
    files.write_atomic(record, b"{}")
    assert record.read_bytes() == b"{}" and not record.is_symlink()
    assert victim.read_text() == "precious"
    record.unlink()
    (tmp_path / ".seed0.lock").symlink_to(tmp_path / "new")
    assert run_seg(tiny_root, tmp_path) == 2 and ".seed0.lock: " in one_error(capsys)
    assert not (tmp_path / "new").exists()


def test_a_checkpoint_is_there_at_every_moment_of_its_replacement(tmp_path, monkeypatch):
    path, previous, seen = tmp_path / "seed0.pt", tmp_path / "seed0.prev.pt", []
    replace = os.replace

    def looking(*names):
        seen.append(path.read_bytes())
        replace(*names)
        seen.append(path.read_bytes())

    path.write_bytes(b"1")
    monkeypatch.setattr(os, "replace", looking)
    for content in (b"2", b"3"):
        files.write_atomic(path, content, previous)
    assert seen == [b"1", b"1", b"1", b"2", b"2", b"2", b"2", b"3"]
    assert previous.read_bytes() == b"2" and {*tmp_path.iterdir()} == {path, previous}


def test_where_links_are_unknown_the_one_before_is_kept_all_the_same(tmp_path, monkeypatch):
    def refuse(*names):
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    path, previous = tmp_path / "seed0.pt", tmp_path / "seed0.prev.pt"
    for content in (b"1", b"2", b"3"):
        files.write_atomic(path, content, previous)
    assert (path.read_bytes(), previous.read_bytes()) == (b"3", b"2")
    assert {*tmp_path.iterdir()} == {path, previous}


def test_a_file_where_the_folder_should_be(tiny_root, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert run_seg(tiny_root, tmp_path / "out") == 2
    assert "out" in one_error(capsys)


def test_a_run_has_one_writer_as_long_as_it_lives_and_touches_no_other_seed(tmp_path):
    left = [tmp_path / f".{name}.7.tmp" for name in ("seed0.pt", "seed1.pt", "seed10.json")]
    for path in left:
        path.touch()
    first = RunFiles(tmp_path, 0)
    first.claim()
    assert [path.exists() for path in left] == [False, True, True]  # those runs may be writing
    for _ in range(2):
        with pytest.raises(BadInput, match="seed0.pt is being written by another process"):
            RunFiles(tmp_path, 0).claim()
    RunFiles(tmp_path, 1).claim()
    del first
    RunFiles(tmp_path, 0).claim()


def test_all_of_a_file_is_on_the_disk_before_it_takes_its_place(tmp_path, monkeypatch):
    synced, sync = [], os.fsync
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size)
                        or sync(file))
    files.write_atomic(tmp_path / "seed0.json", b"{}")
    assert synced == [2]


def test_what_is_infinite_has_no_place_in_json_either():
    found = files.jsonable({"a": [float("inf"), -float("inf"), float("nan"), 1.5]})
    assert found == {"a": [None, None, None, 1.5]}
