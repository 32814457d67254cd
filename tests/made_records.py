"""Run records of made-up studies, whose answers are known."""

import json

import numpy as np

import metrics
import study

SEEDS = range(6)
BASE = dict(protocol="desk", split="full", epochs=2, batch=128, lr=1e-3, weight_decay=1e-4,
            warmup=0.0, precision="auto", compile=False, train_images=20000, depth=2, width=32,
            down="maxpool")


def write_record(root, row, seed, test, train=0.9, data="d", **config):
    """One run of Table 1 as the scripts leave it, next to no error by the choice of images."""
    folder = root / "desk/table1" / row
    folder.mkdir(parents=True, exist_ok=True)
    record = {"config": {**BASE, "seed": seed, **config}, "data": data, "parameters": 1_500_000,
              "multiply_adds": 73_300_000, "train_seconds": 10.0,
              "environment": {"device": "a CPU"}, "curve": {"loss": [2.0, 1.0]},
              "metrics": {"test": {"accuracy": test}, "train": {"accuracy": train}}}
    path = folder / f"seed{seed}.json"
    path.write_text(json.dumps(record))
    np.savez_compressed(path.with_suffix(".npz"), accuracy=np.full(100_000, test))
    return path


def wobble(center, size=0.004):
    return [center + size * (seed - 2.5) / 5 for seed in SEEDS]


def histograms(map_, wgap, photos=67):
    """Counts of five classes whose AP are the worst and four alike; photos hardly differ."""
    hits, misses = np.zeros((2, photos, 5, metrics.BINS), np.int32)
    for c, ap in enumerate([wgap, *[(5 * map_ - wgap) / 4] * 4]):
        hits[:, c, 100] = round(1e6 * ap) + np.arange(photos) % 2
        misses[:, c, 100] = 1e6 - hits[:, c, 100]
    return {"hits": hits, "misses": misses, "groups": np.arange(photos)}


def runs(root, table, row, scores):
    """Records of one row whose test metrics are scores[seed], and arrays that agree with them."""
    pick = np.random.default_rng(list(row.encode()))
    for seed, score in zip(SEEDS, scores):
        folder = root / "desk" / table / row
        folder.mkdir(parents=True, exist_ok=True)
        if table == "table1":
            score = {"accuracy": round(score["accuracy"], 4)}
            right = pick.permutation(10_000) < 10_000 * score["accuracy"] - 0.5
            arrays = {"prediction": right.astype(np.uint8), "target": np.ones(10_000, np.uint8)}
        else:
            arrays = histograms(score["map"], score.get("wgap", score["map"]))
        (folder / f"seed{seed}.json").write_text(json.dumps({
            "config": {"protocol": "desk", "seed": seed, "row": row}, "data": "d",
            "metrics": {"test": score}}))
        np.savez(folder / f"seed{seed}.npz", **arrays)


def table(root, *flags):
    """{row: the cells of its line} of Table 1 as study.py writes it."""
    study.main(["table1", "--protocol", "desk", "--results", str(root), *flags])
    first = (root / "desk/table1.md").read_text().split("\n\n")[0]
    return {line.split("`")[1]: [cell.strip() for cell in line.split("|")[2:-1]]
            for line in first.splitlines() if "`" in line}


def verdicts(root):
    tables = {table: study.load_records(root / "desk" / table, "desk") for table in study.REPORT}
    if (root / "desk/attention").exists():
        tables["attention"] = study.load_records(root / "desk/attention", "desk")
    return study.judge(tables)
