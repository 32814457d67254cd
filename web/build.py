"""The page as a static site: `make page` runs this and puts it into build/page/.

    PYTHONPATH=. python web/build.py [--out build/page] [--results results]

Everything in web/ but Python is copied; ONNX Runtime's WebAssembly comes out of its npm package,
at the version below and with these digests; data/tables.json is made of the committed records by
study.py. Any static host serves the folder, at any path.
"""

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import study
from lab import claims, cli, records
from lab.fetch import npm_package, read_tar
from lab.files import BadInput, jsonable, write_atomic

SOURCE = Path(__file__).parent
PACKAGE, VERSION = "onnxruntime-web", "1.30.0"
RUNTIME = {
    "ort.wasm.min.mjs":
        "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs":
        "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm":
        "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2"}
PROTOCOLS = ("report", "desk")  # the most telling first


# ---- the runtime ----

def from_npm(folder: Path, kept: Path) -> dict[str, bytes]:
    """The runtime's files out of its package. BadInput where npm is missing or cannot get it."""
    by_hand = f"put {', '.join(RUNTIME)} into {kept}/ by hand"
    if not shutil.which("npm"):
        raise BadInput(f"no npm, which fetches {PACKAGE} {VERSION}: install it (Debian: apt-get "
                       f"install npm), or {by_hand}")
    inside = {f"package/dist/{name}": name for name in RUNTIME}
    try:
        return dict(read_tar(npm_package(f"{PACKAGE}@{VERSION}", folder), inside.get))
    except (subprocess.SubprocessError, StopIteration) as error:
        said = (getattr(error, "stderr", b"") or b"").decode(errors="replace").split("\n")
        reason = next((line for line in said if line.startswith("npm ")), type(error).__name__)
        raise BadInput(f"npm cannot get {PACKAGE} {VERSION} ({reason[:120]}); {by_hand}"
                       ) from error


def runtime(kept: Path) -> dict[str, bytes]:
    """The runtime's files, of these digests; those that an earlier build kept are used again."""
    def right(found: dict[str, bytes]) -> bool:
        return {name: hashlib.sha256(content).hexdigest()
                for name, content in found.items()} == RUNTIME

    found = {name: (kept / name).read_bytes() for name in RUNTIME if (kept / name).exists()}
    if not right(found):
        with tempfile.TemporaryDirectory() as folder:
            found = from_npm(Path(folder), kept)
        if not right(found):
            raise BadInput(f"{PACKAGE} {VERSION} has other files than web/build.py has digests of")
        kept.mkdir(parents=True, exist_ok=True)
        for name, content in found.items():
            write_atomic(kept / name, content)
    return found


# ---- the tables ----

def table(folder: Path, protocol: str, name: str) -> tuple[dict, dict]:
    """One table of a protocol as the page shows it, and the rows of records that it is made of."""
    rows = study.load_records(folder / protocol / name, protocol)
    base = next(iter(study.REPORT[name]))
    shown, seeds_alone = [], set()
    for row in [*study.REPORT[name], *(row for row in rows if row not in study.REPORT[name])]:
        label, reported = study.REPORT[name].get(row, (row, {}))
        runs, columns = rows.get(row, {}), {}
        for column, (heading, split, key) in study.COLUMNS[name].items():
            other = None if row == base else base
            ours = study.estimate(rows, row, other, split, key)
            if split == "test" and ours.seeds_alone:
                seeds_alone.add(heading)
            value = reported.get(column)
            own = {str(seed): 100 * records.value_of(record, split, key)
                   for seed, record in sorted(runs.items())}
            own = {seed: value for seed, value in own.items() if value == value}  # no NaN
            columns[column] = {"values": ours.values, "own": own,
                               "mean": ours.mean, "half": ours.half, "report": value,
                               "holds": None if value is None else ours.holds(value)}
        one = next(iter(runs.values()), {})
        shown.append({"row": row, "label": label, "base": row == base, "columns": columns,
                      "seeds": len(runs),
                      "parameters": one.get("parameters"),
                      "command": f"make {name}/{row} PROTOCOL={protocol}"})
    made_of = records.each_of(rows)
    headings = {column: heading for column, (heading, _, _) in study.COLUMNS[name].items()}
    seeds = max((len(runs) for runs in rows.values()), default=0)
    return {"columns": headings, "rows": shown, "seeds": seeds, "seeds_alone": sorted(seeds_alone),
            "records": len(made_of), "caveat": records.caveat(made_of)}, rows


