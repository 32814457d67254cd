"""The page: its networks, its tables, and itself in a browser (`make test-page`)."""

import hashlib
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from made_records import runs, wobble

import data
import study
from lab import cli, forms
from lab.files import BadInput

ROOT = Path(__file__).parent.parent


def script(name: str):
    """A script of web/, which is on no path: another module may have its name."""
    spec = importlib.util.spec_from_file_location(f"web_{name}", ROOT / f"web/{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their module
    spec.loader.exec_module(module)
    return module


build, networks = script("build"), script("networks")
INDEX = json.loads((ROOT / "web/models/index.json").read_text())


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


# ---- the committed networks ----

def test_each_network_is_of_a_committed_record():
    listed = {one["file"] for one in INDEX["files"]}
    assert listed == {path.name for path in (ROOT / "web/models").glob("*.onnx")}
    for one in INDEX["files"]:
        path = ROOT / "web/models" / one["file"]
        assert (path.stat().st_size, sha256(path)) == (one["bytes"], one["sha256"])
        about = {prop.key: prop.value for prop in onnx.load(path).metadata_props}
        assert about["record_sha256"] == one["networks"][0]["record_sha256"]
        for network in one["networks"]:
            record = json.loads((ROOT / network["record"]).read_text())
            assert sha256(ROOT / network["record"]) == network["record_sha256"]
            assert record["weights_sha256"] == network["weights_sha256"]
            assert record["about_data"]["classes"] == one["classes"]
            if "tie" in network:
                frozen = network["kind"] == "frozen"
                config = record["config"]
                assert config["composites"] and config["tie"] == float(network["tie"])
                assert (config["down"], config["frozen"]) == (network["down"], frozen)


def test_the_page_has_what_it_offers():
    """Each halving with each tie on frozen features; together no more than a reader waits for."""
    known = {(network["down"], network["kind"], network["tie"])
             for one in INDEX["files"] for network in one["networks"] if "tie" in network}
    assert known >= {(down, "frozen", tie) for down in networks.DOWNS for tie in networks.TIES}
    assert ("maxpool", "scratch", "0") in known
    assert INDEX["bytes"] == sum(one["bytes"] for one in INDEX["files"]) <= 12_000_000


def test_storing_in_8_bits_costs_little():
    for one in INDEX["files"]:
        for network in one["networks"]:
            cost, metric = network["cost"], "map" if network["kind"] == "facade" else "accuracy"
            record = json.loads((ROOT / network["record"]).read_text())
            assert cost[metric]["record"] == record["metrics"]["test"][metric]
            assert cost[metric]["record"] - cost[metric]["file"] <= 0.005
            assert 0 < cost["logits"]["mean_difference"] < 0.05
            assert cost["logits"]["argmax_agreement"] > 0.98


def test_no_file_names_a_machine():
    """Exporters write stack traces with the paths of files into each node."""
    for path in (ROOT / "web/models").iterdir():
        content = path.read_bytes()
        assert b"/site-packages/" not in content and b"File \"" not in content


def test_8_bit_weights_are_the_nearest(tmp_path):
    rng = np.random.default_rng(0)
    weights = rng.normal(size=(8, 16, 3, 3)).astype(np.float32)
    weights[3] = 0
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    shape = lambda name: onnx.helper.make_tensor_value_info(name, 1, [1, None, None, None])
    graph = onnx.helper.make_graph([node], "g", [shape("x")], [shape("y")],
                                   [onnx.numpy_helper.from_array(weights, "w")])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)],
                                   ir_version=9)
    x = rng.normal(size=(1, 16, 9, 9)).astype(np.float32)
    run = lambda: onnxruntime.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    exact, before = run(), model.ByteSize()
    networks.stored_weights(model)
    assert model.ByteSize() < 0.35 * before and not (run()[0, 3] != 0).any()
    wide = np.abs(weights).reshape(8, -1).max(1) / 127
    bound = (wide / 2)[:, None, None] * np.abs(x).sum()  # each weight is at most half a step off
    assert (np.abs(run() - exact)[0] <= bound).all() and np.abs(run() - exact).max() > 0


# ---- the build ----

