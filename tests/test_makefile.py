"""What make would run, in which order, and what it refuses before anything runs."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import study

REPO = Path(__file__).parents[1]


@pytest.fixture
def make(tmp_path, tiny_root):
    """Runs make in this repository, on the tiny facades, with its results in a temporary folder."""
    if shutil.which("make") is None:
        pytest.skip("needs make")

    def run(*arguments):
        environment = {**os.environ, "DATA_ROOT": str(tiny_root), "MAKEFLAGS": "", "MAKELEVEL": "0"}
        return subprocess.run(["make", f"PY={sys.executable}", "PROTOCOL=smoke", "DEVICE=cpu",
                               f"RESULTS={tmp_path}/results/smoke", *arguments],
                              cwd=REPO, env=environment, capture_output=True, text=True)
    return run


def planned(make, table, *arguments):
    """(row, seed) of every run that make would start for a table, in order."""
    plan = make("-n", table, "SEEDS=0 1", *arguments).stdout.splitlines()
    return [(Path(line.split("--out ")[1]).name, line.split("--seed ")[1].split()[0])
            for line in plan if "--out" in line and "--seed" in line]


def with_row(tmp_path, row="table2/narrow := --width 4 --loss dice"):
    """This Makefile with a row more, which a reader added: its path."""
    own = tmp_path / "Makefile"
    own.write_text((REPO / "Makefile").read_text().replace(
        "\ntable2/no-dropout ", f"\n{row}\ntable2/no-dropout "))
    return own


@pytest.mark.parametrize("table, more", [("table1", 0), ("table2", 0), ("table2", 1)])
def test_every_row_of_the_report_is_made_in_seed_order(make, tmp_path, table, more):
    """Other rows, which a reader adds, may stand among them: here and in any reader's own copy."""
    before = len(planned(make, table))
    runs = planned(make, table, *(("-f", str(with_row(tmp_path))) if more else ()))
    assert len(runs) == before + 2 * more
    assert [seed for _, seed in runs] == ["0"] * (len(runs) // 2) + ["1"] * (len(runs) // 2)
    assert [(row, seed) for row, seed in runs if row in study.REPORT[table]] == [
        (row, seed) for seed in "01" for row in study.REPORT[table]]


@pytest.mark.parametrize("equals", [":=", ":= ", "\t:=\t", "  := ", " = "])
def test_a_row_may_be_written_with_any_spaces_or_none(make, tmp_path, equals):
    made = planned(make, "table2", "-f", str(with_row(tmp_path, f"table2/narrow{equals}--width 4")))
    assert [seed for row, seed in made if row == "narrow"] == ["0", "1"]
    assert made[0] == ("standard", "0")
    own = with_row(tmp_path, f"surrogates/scratch-tie0.7{equals}--tie 0.7")
    plan = make("-n", "rows/attention", "-f", str(own)).stdout
    assert plan.count("interpret.py measure") == 9 + 3 and plan.count("--tie 0.7 ") == 1


def finished(make, results):
    """Make every record of the study, empty, as a clone has them, and tables that are newer."""
    for line in make("-n", "rows/table1", "rows/table2", "rows/attention").stdout.splitlines():
        folder = Path(line.split("--out ")[-1])
        if results in folder.parents:
            folder.mkdir(parents=True)
            (folder / "seed0.json").write_text("{}")
    later = time.time() + 3600  # than any file of the project that is being worked on
    for name in ("table1.md", "table2.md", "attention.md", "claims.md", "hourglass.png"):
        (results / name).write_text("")
        os.utime(results / name, (later, later))


def test_what_computes_a_table_renders_it_again_and_trains_nothing(make, tmp_path):
    """Nor does a fresh clone, where any file may be the newest: records ask for no code."""
    results = tmp_path / "results/smoke"
    finished(make, results)
    assert "study.py" not in make("-n", "claims").stdout
    for source in ("study", "metrics", "lab/claims", "lab/estimates", "lab/records",
                   "lab/statistics", "lab/tables"):
        plan = make("-n", "claims", "-W", f"{source}.py").stdout
        rendered = [line.split()[2] for line in plan.splitlines() if " study.py " in line]
        assert rendered == ["table1", "table2", "attention", "claims"], source
        assert "train" not in plan and "measure" not in plan
    assert "architecture" in make("-n", f"{results}/hourglass.png", "-W", "lab/figures.py").stdout


def test_photos_that_are_not_there_are_asked_for_once_before_the_first_row(make, tmp_path):
    (tmp_path / "python").write_text(f'#!/bin/sh\necho "$*" >> {tmp_path}/log\n')  # fetches none
    (tmp_path / "python").chmod(0o755)
    common = (f"PY={tmp_path}/python", "PROTOCOL=desk", f"DATA_ROOT={tmp_path}/no photos")
    assert make("rows/table2", *common, "SEEDS=0 1 2", "RUN=env", "-j3").returncode == 0
    asked, *rows = (tmp_path / "log").read_text().splitlines()
    assert asked == "data.py --only facades" and len(rows) == 3 * len(study.REPORT["table2"])
    assert all(row.startswith("train_seg.py ") for row in rows)
    assert make("-n", "export", "SET=new", *common).stdout.count(asked) == 1


def test_nothing_is_fetched_where_no_photo_is_missing(make, tmp_path, streets):
    desk, nowhere = ("-n", "PROTOCOL=desk"), f"DATA_ROOT={tmp_path}/nowhere"
    for words in (("table2", *desk), ("table1", *desk, nowhere), ("table2", "-n", nowhere),
                  ("table2", *desk, nowhere, f"DATA={streets}")):
        plan = make(*words).stdout
        assert "train_" in plan and "data.py" not in plan
    finished(make, tmp_path / "results/smoke")  # nor where every row is there, as in a clone
    plan = make("claims", *desk, "SEEDS=0", nowhere, "-W", "study.py").stdout
    assert "study.py claims" in plan and "data.py" not in plan and "train_" not in plan


def test_a_measurement_that_exists_asks_for_no_training(make, tmp_path):
    plan = make("-n", "interpret").stdout
    assert plan.count("train_cls.py") == 8 + 3 and plan.count("interpret.py measure") == 8 + 3
    for line in plan.splitlines():
        if "interpret.py measure" in line:
            record = Path(line.split("--out ")[1].strip(), "seed0.json")
            record.parent.mkdir(parents=True, exist_ok=True)
            record.write_text("{}")
    (tmp_path / "results/smoke/attention.png").write_text("")
    assert "train" not in make("-n", "interpret").stdout
    assert make("-n", "interpret", "figures").stdout.count(" study.py figures ") == 1
    (tmp_path / "results/smoke/attention/frozen-tie0.5/seed0.json").unlink()
    plan = make("-n", "interpret").stdout
    assert plan.count("interpret.py measure") == 1 and plan.count("--frozen") == 1


def test_a_picture_of_ones_own_set_is_of_a_run_of_the_table(make, tmp_path, streets):
    """That comes after the plan: beside the table the base row would be trained twice at once."""
    results = tmp_path / "results/smoke"
    plan = make("-n", f"{results}/predictions.png", f"DATA={streets}").stdout.splitlines()
    steps = [next((word for word in ("--plan", f"--out {results}/table2/standard", "cp ",
                                     "interpret.py") if word in line), None) for line in plan]
    assert [step for step in steps if step] == [
        "--plan", f"--out {results}/table2/standard", "cp ", "interpret.py"]


def test_a_row_is_made_once_resumes_by_name_and_takes_a_launcher(make, tmp_path):
    launcher = tmp_path / "launch"
    launcher.write_text(f'#!/bin/sh\necho "launched $*" >> {tmp_path}/log\nexec "$@"\n')
    launcher.chmod(0o755)
    done = make("table2/no-act", "SEEDS=0 1", f"RUN={launcher}", "-j2")
    assert done.returncode == 0, done.stderr
    records = [tmp_path / f"results/smoke/table2/no-act/seed{seed}.json" for seed in (0, 1)]
    assert all(json.loads(record.read_text())["config"]["act"] == "none" for record in records)
    assert (tmp_path / "log").read_text().count("train_seg.py --protocol smoke") == 2
    assert make("-q", "table2/no-act", "SEEDS=0 1").returncode == 0  # nothing left to do
    records[1].unlink()
    assert planned(make, "table2/no-act") == [("no-act", "1")]


def test_a_stranger_adds_a_row_by_one_line(make, tmp_path):
    done = make("-f", str(with_row(tmp_path)), "table2/narrow")
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "results/smoke/table2/narrow/seed0.json").read_text())
    assert record["config"]["width"] == 4 and record["config"]["loss"] == "dice"


