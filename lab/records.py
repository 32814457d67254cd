"""Run records: written, compared, and read back as rows of seeds that belong together.

A study's folder holds ROW/seed<k>.json, and seed<k>.npz with values per held-out image or group.
Rows are {row: {seed: record}}, where a record also knows the path that it was read from.
"""

import functools
import io
import json
import math
import re
import typing
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lab.files import BadInput, jsonable, write_atomic
from lab.statistics import Part, half_width, own_spread

UNKNOWN = object()  # a value that no one can know any more


def read(path: Path) -> dict:
    """A run record. BadInput if the file is anything else."""
    try:
        record = json.loads(path.read_text())
        for one in (record["config"], record["metrics"], *record["metrics"].values()):
            if not isinstance(one, dict):
                raise TypeError("config, metrics and what they hold of a split must be objects")
        return {name: record[name] for name in ("config", "data", "metrics", *record)}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise BadInput(f"{path} is no run record, or damaged ({type(error).__name__}); "
                       f"delete it") from error


def check_trained(path: Path, record: dict) -> None:
    """BadInput names the first part of a finished run's record that no training writes.

    A checkpoint carries its record, and what is drawn, measured or exported trusts it.
    """
    number = lambda value: type(value) in (int, float) and math.isfinite(value)
    whole = lambda value, low, high: type(value) is int and low <= value <= high
    part = lambda place: functools.reduce(lambda found, name: found[name], place.split("."), record)
    about = lambda name: part(f"about_data.{name}")
    several = lambda name, right: (type(about(name)) in (list, tuple) and len(about(name)) > 0
                                   and all(map(right, about(name))))
    coloured = lambda: about("task") == "segmentation"
    rules = {
        "config": lambda: type(part("config")) is dict,
        "config.seed": lambda: whole(part("config.seed"), 0, math.inf),  # part of file names
        "config.batch": lambda: whole(part("config.batch"), 1, math.inf),
        "config.split": lambda: part("config.split") in ("full", "dev"),
        "about_data": lambda: type(part("about_data")) is dict,
        "about_data.name": lambda: about("name").isprintable(),
        "about_data.task": lambda: (about("task") in ("classification", "segmentation")
                                    and coloured() == bool(about("palette"))),
        "about_data.size": lambda: whole(about("size"), 1, 1 << 13),
        "about_data.classes": lambda: several(
            "classes", lambda name: name.isprintable() and "," not in name),
        "about_data.palette": lambda: not coloured() or several(
            "palette", lambda colour: len(bytes(colour)) == 3
        ) and len(about("palette")) == len(about("classes")),
        "about_data.mean": lambda: several("mean", number),
        "about_data.std": lambda: several("std", lambda value: number(value) and value > 0)
        and len(about("std")) == len(about("mean")),
        "environment": lambda: type(part("environment")) is dict,
        "environment.precision": lambda: part("environment.precision") in (
            "float32", "bfloat16", "float16"),
        "data": lambda: type(part("data")) is str,
        "weights_sha256": lambda: type(part("weights_sha256")) is str,
        "metrics": lambda: all(type(part("metrics")[name]) is dict for name in (
            "train", "test" if part("config.split") == "full" else "val"))}
    for place, right in rules.items():
        try:
            good = right()
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            good = False
        if not good:
            raise BadInput(f"{path}: its record is damaged ({place}); train the model again")


def write(path: Path, record: dict, arrays: dict[str, np.ndarray] | None = None) -> None:
    """Write the arrays beside a record, and then the record: where it exists, all is there."""
    if arrays:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_atomic(path.with_suffix(".npz"), buffer.getbuffer())
    write_atomic(path, encoded(record))


def encoded(record: dict) -> bytes:
    """A record as it is written."""
    return (json.dumps(jsonable(record), indent=1) + "\n").encode()


def seed_files(row: Path) -> list[Path]:
    """The records in a row's folder, none where there is none: files called seed<k>.json."""
    return [path for path in (sorted(row.iterdir()) if row.is_dir() else ())
            if re.fullmatch(r"seed(0|[1-9][0-9]*)\.json", path.name)]


