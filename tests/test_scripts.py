"""The command lines as a user types them: every flag runs. Wrong ones: test_bad_input.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import models
import train_cls
import train_seg
from lab import cli, provenance

REPO = Path(__file__).parents[1]


@pytest.mark.parametrize("flags", ["--width 8 --loss wce", "--hourglasses 4 --width 4",
                                   "--no-inter-skip --width 4",
                                   "--no-intra-skip --width 4 --no-norm", "--arch unet --width 4",
                                   "--loss dice --width 4", "--loss ce --act none --width 4",
                                   "--dropout 0 --split dev --width 4",
                                   "--act gelu --weight-power 1 --seed 5 --width 4",
                                   "--precision fp16 --width 4"])
def test_train_seg_dry_run(tiny_root, tmp_path, monkeypatch, capsys, flags):
    monkeypatch.chdir(tmp_path)
    argv = [*flags.split(), "--dry-run", "--size", "32", "--data-root", str(tiny_root)]
    if "dev" in flags:
        argv[-1] = str(tmp_path / "empty")  # the synthetic set: the tiny one has too few photos
        (tmp_path / "empty").mkdir()
    assert cli.guard(lambda: train_seg.main(argv)) == 0
    assert capsys.readouterr().out.rstrip().endswith("dry run passed")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("flags", [
    "--depth 4 --down stride --no-skip --act gelu --block transformer", "--no-norm",
    "--act none --split dev", "--down maxpool --depth 1", "--down blurpool",
    "--composites --tie 0.9"])
def test_train_cls_dry_run(fashion_root, tmp_path, monkeypatch, capsys, flags):
    argv = [*flags.split(), "--width", "32", "--batch", "8", "--dry-run",
            "--data-root", str(fashion_root.resolve())]
    monkeypatch.chdir(tmp_path)
    assert cli.guard(lambda: train_cls.main(argv)) == 0
    assert capsys.readouterr().out.rstrip().endswith("dry run passed")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("script", ["train_cls.py", "train_seg.py", "data.py"])
def test_help_reads_as_documentation(script):
    text = subprocess.run([sys.executable, script, "-h"], cwd=REPO, check=True,
                          capture_output=True, text=True).stdout
    assert f"python {script}" in text
    if script != "data.py":
        for said in ("peak learning rate of Adam (0.001)", "protocols:", "  smoke   --epochs"):
            assert said in text


@pytest.mark.parametrize("line", ["interpret.py measure -h", "export.py bench -h"])
def test_help_says_how_to_ask_for_another_commands_flags(line):
    """That of a script with commands shows the flags of the first alone."""
    helped = lambda *words: subprocess.run([sys.executable, *words], cwd=REPO, check=True,
                                           capture_output=True, text=True).stdout
    script, *rest = line.split()
    assert f"python {line}" in helped(script, "-h")
    flag = {"measure": "--sweep-images", "bench": "--rounds"}[rest[0]]
    assert flag in helped(script, *rest) and f"{flag} " not in helped(script, "-h")


@pytest.mark.parametrize("script", ["train_cls.py", "train_seg.py", "data.py"])
def test_exit_code_2_without_a_traceback(script):
    done = subprocess.run([sys.executable, script, "--data-root", "/nowhere"], cwd=REPO,
                          capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: data root /nowhere")
    assert len(done.stderr.splitlines()) == 1


def test_the_default_place_names_what_was_changed(tmp_path, monkeypatch):
    parse = lambda *argv: cli.parse(train_seg.Config, "", list(argv), train_seg.PROTOCOLS).out
    monkeypatch.setattr(sys, "argv", ["train_seg.py"])
    assert parse() == "runs/train_seg/report/base"
    assert parse("--width", "32", "--seed", "3", "--device", "cpu") == "runs/train_seg/report/base"
    assert parse("--protocol", "desk", "--width", "64", "--no-inter-skip") == \
        "runs/train_seg/desk/width=64,inter_skip=False"
    assert parse("--no-inter-skip", "--protocol", "desk", "--width", "64") == \
        "runs/train_seg/desk/width=64,inter_skip=False"  # the same run, whatever comes first
    assert parse("--out", "here") == "here"


def test_the_default_place_names_the_folder_of_images_and_the_base(tmp_path, monkeypatch):
    """So that two folders, or two bases, do not meet in one place, where the second is refused."""
    monkeypatch.setattr(sys, "argv", ["train_cls.py"])
    parse = lambda *argv: cli.parse(train_cls.Config, "", list(argv), train_cls.PROTOCOLS).out
    assert parse("--data", "here/birds/") == "runs/train_cls/report/data=birds"
    monkeypatch.chdir(tmp_path)
    assert parse("--data", ".") == f"runs/train_cls/report/data={tmp_path.name}"
    base = tmp_path / "stride-2-32/seed0.pt"
    base.parent.mkdir()
    base.touch()
    assert parse("--frozen", "--base", str(base), "--epochs", "1") == \
        "runs/train_cls/report/epochs=1,frozen=True,base=stride-2-32"


def test_a_flag_wins_over_the_protocol_and_the_protocol_over_the_default():
    parse = lambda *argv: cli.parse(train_seg.Config, "", list(argv), train_seg.PROTOCOLS)
    assert parse().size == 256
    assert parse("--protocol", "smoke").size == 32
    assert parse("--size", "64", "--protocol", "smoke").size == 64


def test_train_cls_config_matches_the_constructor():
    cfg = train_cls.Config(depth=1, width=8, down="stride", skip=False, act="gelu")
    model = models.build(vars(cfg), 1, 10)
    assert not any(m.skip for m in model.modules() if isinstance(m, models.ResidualBlock))


def test_no_module_of_the_current_folder_is_imported(tmp_path):
    (tmp_path / "onnxruntime.py").write_text("print('taken from the current folder')")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, provenance.SOURCE / "export.py", "bench"], cwd=tmp_path,
                          env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: --checkpoint is missing")
