"""Run records of a study, read back: rows of seeds that belong together, and the arrays beside them.

A study's folder holds ROW/seed<k>.json, and seed<k>.npz with values per held-out image or group. Rows are
{row: {seed: record}}, where a record also knows the path that it was read from.
"""

import functools
import json
import math
import re
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from lab.files import BadInput
from lab.statistics import Part, half_width, own_spread


def load(folder: Path, protocol: str, order: Iterable[str] = (),
         shared: Iterable[str] = ()) -> dict[str, dict[int, dict]]:
    """{row: {seed: record}} of a folder; the rows in `order` first, then any others.

    BadInput names a record that does not belong: of another protocol, other data, another value of a
    setting that all rows must share, or another configuration than its own row's other seeds. A setting
    that one of two records predates is not compared.
    """
    rows, known = {}, list(order)
    found = sorted(path.name for path in folder.iterdir() if path.is_dir()) if folder.is_dir() else []
    for row in [row for row in known if row in found] + [row for row in found if row not in known]:
        for path in sorted(folder.glob(f"{row}/seed*.json")):
            try:
                record = json.loads(path.read_text())
                seeds = rows.setdefault(row, {})
                seeds[record["config"]["seed"]] = {**record, "data": record["data"], "path": str(path)}
            except (ValueError, KeyError, TypeError, RecursionError) as error:
                raise BadInput(f"{path} is no run record, or damaged ({type(error).__name__}); "
                                 f"delete it") from error
    first_of_all = next(iter(each_of(rows)), None)
    for seeds in rows.values():
        first = next(iter(seeds.values()))
        for record in seeds.values():
            config, path = record["config"], record["path"]
            if config.get("protocol") != protocol:
                raise BadInput(f"{path} is of protocol {config.get('protocol')}, this is the "
                                 f"{protocol} table")
            for key in differing(config, first_of_all["config"], shared):
                raise BadInput(f"{path} has {key} {config[key]}, but {first_of_all['path']} has "
                               f"{first_of_all['config'][key]}: a row may differ by its own switch alone")
            if record["data"] != first_of_all["data"]:
                raise BadInput(f"{path} was made on other data than {first_of_all['path']}")
            if differing(config, first["config"], config.keys() - {"seed"}):
                raise BadInput(f"{path} has another configuration than {first['path']}, a seed of "
                                 f"the same row")
    return rows


def differing(a: dict, b: dict, keys: Iterable[str]) -> list[str]:
    """The settings of `keys` in which two configurations differ, of those that both know."""
    return [key for key in keys if key in a and key in b and a[key] != b[key]]


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
        # np.load checks no sum where a damaged header asks for too little, nor what a damaged comment hides
        with zipfile.ZipFile(path) as archive:
            if archive.testzip() is not None or any(entry.comment + entry.extra
                                                    for entry in archive.infolist()):
                raise zipfile.BadZipFile("checksum")
        with np.load(path) as arrays:
            return dict(arrays)
    except FileNotFoundError:
        raise
    except Exception as error:  # NumPy, zipfile and zlib each raise their own for a damaged file
        raise BadInput(f"{path} is damaged ({type(error).__name__}); delete it and its record, then run "
                         f"it again") from error


def pairs_of(rows: dict, row: str, other: str) -> list[tuple[dict, dict]]:
    """The records of two rows by the seeds that both have, in order."""
    ours, theirs = rows.get(row, {}), rows.get(other, {})
    return [(ours[seed], theirs[seed]) for seed in sorted(ours.keys() & theirs.keys())]


def paired(rows: dict, row: str, other: str | None, split: str, key: str) -> list[float]:
    """A metric's differences row - other, by the seeds that both have; without `other` the row's own values."""
    if other is None:
        return [record["metrics"][split][key] for _, record in sorted(rows.get(row, {}).items())]
    return [a["metrics"][split][key] - b["metrics"][split][key] for a, b in pairs_of(rows, row, other)]


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
    """The name of a folder or a device, which in a Markdown table may neither end the cell nor be HTML."""
    return re.sub(r"[|<>`\r\n]", "?", text)


def number(mean: float, half: float, signed: bool) -> str:
    """"+0.42 ± 0.31"; the interval is missing where there is one seed."""
    return (f"{mean:+.2f}" if signed else f"{mean:.2f}") + ("" if math.isnan(half) else f" ± {half:.2f}")


def interval(values: list[float]) -> tuple[float, float]:
    """Mean of values over seeds, in percent, and half of the 95 % interval that their spread gives."""
    variance, dof = own_spread(100 * np.array(values))
    return 100 * float(np.mean(values)), float(half_width((Part(variance / len(values), dof),)))


def cell(values: list[float], signed: bool) -> str:
    return number(*interval(values), signed)
