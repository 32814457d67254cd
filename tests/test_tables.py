"""Tables and verdicts from made-up records with known answers; records that do not belong."""

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from made_records import SEEDS, runs, table, verdicts, wobble, write_record

import metrics
import study
from lab import cli

REPO = Path(__file__).parents[1]


def test_differences_are_paired_by_seed(tmp_path):
    for seed, (base, other) in enumerate([(0.90, 0.91), (0.80, 0.81), (0.85, 0.87)]):
        write_record(tmp_path, "maxpool-2-32", seed, base)
        write_record(tmp_path, "stride-2-32", seed, other, down="stride")
    rows = table(tmp_path)
    assert list(rows) == list(study.REPORT["table1"])
    # 4.3027 * 5 / sqrt(3), and 4.3027 * 0.57735 / sqrt(3): pairing removes the seeds
    assert rows["maxpool-2-32"][:4] == ["85.00 ± 12.42", "92.41 ✓", "90.00 ± 0.00", "99.04 ✗"]
    assert rows["stride-2-32"][:2] == ["+1.33 ± 1.43", "-1.15 ✓"]
    assert rows["stride-2-32"][4:] == ["3", "1.50 M", "73 M", "10 s"]
    assert rows["stride-2-16"][0] == "not run" and rows["stride-2-16"][4] == "0 of 3"


def test_missing_seeds_are_shown_and_one_seed_has_no_interval(tmp_path):
    for seed in range(3):
        write_record(tmp_path, "maxpool-2-32", seed, 0.9)
    write_record(tmp_path, "stride-2-32", 1, 0.8, down="stride")
    row = table(tmp_path)["stride-2-32"]
    assert row[0] == "-10.00" and row[4] == "1 of 3"
    assert table(tmp_path, "--seeds", "6")["maxpool-2-32"][4] == "3 of 6"


def test_a_row_of_ones_own_comes_last(tmp_path):
    for row in ("a-mine", "maxpool-2-32"):
        write_record(tmp_path, row, 0, 0.9)
    rows = table(tmp_path)
    assert list(rows)[-1] == "a-mine" and rows["a-mine"][:2] == ["+0.00", ""]


def test_a_column_that_the_report_lacks_stands_alone(tmp_path):
    for row, miou in (("standard", 0.5), ("unet", 0.45)):
        runs(tmp_path, "table2", row, [dict(map=0.2 + value, wgap=value, miou=value)
                                       for value in wobble(miou)])
    rows = study.load_records(tmp_path / "desk/table2", "desk")
    for one in study.records.each_of(rows):
        one |= dict(parameters=1, multiply_adds=1, train_seconds=1, environment={"device": "x"})
    head, rule, base, unet, *_ = study.render(rows, "table2", 6).splitlines()
    assert "| test MAP | report | WGAP | report | test mIoU | train MAP | report |" in head
    assert len({line.count("|") for line in (head, rule, base, unet)}) == 1
    assert unet.split(" | ")[5:7] == ["-5.00 ± 0.00", "not measured"]
    assert "Of test mIoU ± is over seeds alone." in study.render(rows, "table2", 6)


def test_a_name_cannot_break_out_of_the_table(tmp_path):
    write_record(tmp_path, "maxpool-2-32", 0, 0.9)
    write_record(tmp_path, "x| <img src=y>\n`<b>", 0, 0.9)
    assert "x? ?img src=y????b?" in "".join(table(tmp_path))
    assert "<" not in (tmp_path / "desk/table1.md").read_text()


@pytest.mark.parametrize("change, message", [
    (dict(protocol="report"),
     "stride-2-32/seed0.json is of protocol report, this is the desk table"),
    (dict(epochs=3), "stride-2-32/seed0.json has epochs 3, but .*maxpool-2-32/seed0.json has 2"),
    (dict(data="other"), "stride-2-32/seed0.json was made on other data")])
def test_a_record_that_does_not_belong_is_refused_by_name(tmp_path, change, message):
    write_record(tmp_path, "maxpool-2-32", 0, 0.9)
    write_record(tmp_path, "stride-2-32", 0, 0.9, **change)
    with pytest.raises(ValueError, match=message):
        table(tmp_path)


def test_a_setting_that_older_records_lack_refuses_no_table(tmp_path):
    write_record(tmp_path, "maxpool-2-32", 0, 0.9)
    write_record(tmp_path, "stride-2-32", 0, 0.9, new_setting=3)
    path = tmp_path / "desk/table1/stride-2-32/seed0.json"
    record = json.loads(path.read_text())
    del record["config"]["warmup"]  # one of those that all rows must share
    path.write_text(json.dumps(record))
    assert table(tmp_path)["stride-2-32"][0] == "+0.00"


