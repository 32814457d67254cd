"""Files: written whole or not at all, and read with suspicion. Needs no torch."""

import os
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
