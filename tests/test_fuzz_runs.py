"""Random and mutated checkpoints, records, arrays, flags and logits: right, or one error."""

import contextlib
import dataclasses
import io
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from sklearn.metrics import average_precision_score, confusion_matrix, jaccard_score
from test_fuzz import bounded, changed, mutated, outcome, scratch

import metrics
import study
import train_cls
import train_seg
from lab import cli, files
from lab.files import BadInput
from lab.records import load_arrays, read

# ---- checkpoints and records ----

RECORD = {"config": {"seed": 0, "protocol": "smoke", "lr": 0.001}, "data": "0" * 8,
          "metrics": {"test": {"map": 0.5}}}
STATE = {"identity": {"config": RECORD["config"], "data": "0" * 8}, "epoch": 2,
         "curve": [0.5, 0.25], "record": RECORD,
         "model": {"w": torch.arange(600.0).view(3, 200), "n": torch.tensor(7)}}


def saved_state():
    buffer = io.BytesIO()
    torch.save(STATE, buffer)
    return buffer.getvalue()


def plain(value):
    """Nested dicts, their tensors and arrays as lists."""
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    return (value.dtype, value.tolist()) if isinstance(value, (torch.Tensor, np.ndarray)) else value


@bounded
@given(mutated(saved_state()))
# this file is a folder
@example(changed(saved_state(), saved_state().rindex(b"archive/data/0") - 8, 16))
def test_a_damaged_checkpoint_is_read_exactly_or_refused(content):
    with scratch() as folder:
        path = Path(folder, "seed0.pt")
        path.write_bytes(content)
        found = outcome(path, files.read_checkpoint, path)
        assert isinstance(found, BadInput) or plain(found) == plain(STATE)
        assert isinstance(found, dict) or content != saved_state()


words = st.text(max_size=4)
values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | words,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(words, inner, max_size=3),
    max_leaves=8)
records = values | st.fixed_dictionaries(
    {}, optional={key: values | st.just(RECORD[key]) for key in RECORD})


@bounded
@given(st.one_of(records.map(lambda record: json.dumps(record).encode()),
                 mutated(json.dumps(RECORD).encode()), st.binary()))
@example(b"[" * 100_000)
@example(json.dumps({**RECORD, "config": []}).encode())
@example(json.dumps({**RECORD, "config": {"seed": 0}}).encode())
@example(json.dumps(RECORD).encode())
def test_a_record_is_read_exactly_or_refused(content):
    with scratch() as folder:
        path = Path(folder, "table1/row/seed0.json")
        path.parent.mkdir(parents=True)
        path.write_bytes(content)
        found = outcome(path, read, path)
        if isinstance(found, dict):
            assert repr(found) == repr({**found, **json.loads(content)})
            assert found.keys() >= RECORD.keys()
            assert isinstance(found["config"], dict) and isinstance(found["metrics"], dict)
        assert isinstance(found, dict) or content != json.dumps(RECORD).encode()
        try:
            (row,) = study.load_records(path.parents[1], "smoke").values()
            assert [one["config"]["protocol"] for one in row.values()] == ["smoke"]
        except ValueError as error:  # of which BadInput is one
            assert str(path) in str(error) and content != json.dumps(RECORD).encode()


ARRAYS = {"prediction": np.arange(40, dtype=np.uint8) % 7,
          "target": np.arange(40, dtype=np.uint8) % 5}


def saved_arrays():
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **ARRAYS)
    return buffer.getvalue()


@bounded
@given(mutated(saved_arrays()))
# the next file is a comment
@example(changed(saved_arrays(), saved_arrays().rindex(b"prediction.npy") - 13, 1))
def test_damaged_arrays_are_read_exactly_or_refused(content):
    with scratch() as folder:
        path = Path(folder, "seed0.npz")
        path.write_bytes(content)
        try:
            found = load_arrays(path)
        except ValueError as error:
            assert str(path) in str(error) and content != saved_arrays()
        else:
            assert plain(found) == plain(ARRAYS)


# ---- flags ----

SCRIPTS = {train_cls: train_cls.PROTOCOLS, train_seg: train_seg.PROTOCOLS}
ODD = ["", "0", "-1", "1", "16", "0.5", "1e400", "1e-400", "nan", "-inf", "0x10", "1_000", "٣",
       " 1 ", "9" * 5000, "two", "--", "-", "=", "\0", "a\nb", "%s", "none", "dev", "desk", "gelu",
       "unet"]
FLAGS = sorted({f"--{no}{field.name.replace('_', '-')}" for script in SCRIPTS
                for field in dataclasses.fields(script.Config) for no in ("", "no-")})
odd = st.sampled_from(ODD)
flag = st.sampled_from(FLAGS)
parts = st.one_of(st.tuples(flag, odd), st.tuples(flag), st.tuples(odd), st.just(("-h",)),
                  st.tuples(st.builds("{}={}".format, flag, odd)))
argvs = st.lists(parts, max_size=4).map(lambda parts: [arg for part in parts for arg in part])


def flags_of(cfg):
    """The flags that give this config."""
    for name, value in dataclasses.asdict(cfg).items():
        name = name.replace("_", "-")
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        elif value is not None:
            yield f"--{name}={value}"


@bounded
@given(st.sampled_from(list(SCRIPTS)), argvs)
def test_flags_give_a_config_that_its_own_flags_give_again_or_are_refused(script, argv):
    parse = lambda argv: cli.parse(script.Config, script.__doc__, argv, SCRIPTS[script])
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            cfg = outcome("", parse, argv)
        except SystemExit as stop:
            assert stop.code == 0 and "-h" in argv
            return
    assert isinstance(cfg, BadInput) or isinstance(cfg, script.Config) and "-h" not in argv
    if not isinstance(cfg, BadInput):
        cfg = dataclasses.replace(cfg, out="elsewhere")
        assert repr(parse(list(flags_of(cfg)))) == repr(cfg)  # repr, since NaN is not itself


# ---- metrics ----

shapes = st.tuples(st.integers(1, 3), st.just(3), st.integers(1, 4), st.integers(1, 4))


@bounded
@given(hnp.arrays(np.float32, shapes, elements=st.sampled_from([0, 0.25, 1, -2, 8])), st.data())
def test_segmentation_is_scikit_learns_with_ties_and_absent_classes(logits, draws):
    target = draws.draw(hnp.arrays(np.uint8, (len(logits), *logits.shape[2:]),
                                   elements=st.integers(0, 2)))
    found = metrics.segmentation(torch.from_numpy(logits), torch.from_numpy(target), "abc")
    flat, prediction = target.ravel(), logits.argmax(1).ravel()
    present = np.unique(flat)
    iou = jaccard_score(flat, prediction, labels=present, average=None)
    ap = [average_precision_score(flat == c, logits[:, c].ravel()) for c in present]
    assert [found["iou"]["abc"[c]] for c in present] == pytest.approx(iou.tolist(), abs=1e-12)
    assert [found["ap_logits"]["abc"[c]] for c in present] == pytest.approx(ap, abs=1e-12)
    assert found["miou"] == pytest.approx(np.mean(iou)) and found["classes_counted"] == len(present)
    assert all(math.isnan(found["iou"]["abc"[c]]) for c in {0, 1, 2} - set(present))
    assert metrics.confusion(torch.from_numpy(prediction), torch.from_numpy(flat), 3).tolist() == \
        confusion_matrix(flat, prediction, labels=range(3)).tolist()