def verdicts(tables: dict[str, dict], protocol: str) -> list[dict]:
    """The claims, each with its verdict and its effects, the one that decides first."""
    found = []
    for name, one in study.judge(tables).items():
        says, parts = study.CLAIMS[name]
        pairs = claims.deciding_first(one, parts) or zip(one["effects"], parts)
        shown = ("row", "other", "metric", "mean", "half", "seeds")
        found.append({"claim": name, "says": says, "verdict": one["verdict"], "p": one["p_holm"],
                      "command": f"make claims PROTOCOL={protocol}",
                      "effects": [{**{key: effect[key] for key in shown},
                                   "low": part[4], "high": part[5]} for effect, part in pairs]})
    return found


def tables(folder: Path) -> dict:
    """{protocol: its tables and verdicts} of all protocols that have records of both tables."""
    found = {}
    for protocol in PROTOCOLS:
        shown, rows = {}, {}
        for name in study.REPORT:
            shown[name], rows[name] = table(folder, protocol, name)
        if not all(shown[name]["records"] for name in study.REPORT):
            continue
        rows["attention"] = study.load_records(folder / protocol / "attention", protocol)
        found[protocol] = {**shown, "claims": verdicts(rows, protocol)}
    if not found:
        raise BadInput(f"{folder} has no records: name their folder with --results")
    return found


# ---- the site ----

def refuse_anothers(out: Path) -> None:
    """BadInput for a place that holds anything but an earlier page: it would be replaced whole."""
    marks = out / "models/index.json", out / "data/tables.json"
    if os.path.lexists(out) and not (out.is_dir() and (
            not any(out.iterdir()) or all(mark.is_file() for mark in marks))):
        raise BadInput(f"{out} is no page that this program built, and would be replaced whole; "
                       f"choose a new or empty folder")
    own = {"data", "runtime", *(path.name for path in SOURCE.iterdir())}
    if out.is_dir() and (others := sorted({path.name for path in out.iterdir()} - own)):
        raise BadInput(f"{out} has {others[0]} beside a page, and would be replaced whole; choose "
                       f"a new or empty folder")


def main(argv: list[str] | None = None) -> None:
    parser = cli.Parser(description=__doc__, allow_abbrev=False,
                        formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default="build/page", help="folder of the site (build/page)")
    parser.add_argument("--results", default="results", help="folder of the records (results)")
    args = parser.parse_args(argv)
    out = Path(args.out)
    refuse_anothers(out)
    if not (SOURCE / "models/index.json").exists():
        raise BadInput(f"{SOURCE}/models has no index.json: make page-networks PROTOCOL=desk "
                       f"writes it")
    files = {f"runtime/{name}": content
             for name, content in runtime(Path("build/runtime")).items()}
    files["data/tables.json"] = json.dumps(jsonable(tables(Path(args.results)))).encode()
    for path in sorted(SOURCE.rglob("*")):
        if path.is_file() and path.suffix not in (".py", ".pyc"):
            files[path.relative_to(SOURCE).as_posix()] = path.read_bytes()
    out = out.resolve()  # a link stays, what it leads to is replaced
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=".page-") as folder:
        made = Path(folder, "page")
        for name, content in files.items():
            (made / name).parent.mkdir(parents=True, exist_ok=True)
            (made / name).write_bytes(content)
        if out.exists():
            shutil.move(out, Path(folder, "before"))
        shutil.move(made, out)
    size = sum(map(len, files.values()))
    print(f"page {args.out}/, {len(files)} files, {size / 1e6:.1f} MB; to see it: "
          f"python -m http.server --directory {args.out}")


if __name__ == "__main__":
    sys.exit(cli.guard(main))
