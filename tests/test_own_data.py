"""docs/own-data.md as it is written: every command of the worked example, and what it leaves."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import run
from PIL import Image

import metrics
import study
from lab import records
from lab.batches import VOID
from lab.files import mask_to, read_image

REPO = Path(__file__).parents[1]
MINE = ("train_seg", "train_cls", "study", "interpret", "export")


def blocks():
    text = (REPO / "docs/own-data.md").read_text()
    return [block.strip().splitlines() for block in re.findall(r"```sh\n(.*?)```", text, re.S)]


def expanded(line, environment):
    """A line of make as the commands that it would run, any other as it stands."""
    if not line.startswith("make ") or "cpp" in line:
        return [line]
    done = subprocess.run([*shlex.split(line), "-n", f"PY={sys.executable}", "DEVICE=cpu"],
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def execute(line, environment):
    """Run a line: a script of the project in this process, as torch takes seconds to import."""
    words = shlex.split(line)
    if words[0] in ("python", sys.executable) and words[1].removesuffix(".py") in MINE:
        device = [] if words[1] == "study.py" else ["--device", "cpu"]
        module = __import__(words[1].removesuffix(".py"))
        from lab import cli
        assert cli.guard(lambda: module.main([*words[2:], *device])) == 0, line
    else:
        line = re.sub("^python ", f"{shlex.quote(sys.executable)} ", line)
        done = subprocess.run(line, shell=True, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, (line, done.stderr)


@pytest.fixture(scope="module")
def example(tmp_path_factory):
    """A folder in which every command of the page ran, but for those of C++."""
    folder = tmp_path_factory.mktemp("example")
    for path in REPO.iterdir():
        if path.name not in ("made", "runs", "results") and not path.name.startswith("."):
            (folder / path.name).symlink_to(path)
    environment = {**os.environ, "MAKEFLAGS": "", "MAKELEVEL": "0", "PYTHONPATH": str(REPO)}
    before = os.getcwd()
    os.chdir(folder)
    try:
        for line in (line for block in blocks() for line in block if "cpp" not in line):
            for command in expanded(line, environment):
                if "if [ -f" in command or command.startswith(("then ", "else ")):
                    continue  # a copy of a checkpoint, below
                if "runs/smoke-streets" in command and "interpret" in command:
                    shutil.copytree("results/smoke-streets/table2/standard",
                                    "runs/smoke-streets/table2/standard", dirs_exist_ok=True)
                execute(command, environment)
    finally:
        os.chdir(before)
    return folder


def test_the_run_knows_its_data(example, monkeypatch, capsys):
    record = json.loads((example / "runs/streets/seed0.json").read_text())
    about = record["about_data"]
    assert about["name"] == "streets" and about["own"] and about["size"] == 48
    assert about["classes"] == ["sky", "wall", "window", "door", "roof", "tree", "road"]
    assert len(about["mean"]) == 3 and "data" not in record["config"]
    assert record["metrics"]["test"]["classes_counted"] == 7
    monkeypatch.chdir(example)  # complete: the same command says what came out
    line = next(line for block in blocks() for line in block if "train_seg" in line)
    assert run("train_seg", *shlex.split(line)[2:]) == 0
    assert "images of streets" in capsys.readouterr().out
    moved = (example / "made/streets").rename(example / "made/moved")  # the path is no setting
    argv = [word.replace("made/streets", "made/moved") for word in shlex.split(line)[2:]]
    assert run("train_seg", *argv) == 0
    moved.rename(example / "made/streets")


def test_the_table_has_no_report(example):
    folder = example / "results/smoke-streets"
    table = (folder / "table2.md").read_text()
    assert "report" not in table and "✓" not in table and "not run" not in table
    rows, switches = table.split("**One switch at a time.**")
    assert rows.count("\n| ") == len(study.REPORT["table2"])
    assert "streets, 32 pixels a side." in rows and "`stride-no-act` | `no-act`" in switches
    verdicts, needs = (folder / "claims.md").read_text().split("**What the undecided would take**")
    judged = re.findall(r"^\| (C\d+) ", verdicts, re.M)
    assert judged == ["C7", "C8", "C9", "C10", "C11", "C12"]
    undecided = re.findall(r"^\| (C\d+) .*undecided", verdicts, re.M)
    assert re.findall(r"^\| (C\d+) ", needs, re.M) == undecided != []
    plan = (folder / "plan.txt").read_text()
    assert "15 rows of 2 runs, 2 epochs each" in plan and "time: about" in plan
    pictures = {path.name for path in folder.glob("*.png")}
    assert pictures == {"table2.png", "table2-curves.png", "imbalance.png", "predictions.png"}
    assert not (folder / "table1").exists()
    assert (example / "results/smoke-shapes/table1.md").exists()


def test_every_folder_has_results_of_its_own(tmp_path):
    """Also one whose name is no name for a file or a flag: what is left out, a hash tells apart."""
    names = ("shapes", "v1.2_b", "写真", "街道", "my photos", "my-photos", "-dash", ".hidden",
             "a\nb")
    found = {}
    for name in names:
        (tmp_path / name / "train").mkdir(parents=True)
        # a line break would end a line of the Makefile: such a folder is reached by another way
        folder = tmp_path / name if "\n" not in name else tmp_path / "link"
        if not folder.exists():
            folder.symlink_to(tmp_path / name)
        done = subprocess.run(["make", "-n", "table1", f"DATA={folder}", "PROTOCOL=smoke",
                               f"PY={sys.executable}"], cwd=REPO, capture_output=True, text=True,
                              env={**os.environ, "MAKEFLAGS": "", "MAKELEVEL": "0"})
        assert done.returncode == 0, done.stderr
        line = next(line for line in done.stdout.splitlines() if "study.py table1" in line)
        flag = next(word for word in shlex.split(line) if word.startswith("--name="))
        found[name] = flag.removeprefix("--name=")
        assert f"--out results/smoke-{found[name]}/table1/maxpool-2-32" in done.stdout
    assert found["shapes"] == "shapes" and found["my-photos"] == "my-photos"
    assert found["v1.2_b"] == "v1.2_b" and len(set(found.values())) == len(names)
    for name in names[2:]:
        if name != "my-photos":
            assert re.fullmatch(r"([a-z][a-z-]*-)?[0-9a-f]{8}", found[name]), (name, found[name])


def masks_of(folder):
    return {path.stem: np.asarray(Image.open(path)) for path in sorted(folder.iterdir())}


def test_predicted_masks_score_what_the_record_says(example):
    """Brought to the size of training, and to its stretched shape: within a point."""
    record = json.loads((example / "runs/streets/seed0.json").read_text())
    size, classes = record["about_data"]["size"], record["about_data"]["classes"]
    found, counts = masks_of(example / "runs/streets/masks"), 0
    photos = sorted((example / "made/streets/test/images").iterdir())
    assert len(found) == len(photos) == 9
    for photo in photos:
        truth = np.asarray(Image.open(photo.parents[1] / "masks" / f"{photo.stem}.png"))
        assert found[photo.stem].shape == truth.shape == read_image(photo).size[::-1]
        counts = counts + metrics.confusion(*(torch.from_numpy(mask_to(mask, size, size)) for mask
                                              in (found[photo.stem], truth)), len(classes))
    test = record["metrics"]["test"]
    assert test["miou"] > 0.5  # it has learnt something that could be lost
    assert metrics.mean_present(metrics.ious(counts)) == pytest.approx(test["miou"], abs=0.01)
    accuracy = (counts.diag().sum() / counts.sum()).item()
    assert accuracy == pytest.approx(test["pixel_accuracy"], abs=0.01)


def test_the_colours_are_those_of_classes_txt(example):
    mask = Image.open(next((example / "runs/streets/masks").iterdir()))
    assert mask.mode == "P" and tuple(mask.getpalette()[:6]) == (0x86, 0xb4, 0xe9, 0xc8, 0xa0, 0x78)
    assert VOID not in np.asarray(mask)


def test_the_same_masks_in_cpp(example, runner):
    cpp = next(line for block in blocks() for line in block if line.startswith("cpp/runner"))
    cpp = cpp.replace("cpp/runner", str(runner), 1)
    done = subprocess.run(cpp, shell=True, cwd=example, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    python, found = (masks_of(example / "runs/streets" / name) for name in ("masks", "masks-cpp"))
    assert 0 < len(found) < len(python)
    for name, mask in found.items():
        assert (mask == python[name]).mean() > 0.999


def test_a_classifier_knows_its_classes(example, capsys):
    path = sorted((example / "made/shapes/train/ring").iterdir())[0]
    done = subprocess.run([sys.executable, "predict.py", "--model",
                           example / "runs/shapes/seed0/model.onnx", path], cwd=REPO,
                          capture_output=True, text=True)
    assert re.search(r": (cross|disc|ring|stripes) [\d.]+ %$", done.stdout.strip())
    record = json.loads((example / "runs/shapes/seed0.json").read_text())
    assert record["about_data"]["classes"] == ["cross", "disc", "ring", "stripes"]
    assert record["about_data"]["train_images"] == 64 and record["about_data"]["size"] == 32


def test_export_and_interpret_want_the_folder_itself(example, tmp_path, capsys):
    checkpoint = example / "runs/streets/seed0.pt"
    for script in ("export", "interpret"):
        assert run(script, "--checkpoint", checkpoint) == 2
        said = capsys.readouterr().err
        assert "was trained on a folder of your own, streets" in said and "--data" in said
    shutil.copytree(example / "made/streets", tmp_path / "streets")
    with (tmp_path / "streets/classes.txt").open("a") as file:
        file.write("void\n")
    assert run("interpret", "--checkpoint", checkpoint, "--data", tmp_path / "streets") == 2
    assert "the checkpoint was trained on streets" in capsys.readouterr().err


def test_records_of_other_data_are_refused_for_the_table(example, tmp_path, capsys):
    folder = tmp_path / "smoke-streets/table2"
    shutil.copytree(example / "results/smoke-streets/table2", folder)
    path = folder / "dice/seed0.json"
    path.write_text(path.read_text().replace('"data": "', '"data": "0'))
    import study
    from lab import cli
    argv = ["table2", "--protocol", "smoke", "--name", "streets", "--results", str(tmp_path)]
    assert cli.guard(lambda: study.main(argv)) == 2
    assert "was made on other data than" in capsys.readouterr().err
    assert records.read(folder / "ce/seed0.json")["about_data"]["own"]
