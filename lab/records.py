"""Run records: written, compared, and read back as rows of seeds that belong together.

A study's folder holds ROW/seed<k>.json, and seed<k>.npz with values per held-out image or group.
Rows are {row: {seed: record}}, where a record also knows the path that it was read from.
"""

import functools
import io
import json
import math
import re
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
        if not isinstance(record["config"], dict) or not isinstance(record["metrics"], dict):
            raise TypeError("config and metrics must be objects")
        return {name: record[name] for name in ("config", "data", "metrics", *record)}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
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


def load(folder: Path, protocol: str, order: Iterable[str] = (),
         shared: Iterable[str] = ()) -> dict[str, dict[int, dict]]:
    """{row: {seed: record}} of a folder; the rows in `order` first, then any others.

    BadInput names a record that does not belong: of another protocol, other data, another value of
    a setting that all rows must share, or other settings than its own row's other seeds.
    """
    rows, known = {}, list(order)
    names = sorted(path.name for path in folder.glob("*/"))
    for row in [row for row in known if row in names] + [row for row in names if row not in known]:
        for path in sorted(folder.glob(f"{row}/seed*.json")):
            record = read(path)
            if type(seed := record["config"].get("seed")) is not int:
                raise BadInput(f"{path} is no run record, or damaged (seed {seed}); delete it")
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
                               f"a row may differ by its own switch alone")
            if record["data"] != first_of_all["data"]:
                raise BadInput(f"{path} was made on other data than {first_of_all['path']}")
            if differing(record, first).keys() - {"seed"}:
                raise BadInput(f"{path} has another configuration than {first['path']}, a seed of "
                               f"the same row")
    return rows


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


def refuse_other(path: Path, stored: dict, ours: dict) -> None:
    """BadInput if what lies at the path was made with other settings or of other data."""
    found = differing(stored, ours)
    if stored["data"] != ours["data"]:
        found["data"] = stored["data"], ours["data"]
    if found:
        other = "; ".join(f"{key} {theirs} there, {mine} here"
                          for key, (theirs, mine) in found.items())
        raise BadInput(f"{path} was made with other settings ({other}); choose another --out, "
                       f"or delete it")


def each_of(rows: dict[str, dict[int, dict]]) -> list[dict]:
    return [record for seeds in rows.values() for record in seeds.values()]


def caveat(records: Iterable[dict]) -> str:
    """What a table or figure must say of the data that its records are made of, if anything."""
    drawn = any(record.get("about_data", {}).get("synthetic") for record in records)
    return "SYNTHETIC data: drawn, not photographed." if drawn else ""


def arrays_file(record: dict) -> Path:
    return Path(record["path"]).with_suffix(".npz")


@functools.cache
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


def pairs_of(rows: dict, row: str, other: str) -> list[tuple[dict, dict]]:
    """The records of two rows by the seeds that both have, in order."""
    ours, theirs = rows.get(row, {}), rows.get(other, {})
    return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def paired(rows: dict, row: str, other: str | None, split: str, key: str) -> list[float]:
    """A metric's differences row - other, by the seeds that both have; alone, the row's values."""
    value = lambda record: record["metrics"][split].get(key)  # None: from before it was measured
    if other is None:
        found = [value(record) for _, record in sorted(rows.get(row, {}).items())]
    else:
        pairs = [(value(a), value(b)) for a, b in pairs_of(rows, row, other)]
        found = [None if None in pair else pair[0] - pair[1] for pair in pairs]
    return [value for value in found if value is not None]


def mean_arrays(seeds: dict[int, dict], names: tuple[str, ...]) -> dict[str, np.ndarray]:
    """Means over a row's seeds of arrays that lie beside its records."""
    loaded = [load_arrays(arrays_file(record)) for record in seeds.values()]
    return {name: np.mean([arrays[name] for arrays in loaded], 0) for name in names}


def summed_confusion(seeds: dict[int, dict], classes: int) -> np.ndarray:
    """int64 (classes, classes): true class by predicted one, over all seeds of a row."""
    total = np.zeros((classes, classes), np.int64)
    for record in seeds.values():
        arrays = load_arrays(arrays_file(record))
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