def test_the_tables_are_those_of_the_study():
    """What the page shows is, cell by cell, what study.py writes as Markdown."""
    for name in study.REPORT:
        shown, rows = build.table(ROOT / "results", "desk", name)
        text = study.render(rows, name, shown["seeds"])
        for row in shown["rows"]:
            line = next(line for line in text.splitlines() if f"`{row['row']}`" in line)
            for one in row["columns"].values():
                sign = "" if row["base"] else "+"
                assert f"{one['mean']:{sign}.2f} ± {one['half']:.2f}" in line
                assert len(one["own"]) == len(one["values"]) == row["seeds"]
                if one["report"] is not None:
                    mark = "✓" if one["holds"] else "✗"
                    assert f"{one['report']:{sign}.2f} {mark}" in line
            assert row["command"] == f"make {name}/{row['row']} PROTOCOL=desk"


@pytest.fixture
def fresh(tmp_path, monkeypatch):
    """An empty folder to build into, and no need for records: those are slow."""
    monkeypatch.setattr(build, "tables", lambda folder: {})
    monkeypatch.chdir(tmp_path)  # where the runtime is kept
    return tmp_path


@pytest.fixture
def from_npm(monkeypatch):
    """What npm gives, and the build expects: small files."""
    content = {name: name.encode() for name in build.RUNTIME}
    monkeypatch.setattr(build, "RUNTIME", {
        name: hashlib.sha256(value).hexdigest() for name, value in content.items()})
    monkeypatch.setattr(build, "from_npm", lambda *_: content)
    return content


def built(out: Path) -> int:
    return cli.guard(lambda: build.main(["--out", str(out)]))


def test_without_npm_one_line_says_so(fresh, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(fresh))
    assert built(fresh / "page") == 2 and not (fresh / "page").exists()
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and said[0].startswith("error: no npm, which fetches onnxruntime-web")
    assert "into build/runtime/ by hand" in said[0]


def test_an_npm_that_cannot_get_it_and_a_wrong_runtime(fresh, monkeypatch, capsys):
    npm = fresh / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error code E404' >&2\nexit 1\n")
    npm.chmod(0o755)
    monkeypatch.setenv("PATH", f"{fresh}:/bin:/usr/bin")
    assert built(fresh / "page") == 2
    assert "npm cannot get onnxruntime-web" in (said := capsys.readouterr().err)
    assert "(npm error code E404)" in said and len(said.splitlines()) == 1
    assert "into build/runtime/ by hand" in said
    monkeypatch.setattr(build, "from_npm", lambda *_: dict.fromkeys(build.RUNTIME, b"other"))
    assert built(fresh / "page") == 2 and "has other files than" in capsys.readouterr().err
    assert not (fresh / "page").exists() and not (fresh / "build").exists()


def test_the_site_is_whole_and_replaced_as_a_whole(fresh, from_npm, monkeypatch, capsys):
    (fresh / "page").mkdir()  # an empty folder is no one's
    assert built(fresh / "page") == 0 and "page " in capsys.readouterr().out
    (fresh / "page/js/old.js").write_text("of an earlier build")
    assert built(fresh / "page") == 0
    made = {path.relative_to(fresh / "page").as_posix()
            for path in (fresh / "page").rglob("*") if path.is_file()}
    assert {"index.html", "js/worker.js", "models/index.json", "data/tables.json",
            *(f"runtime/{name}" for name in from_npm)} <= made
    assert "js/old.js" not in made and not any(name.endswith(".py") for name in made)
    monkeypatch.setattr(build, "from_npm", None)  # an earlier build's runtime is used again
    (fresh / "link").symlink_to(fresh / "page")  # a link stays one
    (fresh / "page/js/old.js").write_text("of an earlier build")
    assert built(fresh / "link") == 0 and (fresh / "link").is_symlink()
    assert not (fresh / "page/js/old.js").exists()
    assert {path.name for path in fresh.iterdir()} == {"build", "page", "link"}


