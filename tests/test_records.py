"""Records and arrays that are damaged, misplaced or of another kind: one line, or left out."""

import json
import shutil

import numpy as np
import pytest
from made_records import runs, table, wobble, write_record
from scipy import stats

import study
from lab import cli, figures, records, tables


@pytest.fixture
def two_rows(tmp_path):
    """Table 1 with its base and one row of two seeds."""
    for seed in (0, 1):
        write_record(tmp_path, "maxpool-2-32", seed, 0.9)
        write_record(tmp_path, "stride-2-32", seed, 0.8 + 0.01 * seed, down="stride")
    return tmp_path


def changed(path, change):
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


def refused(root, capsys, *argv) -> str:
    """What study.py says, in one line, and with exit code 2."""
    capsys.readouterr()
    assert cli.guard(lambda: study.main([*argv, "--protocol", "desk", "--results",
                                         str(root)])) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    return said


def of(name, value=None):
    """A change that puts a value, or nothing, in a record's place of this name."""
    *outer, last = name.split(".")

    def change(record):
        for key in outer:
            record = record[key]
        record.pop(last) if value is None else record.update({last: value})
    return change


@pytest.mark.parametrize("change, message", [
    (of("metrics", {}), "has no metrics of the test split"),
    (of("metrics.test", 5), "is no run record, or damaged"),
    (of("metrics.test.accuracy", "x"), "has test accuracy 'x', which is no number"),
    (of("metrics.test.accuracy", True), "has test accuracy True, which is no number"),
    (of("train_seconds"), "has no train_seconds"),
    (of("train_seconds", "x"), "has train_seconds 'x'"),
    (of("parameters"), "has no parameters"),
    (of("environment"), "has no environment"),
    (of("environment", {}), "has no environment device")])
def test_a_damaged_record_is_refused_by_name(two_rows, capsys, change, message):
    path = two_rows / "desk/table1/stride-2-32/seed0.json"
    changed(path, change)
    said = refused(two_rows, capsys, "table1")
    assert message in said and str(path) in said


def test_a_record_without_a_curve_has_no_picture(two_rows, capsys):
    path = two_rows / "desk/table1/stride-2-32/seed0.json"
    changed(path, of("curve"))
    assert f"{path} has no curve" in refused(two_rows, capsys, "figures")


@pytest.mark.parametrize("metrics", [{"accuracy": None}, {}])
def test_a_metric_that_is_null_counts_as_missing(two_rows, metrics):
    path = two_rows / "desk/table1/stride-2-32/seed1.json"
    before = table(two_rows)["stride-2-32"]
    changed(path, lambda record: record["metrics"].update(test=metrics))
    row = table(two_rows)["stride-2-32"]
    assert (before[0], row[0]) == ("-9.50 ± 6.35", "-10.00") and row[4] == "1 of 2"
    assert row[2] == before[2] == "+0.00 ± 0.00"  # the training split has both


def test_a_run_on_the_dev_split_is_in_no_table(tmp_path, capsys):
    path = write_record(tmp_path, "maxpool-2-32", 0, 0.9, split="dev")
    changed(path, lambda record: record["metrics"].update(val=record["metrics"].pop("test")))
    for what in ("table1", "claims", "figures"):
        said = refused(tmp_path, capsys, what)
        assert str(path) in said and "of the test split" in said and "--split full" in said


# ---- arrays ----

def save(path, **arrays):
    np.savez(path.with_suffix(".npz"), **arrays)


@pytest.mark.parametrize("arrays, message", [
    (dict(accuracy=np.full(5, 0.9)), "has 5 values of accuracy, the record 100 images"),
    (dict(accuracy=np.full((50, 2), 0.9)), "has accuracy of shape"),
    (dict(accuracy=np.full(100, 0.7)), "has a mean accuracy of 0.7"),
    (dict(prediction=np.ones(100), target=np.ones(99)), "has 99 values of target"),
    (dict(mass=np.ones(100)), "holds mass, no accuracy of each image"),
    (dict(accuracy=np.full(100, "x")), "has accuracy of <U1"),
    (dict(hits=np.ones((3, 2, 192)), misses=np.ones((3, 2, 192)), groups=np.arange(3)),
     "holds groups, hits, misses, no accuracy of each image")])
def test_arrays_of_another_run_are_refused(two_rows, capsys, arrays, message):
    for path in two_rows.glob("desk/table1/*/*.json"):
        accuracy = json.loads(path.read_text())["metrics"]["test"]["accuracy"]
        changed(path, of("metrics.test.images", 100))
        save(path, accuracy=np.full(100, accuracy))
    path = two_rows / "desk/table1/maxpool-2-32/seed1.json"
    table(two_rows)
    save(path, **arrays)
    records.load_arrays.cache_clear()
    said = refused(two_rows, capsys, "table1")
    assert message in said and str(path.with_suffix(".npz")) in said


def test_not_all_arrays_of_a_study_are_held_at_once(tmp_path):
    """Histograms of thousands of images each would not fit the memory with those of all runs."""
    for seed in range(20):
        save(tmp_path / f"seed{seed}.json", accuracy=np.ones(3))
        records.load_arrays(tmp_path / f"seed{seed}.npz")
    assert records.load_arrays.cache_info().currsize < 20


