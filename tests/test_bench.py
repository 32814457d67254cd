"""The benchmark of exported forms: what it measures, leaves out, shows and refuses."""

import dataclasses
import json

import bench_inference
import pytest
import tools
import torch

from lab import cli


def test_bench_end_to_end(seg, runner, tmp_path, monkeypatch):
    """One short round: a record that holds what the table shows, the table, the plot."""
    rows = ("eager", "eager bfloat16", "TorchScript", "AOTInductor", "ONNX Runtime int8",
            "C++ TorchScript", "C++ AOTInductor")
    monkeypatch.setattr(bench_inference, "BACKENDS",
                        {name: bench_inference.BACKENDS[name] for name in rows})

    def measure(cfg, name, apart=bench_inference.measure_apart):
        # one process shows that processes work
        if name.startswith("C++") or name == "TorchScript":
            return apart(cfg, name)
        return bench_inference.measure(dataclasses.replace(cfg, only=name))

    monkeypatch.setattr(bench_inference, "measure_apart", measure)
    # so that any CPU has the rows
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    argv = ["--checkpoint", seg / "seed0.pt", "--data-root", seg / "root", "--size", "32",
            "--rounds", "1", "--seconds", "0.01", "--threads", "1", "--device", "cpu",
            "--record", tmp_path / "bench/inference-here.json"]
    assert cli.guard(lambda: bench_inference.main([*map(str, argv)])) == 0
    record = json.loads((tmp_path / "bench/inference-here.json").read_text())
    assert [row["name"] for row in record["results"]] == [*rows]
    for row in record["results"]:
        assert row["batch1"]["median_ms"] <= row["batch1"]["p95_ms"]
        assert row["batch8"]["passes"] >= 3
        exact = record["parity"]["forms"]["eager"]["map"]
        assert row["quality"]["map"] == pytest.approx(exact, abs=0.05)
    assert record["results"][0]["batch1"]["ratio"] == 1
    model = record["model"]
    assert model.startswith("HourGlass(hourglasses=1, width=8, ")
    table = (tmp_path / "bench/inference.md").read_text()
    assert table.startswith(f"**{': '.join(bench_inference.machine_of(record))}**\n\n| form |")
    assert f"| AOTInductor | {record['results'][3]['batch1']['median_ms']:.1f} |" in table
    assert f"\n{model}, trained on mini facade, 32 pixels a side" in table
    assert "| ONNX Runtime int8 (CPU) |" in table and record["results"][4]["provider"] == "CPU"
    assert (tmp_path / "bench/inference.png").stat().st_size > 10_000


def test_the_benchs_figure_tells_every_form_apart(monkeypatch):
    """Many have one metric and nearly one speed: no marker lies on another's, on any machine."""
    drawn = []
    monkeypatch.setattr(bench_inference.figures, "save", lambda figure, path: drawn.append(figure))
    machines = [json.loads(path.read_text())
                for path in sorted((tools.REPO / "results/bench").glob("inference-*.json"))]
    bench_inference.draw(machines, None)
    assert len(drawn[0].axes) == len(machines) >= 1
    labels = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    for ax, record in zip(drawn[0].axes, machines, strict=True):
        there = {}  # form -> the ratio its marker stands at
        for line in ax.lines:
            if line.get_marker() == "o":
                there[labels[line.get_ydata()[0]]] = line.get_xdata()[0]
        assert there == {row["name"]: row["batch1"]["ratio"] for row in record["results"]}
        assert record["environment"]["device"] in ax.get_title()
    explained = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert explained == ["float32", "bfloat16", "int8", "OpenVINO, a peer"]


def test_what_the_cpu_only_emulates_is_not_timed(seg, monkeypatch):
    cfg = bench_inference.Config(checkpoint=str(seg / "seed0.pt"))
    left_out = lambda name: bench_inference.hindrance(cfg, name, torch.device("cpu"))
    for native in (True, False):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
        assert ("only emulates bfloat16" in (left_out("eager bfloat16") or "")) is not native
        assert left_out("eager") is None


def test_bench_refusals(seg, tmp_path, capsys):
    for flags, message in (
            (["--checkpoint", seg / "seed0.pt", "--models", tmp_path], "parity.json is missing"),
            ([], "--checkpoint is missing"),
            (["--checkpoint", "x", "--size", "0"], "--size 0: must be"),
            (["--checkpoint", "x", "--only", "caffe"], "--only caffe: must be one of eager,")):
        assert cli.guard(lambda: bench_inference.main([*map(str, flags)])) == 2
        assert message in capsys.readouterr().err