def test_what_is_no_page_is_not_replaced(fresh, monkeypatch, capsys):
    """Nor is the runtime fetched for it."""
    monkeypatch.setattr(build, "from_npm", lambda *_: pytest.fail("was fetched"))
    (fresh / "docs").mkdir()
    (fresh / "docs/thesis.md").write_text("the only copy")
    (fresh / "file").write_text("the only copy")
    (fresh / "models").mkdir()  # half of what tells a page: someone's networks
    (fresh / "models/models").mkdir()
    (fresh / "models/models/index.json").write_text("{}")
    for name in ("docs", "file", "models"):
        before = sorted(fresh.rglob("*"))
        assert built(fresh / name) == 2 and sorted(fresh.rglob("*")) == before
        said = capsys.readouterr().err
        assert f"{fresh / name} is no page that this program built" in said
        assert len(said.splitlines()) == 1


@pytest.mark.parametrize("name", [".git", "CNAME"])
def test_what_lies_beside_a_page_is_not_replaced_either(fresh, from_npm, capsys, name):
    """As in a checkout that a host serves."""
    assert built(fresh / "page") == 0
    (fresh / "page" / name).mkdir()
    assert built(fresh / "page") == 2 and (fresh / "page" / name).exists()
    assert f"{fresh}/page has {name} beside a page" in capsys.readouterr().err


def test_networks_delete_their_own_files_alone(tmp_path, monkeypatch):
    """Files that an earlier index lists go; another's in the same folder stay."""
    for name in ("old.onnx", "mine.onnx", "new.onnx"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "index.json").write_text(json.dumps({"files": [
        {"file": name, "sha256": ""} for name in ("old.onnx", "new.onnx")]}))
    monkeypatch.setattr(networks, "available", lambda cfg: [networks.Source("new.onnx", {})])
    monkeypatch.setattr(networks, "make",
                        lambda cfg, source, earlier: {"file": source.file, "bytes": 1})
    networks.main(["--out", str(tmp_path)])
    assert {path.name for path in tmp_path.glob("*.onnx")} == {"mine.onnx", "new.onnx"}


def test_forms_and_page_agree_on_names():
    """The worker asks for the input and reads the outputs by the names that forms.py gives."""
    worker = (ROOT / "web/js/worker.js").read_text()
    assert f"run({{ {forms.INPUT}: input }})" in worker
    for one in INDEX["files"]:
        session = onnxruntime.InferenceSession(ROOT / "web/models" / one["file"])
        outputs = [output.name for output in session.get_outputs()]
        segments = one["classes"] == list(data.FACADE_CLASSES)
        assert outputs == list(forms.OUTPUTS[:1 if segments else 2])


def test_a_kept_runtime_of_other_bytes_is_not_used(fresh, from_npm):
    build.runtime(fresh / "kept")
    (fresh / "kept/ort.wasm.min.mjs").write_bytes(b"another's")
    assert build.runtime(fresh / "kept") == from_npm
    assert (fresh / "kept/ort.wasm.min.mjs").read_bytes() == from_npm["ort.wasm.min.mjs"]


def test_the_verdicts_are_those_of_the_study(tmp_path):
    accuracies = {"maxpool-2-32": 0.9, "maxpool-2-32-noact": 0.92, "stride-2-32": 0.8}
    for row, accuracy in accuracies.items():
        runs(tmp_path, "table1", row, [{"accuracy": x} for x in wobble(accuracy)])
    tables = {name: study.load_records(tmp_path / "desk" / name, "desk") for name in study.REPORT}
    judged, found = study.judge(tables), build.verdicts(tables, "desk")
    assert [one["claim"] for one in found] == [*judged]
    for one in found:
        whole = judged[one["claim"]]
        assert (one["verdict"], one["p"]) == (whole["verdict"], whole["p_holm"])
        parts = [part[1:] for part in study.CLAIMS[one["claim"]][1]]
        keys = ("row", "other", "metric", "low", "high")
        assert {tuple(effect[key] for key in keys) for effect in one["effects"]} <= {*parts}
    assert found[0]["effects"][0]["row"] == "stride-2-32"  # what decides against C1
    with pytest.raises(BadInput, match="has no records"):
        build.tables(tmp_path)  # of a protocol that has one table alone


def test_each_seeds_own_value_is_its_records():
    shown, rows = build.table(ROOT / "results", "desk", "table1")
    for row in shown["rows"]:
        for name, (_, split, key) in study.COLUMNS["table1"].items():
            assert row["columns"][name]["own"] == pytest.approx({
                str(seed): 100 * record["metrics"][split][key]
                for seed, record in rows[row["row"]].items()})
