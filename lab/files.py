"""Files: written whole or not at all, and read with suspicion. Needs no torch until it reads a checkpoint."""

import hashlib
import json
import math
import os
import typing
import zipfile
from pathlib import Path


class BadInput(ValueError):
    """Something the user gave is wrong: the message says what, where and what to do."""


def write_atomic(path: Path, content: bytes, previous: Path | None = None) -> None:
    """Write a whole file or none: a reader, or a run killed at any moment, never sees half of it.

    What the file held so far is kept as `previous`, if that is given.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)  # a link that someone put there would be followed
        with open(temporary, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if previous is not None and path.exists():
            os.replace(path, previous)
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, f"{error.strerror}; nothing was lost, free or change the place "
                                   f"and run again", str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)


def tree_digest(entries: list[tuple[str, bytes]]) -> str:
    """sha256 over the lines "sha256  relative/path" of a set's files, sorted by path."""
    lines = [f"{hashlib.sha256(content).hexdigest()}  {path}\n" for path, content in sorted(entries)]
    return hashlib.sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()  # a name may be no UTF-8


# ---- checkpoints and records ----

def read_checkpoint(path: Path) -> dict:
    """A checkpoint of this project, unpickled without running code. BadInput if it is anything else."""
    import torch
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums that torch.save wrote
            for entry in archive.infolist():
                # torch.save never compresses, and a small file could unpack to any size; a file with the attribute
                # of a folder is empty to torch.load: its tensor would be whatever lay in memory
                if entry.compress_type != zipfile.ZIP_STORED or entry.external_attr & 16:
                    raise zipfile.BadZipFile("compressed, or a folder")
            if archive.testzip() is not None:
                raise zipfile.BadZipFile("checksum")
        state = torch.load(path, map_location="cpu", weights_only=True)
        return {name: state[name] for name in ("identity", "epoch", "model", *state)}
    except FileNotFoundError:
        raise
    except Exception as error:  # torch, zipfile and pickle each raise their own for a damaged file
        raise BadInput(f"{path} is no checkpoint of this project, or damaged ({type(error).__name__}); delete or "
                       f"replace it") from error


def read_record(path: Path) -> dict:
    """A run record. BadInput if the file is anything else."""
    try:
        record = json.loads(path.read_text())
        if not isinstance(record["config"], dict) or not isinstance(record["metrics"], dict):
            raise TypeError("config and metrics must be objects")
        return {name: record[name] for name in ("config", "data", "metrics", *record)}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise BadInput(f"{path} is no run record, or damaged ({type(error).__name__}); delete it") from error


def jsonable(value: typing.Any) -> typing.Any:
    """NaN has no place in JSON: it becomes null, at any depth."""
    if isinstance(value, dict):
        return {key: jsonable(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