def test_the_page_waits_for_the_tables_that_it_shows(make, tmp_path):
    finished(make, tmp_path / "results/smoke")
    plan = make("-n", "page", "claims", "-W", "study.py").stdout
    assert 0 < plan.index(" study.py claims ") < plan.index("web/build.py")
    assert "study.py" not in make("-n", "page").stdout


@pytest.mark.parametrize("line", ["table2/narrow := --width 4", "surrogates/new := --tie 0.3"])
def test_a_row_below_the_rules_is_refused_as_its_flags_come_too_late(make, tmp_path, line):
    """It would train the base row under another's name."""
    own = tmp_path / "Makefile"
    own.write_text((REPO / "Makefile").read_text() + line + "\n")
    done = make("-f", str(own), "-n", "table2/narrow")
    assert done.returncode == 2 and "write its line among those of the other rows" in done.stderr


@pytest.mark.parametrize("typed", ["typo", "", "desk smoke", "%"])
def test_an_unknown_protocol_is_refused_before_anything_runs(make, tmp_path, typed):
    done = make("table1", f"PROTOCOL={typed}")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    known = study.PROTOCOLS
    assert f"PROTOCOL={typed} must be one of: {' '.join(known)}" in done.stderr
    assert not (tmp_path / "results").exists()


@pytest.mark.parametrize("flags", ["--split dev", "--epochs 3 --split=dev", "--split  dev"])
def test_a_table_of_the_dev_split_is_refused_before_anything_trains(make, tmp_path, flags):
    done = make("table1", f"DATA={tmp_path}", f"FLAGS={flags}")
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert "a table is of the test split" in done.stderr
    assert not (tmp_path / "results").exists()


def test_flags_for_the_studys_own_rows_are_refused(make):
    """They were left out without a word."""
    done = make("table1", "FLAGS=--epochs 3")
    assert done.returncode == 2 and "FLAGS=--epochs 3 is for every row of DATA=" in done.stderr


def test_no_launcher_and_no_flags_come_from_the_environment(make, monkeypatch, streets):
    monkeypatch.setenv("RUN", "1")  # as a CI system may have it
    monkeypatch.setenv("FLAGS", "--epochs 3")
    assert "\n1 " not in "\n" + make("-n", "table2/ce").stdout
    assert "--epochs 3" not in make("-n", "table2/ce", f"DATA={streets}").stdout


def test_a_failing_row_stops_make_with_the_scripts_own_line(make, tiny_root):
    (tiny_root / "mini_facade/train/eecs442_0000.png").unlink()
    done = make("table2/ce")
    assert done.returncode != 0 and "error: " in done.stderr and "Traceback" not in done.stderr