@pytest.mark.parametrize("what", ["table1", "table2", "attention", "claims"])
def test_a_study_without_a_record_shows_nothing(tmp_path, what):
    (tmp_path / "desk/table1/maxpool-2-32").mkdir(parents=True)
    with pytest.raises(ValueError, match="desk has no record in .*make help"):
        study.main([what, "--protocol", "desk", "--results", str(tmp_path)])
    assert not [*tmp_path.glob("desk/*.md")]


def test_an_unknown_protocol_is_refused(tmp_path, capsys):
    assert cli.guard(lambda: study.main(["table1", "--protocol", "typo"])) == 2
    assert "invalid choice: 'typo'" in capsys.readouterr().err


def test_two_seeds_of_a_row_must_share_its_configuration(tmp_path):
    write_record(tmp_path, "maxpool-2-32", 0, 0.9)
    write_record(tmp_path, "maxpool-2-32", 1, 0.9, width=64)
    with pytest.raises(ValueError, match="seed1.json has another configuration than"):
        table(tmp_path)


def test_refusal_is_one_line_and_exit_code_2(tmp_path):
    write_record(tmp_path, "maxpool-2-32", 0, 0.9, protocol="report")
    done = subprocess.run([sys.executable, "study.py", "table1", "--protocol", "desk",
                           "--results", str(tmp_path)], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


# ---- the claims, on made-up runs with known answers ----

def test_verdicts_on_made_up_runs(tmp_path):
    table2 = {"standard": (0.70, 0.40), "ce": (0.70, 0.32), "dice": (0.71, 0.40),
              "no-inter-skip": (0.60, 0.20), "no-bn": (0.699, 0.40), "no-act": (0.69, 0.40),
              "hourglass-2-64": (0.72, 0.4),
              "hourglass-4-32": (0.70, 0.4), "unet": (0.66, 0.4), "no-dropout": (0.695, 0.4)}
    for i, (row, (map_, wgap)) in enumerate(table2.items()):
        step = 0.0005 * (1 + i % 3)  # the paired differences wobble, by 0.05 to 0.1 points
        scores = zip(wobble(map_, step), wobble(wgap, step))
        runs(tmp_path, "table2", row, [{"map": map_, "wgap": wgap} for map_, wgap in scores])
    accuracy = lambda row: (0.95 if row.startswith("stride") else
                            0.92 if row == "maxpool-2-32-noact" else 0.9)
    for row in study.REPORT["table1"]:
        runs(tmp_path, "table1", row, [{"accuracy": a} for a in wobble(accuracy(row))])
    found = {name: claim["verdict"] for name, claim in verdicts(tmp_path).items()}
    assert found == {"C1": "contradicted",  # stride rows are 5 points away
                     "C2": "supported",  # two points better does not hurt
                     "C3": "undecided", "C4": "undecided", "C5": "undecided",  # not run
                     "C6": "supported", "C7": "contradicted", "C8": "supported",
                     "C9": "contradicted", "C10": "contradicted", "C11": "supported",
                     "C12": "supported", "C13": "contradicted"}


def test_verdicts_on_made_up_attention(tmp_path):
    """Claims on a row's own values, with values per image beside the records."""
    gaps = {"cell1_minus_cell0": 0.001, "cell2_minus_cell0": 0.001, "cell3_minus_cell0": -0.03}
    rows = {"frozen-tie0": {"accuracy": 0.80, "mass": 0.6, **gaps},
            "scratch-tie0": {"accuracy": 0.8, "mass": 0.6},
            "frozen-tie0.9": {"accuracy": 0.81, "mass": 0.7},
            "scratch-tie0.9": {"accuracy": 0.81, "mass": 0.8}}
    for row, scores in rows.items():
        for seed in SEEDS:
            folder = tmp_path / "desk/attention" / row
            folder.mkdir(parents=True, exist_ok=True)
            wobbled = {key: value + 0.0004 * (seed - 2.5) for key, value in scores.items()}
            (folder / f"seed{seed}.json").write_text(json.dumps({
                "config": {"protocol": "desk", "seed": seed}, "data": "d",
                "metrics": {"test": wobbled}}))
            np.savez(folder / f"seed{seed}.npz",
                     **{key: np.full(500, value) for key, value in wobbled.items()})
    found = {name: claim["verdict"] for name, claim in verdicts(tmp_path).items()}
    assert (found["C3"], found["C4"], found["C5"]) == ("contradicted", "supported", "supported")
    assert "`frozen-tie0` |" in study.render_claims(verdicts(tmp_path))


def test_error_overlap_by_hand():
    target = np.array([0] * 4 + [1] * 4)
    a, b = np.array([0, 0, 1, 1, 1, 1, 1, 0]), np.array([0, 0, 2, 1, 1, 1, 1, 1])
    found = metrics.error_overlap(a, b, target)
    chance = pytest.approx((0.5 * 0.5 + 0.25 * 0) / 2)
    assert found == {"both": 2 / 8, "chance": chance, "same": 0.5}


def test_missing_rows_or_a_single_seed_decide_nothing(tmp_path):
    assert {claim["verdict"] for claim in verdicts(tmp_path).values()} == {"undecided"}
    for row, accuracy in (("maxpool-2-32", 0.9), ("maxpool-2-32-noact", 0.1)):
        runs(tmp_path, "table1", row, [{"accuracy": accuracy}])
    found = verdicts(tmp_path)
    assert found["C2"]["verdict"] == "undecided"
    assert found["C2"]["effects"][0]["mean"] == pytest.approx(-80)
    text = study.render_claims(found)
    for said in ("| C2 ", "-80.00 accuracy", "| C6 Weighted", "not run"):
        assert said in text


def test_standard_error_adds_seeds_and_test_set(tmp_path):
    """Two rows that disagree on 200 of 10,000 images, always the same way: by hand."""
    for row, right in (("maxpool-2-32", 9000), ("maxpool-2-32-noact", 8800)):
        for seed, shift in zip((0, 1), (0.0, 0.002)):
            folder = tmp_path / "desk/table1" / row
            folder.mkdir(parents=True, exist_ok=True)
            score = {"accuracy": right / 10_000 - (shift if "noact" in row else 0)}
            (folder / f"seed{seed}.json").write_text(json.dumps({
                "config": {"protocol": "desk", "seed": seed}, "data": "d",
                "metrics": {"test": score}}))
            hit = np.arange(10_000) < round(10_000 * score["accuracy"])
            np.savez(folder / f"seed{seed}.npz", prediction=hit,
                     target=np.ones(10_000, bool))
    rows = study.load_records(tmp_path / "desk/table1", "desk")
    ours = study.estimate(rows, "maxpool-2-32-noact", "maxpool-2-32", "test", "accuracy")
    assert ours.values == pytest.approx([-2.0, -2.2]) and ours.mean == pytest.approx(-2.1)
    from_seeds, from_images = 0.1, 100 * math.sqrt(0.02 * 0.98 / 10_000)  # points
    errors = [math.sqrt(part.variance) for part in ours.error]
    assert errors == pytest.approx([from_seeds, from_images], rel=0.05)
    assert [float(part.dof) for part in ours.error] == pytest.approx([1, 9_999])
    wide = from_seeds * 12.7062  # t of 1 degree
    one_more = wide * math.sqrt(3)  # 1 + 1/n against 1/n
    assert ours.half == pytest.approx(math.hypot(wide, 1.96 * from_images), rel=0.05)
    edge = math.hypot(one_more, 1.96 * from_images)
    assert ours.holds(-2.1 + 0.97 * edge) and not ours.holds(-2.1 + 1.03 * edge)


def test_a_difference_is_over_the_seeds_that_both_rows_have(tmp_path):
    for row, seeds, more in (("maxpool-2-32", range(4), 0), ("stride-1-32", range(1, 4), 0.02),
                             ("stride-2-32", range(4), 0)):
        for seed in seeds:
            write_record(tmp_path, row, seed, 0.5 + 0.01 * seed + more)
    rows = study.load_records(tmp_path / "desk/table1", "desk")
    ours = study.estimate(rows, "stride-1-32", "maxpool-2-32", "test", "accuracy")
    assert len(ours.values) == 3 and ours.mean == pytest.approx(2)
    assert ours.half == pytest.approx(0, abs=0.003)


def test_a_metric_of_which_runs_keep_no_values_has_an_interval_over_seeds_alone(tmp_path):
    """So that a metric is added by its value and its column."""
    for row in ("standard", "ce"):
        runs(tmp_path, "table2", row, [{"map": x, "miou": x} for x in wobble(0.7)[:3]])
    rows = study.load_records(tmp_path / "desk/table2", "desk")
    for metric, sources in (("map", 2), ("miou", 1)):
        assert len(study.estimate(rows, "ce", "standard", "test", metric).error) == sources
    del rows["ce"][0]["metrics"]["test"]["miou"]  # a run from before the metric was added
    assert len(study.estimate(rows, "ce", "standard", "test", "miou").values) == 2