def load(folder: Path, protocol: str, order: Iterable[str] = (),
         shared: Iterable[str] = ()) -> dict[str, dict[int, dict]]:
    """{row: {seed: record}} of a folder; the rows in `order` first, then any others.

    Records are `seed_files`, and nothing else is. BadInput names a record that does not belong:
    without metrics of the test split, of another protocol, other data, another value of a setting
    that all rows must share, or other settings than its own row's other seeds; and one whose arrays
    are another's.
    """
    rows, known = {}, list(order)
    names = sorted(path.name for path in folder.glob("*/"))
    for row in [row for row in known if row in names] + [row for row in names if row not in known]:
        for path in seed_files(folder / row):
            record = read(path)
            if type(seed := record["config"].get("seed")) is not int:
                raise BadInput(f"{path} is no run record, or damaged (seed {seed}); delete it")
            if path.name != f"seed{seed}.json":
                raise BadInput(f"{path} is of seed {seed} by its own settings: name it "
                               f"seed{seed}.json, or delete it")
            if "test" not in record["metrics"]:
                raise BadInput(f"{path} has no metrics of the test split, but of "
                               f"{', '.join(record['metrics']) or 'none'}: tables and claims are "
                               f"of runs with --split full")
            rows.setdefault(row, {})[seed] = {**record, "path": str(path)}
    first_of_all = next(iter(each_of(rows)), None)
    for seeds in rows.values():
        first = next(iter(seeds.values()))
        for record in seeds.values():
            path = record["path"]
            if record["config"].get("protocol") != protocol:
                raise BadInput(f"{path} is of protocol {record['config'].get('protocol')}, this is "
                               f"the {protocol} table")
            for key, (ours, theirs) in differing(record, first_of_all, shared).items():
                raise BadInput(f"{path} has {key} {ours}, but {first_of_all['path']} has {theirs}: "
                               f"all rows of a table share it")
            if record["data"] != first_of_all["data"]:
                raise BadInput(f"{path} was made on other data than {first_of_all['path']}")
            if switches(record, first):
                raise BadInput(f"{path} has another configuration than {first['path']}, a seed of "
                               f"the same row")
    tell_apart(each_of(rows))
    return rows


def tell_apart(records: list[dict]) -> None:
    """BadInput for two records of different metrics whose arrays are the same: a copied file."""
    seen = {}
    for record in records:
        try:
            with zipfile.ZipFile(arrays_file(record)) as archive:
                sums = tuple(sorted((entry.filename, entry.CRC) for entry in archive.infolist()))
        except (OSError, zipfile.BadZipFile, NotImplementedError):
            continue  # none, or damaged: whoever reads them says so
        other = seen.setdefault(sums, record)
        if other["metrics"]["test"] != record["metrics"]["test"]:
            raise BadInput(f"{arrays_file(record)} holds the same arrays as {arrays_file(other)}, "
                           f"whose record has other metrics: delete the record of the one that was "
                           f"copied, and run it again")


def differing(a: dict, b: dict, keys: Iterable[str] | None = None) -> dict[str, tuple]:
    """{setting: its values} of those settings, of `keys` or of all, in which two records differ.

    What was made before a setting was added was made with its default, which the other record
    knows. Records from before 2026-11-27 know no defaults: a setting that only one of two such
    records has is not compared.
    """
    found = {}
    for key in {**a["config"], **b["config"]} if keys is None else keys:
        values = tuple(one["config"].get(key, other.get("defaults", {}).get(key, UNKNOWN))
                       for one, other in ((a, b), (b, a)))
        if UNKNOWN not in values and values[0] != values[1]:
            found[key] = values
    return found


def switches(record: dict, other: dict) -> dict[str, tuple]:
    """The settings, beside the seed, in which two rows differ: see `differing`."""
    return {key: values for key, values in differing(record, other).items() if key != "seed"}


def refuse_other(path: Path, stored: dict, ours: dict, instead: str = "") -> None:
    """BadInput if what lies at the path was made with other settings, data or first weights.

    `instead` is what to do then, where that is more than about this one run.
    """
    found = differing(stored, ours)
    for key in {"data", "start_sha256"} & ours.keys() & stored.keys():
        if stored[key] != ours[key]:
            found[key] = stored[key], ours[key]
    if found:
        other = "; ".join(f"{key} {theirs} there, {mine} here"
                          for key, (theirs, mine) in found.items())
        instead = instead or f"choose another --out, or delete {path}"
        raise BadInput(f"{path} was made with other settings ({other}); {instead}")


def each_of(rows: dict[str, dict[int, dict]]) -> list[dict]:
    return [record for seeds in rows.values() for record in seeds.values()]


def caveat(records: Iterable[dict]) -> str:
    """What a table or figure must say of the data that its records are made of, if anything."""
    drawn = any(record.get("about_data", {}).get("synthetic") for record in records)
    return "SYNTHETIC data: drawn, not photographed." if drawn else ""


def need(record: dict, *names: str, kind: type | tuple = object) -> typing.Any:
    """record[name][name]..., which every run writes. BadInput where it is not there."""
    found = record
    for i, name in enumerate(names):
        if not isinstance(found, dict) or name not in found:
            raise BadInput(f"{record['path']} has no {' '.join(names[:i + 1])}: it is damaged, or "
                           f"no record of this kind; delete it and run it again")
        found = found[name]
    if not isinstance(found, kind):
        raise BadInput(f"{record['path']} has {' '.join(names)} {found!r}: it is damaged; delete "
                       f"it and run it again")
    return found


def value_of(record: dict, split: str, key: str) -> float:
    """A metric of a record; NaN where it is null, or from before it was measured."""
    value = record.get("metrics", {}).get(split, {}).get(key)
    if value is None:
        return math.nan
    if type(value) not in (int, float) or math.isinf(value):
        raise BadInput(f"{record['path']} has {split} {key} {value!r}, which is no number: it is "
                       f"damaged; delete it and run it again")
    return float(value)