def test_arrays_of_unequal_length_are_not_compared(two_rows, capsys):
    """As of records from before they said how many images they were of."""
    save(two_rows / "desk/table1/stride-2-32/seed1.json", accuracy=np.full(1, 0.81))
    assert "seed1.npz has 1 values of accuracy, but" in refused(two_rows, capsys, "table1")


@pytest.mark.parametrize("change, message", [
    (lambda arrays: arrays.pop("misses"), "holds no misses"),
    (lambda arrays: arrays.update(misses=arrays["misses"][:, :4]), "has misses of shape"),
    (lambda arrays: arrays.update(groups=arrays["groups"][:9]), "has groups of shape")])
def test_counts_that_cannot_be_are_refused(tmp_path, capsys, change, message):
    for row in ("standard", "ce"):
        runs(tmp_path, "table2", row, [{"map": x, "wgap": x - 0.3} for x in wobble(0.7)])
    path = tmp_path / "desk/table2/ce/seed3.npz"
    arrays = dict(np.load(path))
    change(arrays)
    np.savez(path, **arrays)
    said = refused(tmp_path, capsys, "claims")
    assert message in said and str(path) in said


def test_arrays_of_a_classifier_say_nothing_of_precision(tmp_path, capsys):
    for row in ("standard", "ce"):
        runs(tmp_path, "table2", row, [{"map": x, "wgap": x - 0.3} for x in wobble(0.7)])
    path = tmp_path / "desk/table2/ce/seed3.npz"
    np.savez(path, prediction=np.ones(9), target=np.ones(9))
    said = refused(tmp_path, capsys, "claims")
    assert "holds no hits" in said and str(path) in said


def test_arrays_of_another_row_are_refused(tmp_path, capsys):
    for row, score in (("standard", 0.7), ("ce", 0.6), ("dice", 0.5)):
        runs(tmp_path, "table2", row, [{"map": x, "wgap": x - 0.3} for x in wobble(score)])
    folder = tmp_path / "desk/table2"
    shutil.copy(folder / "ce/seed3.npz", folder / "dice/seed3.npz")
    said = refused(tmp_path, capsys, "claims")
    assert "dice/seed3.npz" in said and "ce/seed3.npz" in said and "same arrays" in said


def test_lost_arrays_are_named(two_rows, capsys):
    path = two_rows / "desk/table1/stride-2-32/seed1.npz"
    path.unlink()
    assert str(path) in refused(two_rows, capsys, "table1")


# ---- names ----

def test_a_row_may_have_any_name(tmp_path):
    for row in ("maxpool-2-32", "ce[2]", "a*"):
        write_record(tmp_path, row, 0, 0.9)
    assert set(study.load_records(tmp_path / "desk/table1", "desk")) == {"maxpool-2-32", "ce[2]",
                                                                           "a*"}


def test_only_what_is_called_a_seed_is_one(two_rows, capsys):
    folder = two_rows / "desk/table1/stride-2-32"
    before = table(two_rows)
    for name in ("seed0-old.json", "seed0_old.json", "seed00.json", "seeds.json"):
        shutil.copy(folder / "seed0.json", folder / name)
        changed(folder / name, of("metrics.test.accuracy", 0.1))
    assert table(two_rows) == before
    shutil.move(folder / "seed1.json", folder / "seed2.json")
    said = refused(two_rows, capsys, "table1")
    assert "seed2.json is of seed 1" in said


def test_a_missing_folder_is_named_and_not_made(tmp_path, capsys):
    for argv in (["table1", "--name", "typo"], ["claims"], ["figures"], ["attention"]):
        said = refused(tmp_path, capsys, *argv)
        assert str(tmp_path / ("desk-typo" if "typo" in argv else "desk")) in said
        assert "no records" in said
    assert not list(tmp_path.iterdir())


# ---- by hand ----

def test_an_interval_and_a_confusion_matrix_by_hand(tmp_path):
    mean, half = records.interval([0.1, 0.2, 0.6])
    assert mean == pytest.approx(30)
    assert half == pytest.approx(stats.t.ppf(0.975, 2) * stats.sem([10, 20, 60]))
    np.savez(tmp_path / "seed0.npz", target=np.array([0, 0, 1]), prediction=np.array([0, 1, 1]))
    total = records.summed_confusion({0: {"path": str(tmp_path / "seed0.json")}}, 2)
    assert total.tolist() == [[1, 1], [0, 1]]  # the true class down, the answer across
    figure = figures.draw_confusions({"x": np.array([[3, 1], [0, 8]])}, ("a", "b"))
    said = [(text.get_position(), text.get_text()) for text in figure.axes[0].texts]
    assert said == [((0, 0), "75"), ((1, 0), "25"), ((1, 1), "100")]


def test_a_table_counts_the_numbers_that_hold():
    made_of = {"row": {0: {"environment": {"device": "x"}, "path": "p"}}}
    text = tables.notes(made_of, {"accuracy": [True, False, False]}, set(), False)
    assert "accuracy: 1 of 3 do." in text