def arrays_file(record: dict) -> Path:
    return Path(record["path"]).with_suffix(".npz")


COUNTS = "hits", "misses", "groups"  # pixels (groups, classes, bins), and what the groups are


def arrays_of(record: dict, needed: Iterable[str] = ()) -> dict[str, np.ndarray]:
    """The arrays beside a record. BadInput where they lack a needed one, or cannot be its own."""
    path, arrays = arrays_file(record), load_arrays(arrays_file(record))
    for name in needed:
        if name not in arrays:
            raise BadInput(f"{path} holds no {name}, but {', '.join(sorted(arrays))}: it is of "
                           f"another kind of run")
    for name, array in arrays.items():
        if array.dtype.kind not in "biuf":
            raise BadInput(f"{path} has {name} of {array.dtype}: it is no run's")
    if not arrays.keys().isdisjoint(COUNTS):
        shapes = {name: arrays[name].shape for name in COUNTS if name in arrays}
        of_counts = shapes.get("hits", ())
        expected = {"hits": of_counts, "misses": of_counts, "groups": of_counts[:1]}
        for name, shape in shapes.items():
            if len(of_counts) != 3 or shape != expected[name]:
                raise BadInput(f"{path} has {name} of shape {shape}, and hits of {of_counts}: it "
                               f"is damaged; delete {record['path']} and run it again")
        return arrays
    images = record.get("metrics", {}).get("test", {}).get("images")
    for name in ("accuracy", "prediction", "target", "group"):
        if name not in arrays:
            continue
        if arrays[name].ndim != 1:
            raise BadInput(f"{path} has {name} of shape {arrays[name].shape}, not one value an "
                           f"image")
        images = len(arrays[name]) if images is None else images
        if len(arrays[name]) != images:
            raise BadInput(f"{path} has {len(arrays[name])} values of {name}, the record {images} "
                           f"images: it is another run's; delete {record['path']} and run it "
                           f"again")
    return arrays


@functools.lru_cache(16)  # those of a row and its base: a study's may be more than the memory
def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """The arrays per image or group that lie beside a record. BadInput if they are damaged."""
    try:
        # np.load checks no sum where a damaged header asks for too little, nor what a damaged
        # comment hides
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None or any(entry.comment + entry.extra
                                                    for entry in archive.infolist()):
                raise zipfile.BadZipFile("checksum")
        with np.load(path) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy, zipfile and zlib each raise their own for a damaged file
        raise BadInput(f"{path} is damaged ({type(error).__name__}); delete it and its record, "
                       f"then run it again") from error


def pairs_of(rows: dict, row: str, other: str | None) -> list[tuple[dict, dict | None]]:
    """The records of two rows by the seeds that both have, in order; alone, a row's and None."""
    ours, theirs = rows.get(row, {}), rows.get(other, {})
    both = ours.keys() & theirs.keys() if other else ours
    return [(ours[seed], theirs.get(seed)) for seed in sorted(both)]


def paired(rows: dict, row: str, other: str | None, split: str, key: str) -> list[float]:
    """A metric's differences row - other, by the seeds that both have; alone, the row's values."""
    found = [value_of(a, split, key) - (value_of(b, split, key) if b else 0.0)
             for a, b in pairs_of(rows, row, other)]
    return [value for value in found if not math.isnan(value)]


def training_seconds(runs: dict[int, dict]) -> float:
    """Mean over a row's runs, or, of measurements, over the runs that they are of."""
    of = lambda record: ("trained",) if "trained" in record else ()
    return float(np.mean([need(record, *of(record), "train_seconds", kind=(int, float))
                          for record in runs.values()]))


def mean_arrays(seeds: dict[int, dict], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Means over a row's seeds of arrays that lie beside its records."""
    loaded = [arrays_of(record, names) for record in seeds.values()]
    return {name: np.mean([arrays[name] for arrays in loaded], 0) for name in names}


def summed_confusion(seeds: dict[int, dict], classes: int) -> np.ndarray:
    """int64 (classes, classes): true class by predicted one, over all seeds of a row."""
    total = np.zeros((classes, classes), np.int64)
    for record in seeds.values():
        arrays = arrays_of(record, ("target", "prediction"))
        np.add.at(total, (arrays["target"], arrays["prediction"]), 1)
    return total


# ---- cells of a Markdown table ----

def plain(text: str) -> str:
    """A name, of a folder say, that in a Markdown table neither ends the cell nor is HTML."""
    return re.sub(r"[|<>`\r\n]", "?", text)


def number(mean: float, half: float, signed: bool) -> str:
    """"+0.42 ± 0.31"; the interval is missing where there is one seed."""
    value = f"{mean:+.2f}" if signed else f"{mean:.2f}"
    return value if math.isnan(half) else f"{value} ± {half:.2f}"


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of values over seeds, in percent, and half of the 95 % interval by their spread."""
    variance, dof = own_spread(100 * np.array(values))
    return 100 * float(np.mean(values)), float(half_width((Part(variance / len(values), dof),)))


def cell(values: list[float], signed: bool) -> str:
    return number(*interval(values), signed)
