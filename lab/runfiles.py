"""The files of one run, in its folder: checkpoint, arrays, record, and the lock on them."""

import fcntl
import io
import os
import sys
import typing
import weakref
from pathlib import Path

import torch

from lab.files import BadInput, read_checkpoint, write_atomic


class RunFiles:
    """Four files and a lock.

    OUT/seed<k>.pt is the checkpoint, rewritten every epoch, and in the end the trained model with
    its record; seed<k>.prev.pt is the one before, in case the newest is damaged; seed<k>.npz holds
    results per image; seed<k>.json is the record, written last: where it is, the run is complete.
    """

    def __init__(self, out: str, seed: int):
        self.checkpoint = Path(out, f"seed{seed}.pt")
        self.previous = self.checkpoint.with_suffix(".prev.pt")
        self.record = self.checkpoint.with_suffix(".json")
        self.lock = self.checkpoint.with_name(f".{self.checkpoint.stem}.lock")

    def claim(self) -> None:
        """Make the folder and hold its lock for as long as this object lives.

        BadInput if another process has it, or the file system no locks.
        """
        self.lock.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(self.lock, os.O_CREAT | os.O_RDWR | os.O_NOFOLLOW, 0o666)
        weakref.finalize(self, os.close, file)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise BadInput(f"{self.checkpoint} is being written by another process; wait for it, "
                           f"or choose another --out") from error
        except OSError as error:
            raise BadInput(f"{self.lock} cannot be locked ({error.strerror}); choose an --out on a "
                           f"local disk") from error
        # by a process that was killed
        for half_written in self.lock.parent.glob(f".{self.checkpoint.stem}.*.tmp"):
            half_written.unlink()

    def release(self) -> None:
        """Leave the three files of a complete run and nothing else."""
        for file in (self.previous, self.lock):
            if file.exists():  # where there is nothing to do the folder may be read-only
                file.unlink(missing_ok=True)

    def newest(self) -> tuple[Path, dict | None]:
        """The newest readable checkpoint and its file. None where there is none.

        BadInput if all are damaged.
        """
        if not self.checkpoint.exists() and not self.previous.exists():
            return self.checkpoint, None
        try:
            return self.checkpoint, read_checkpoint(self.checkpoint)
        except (BadInput, FileNotFoundError) as error:
            if not self.previous.exists():
                raise
            print(f"NOTE: {error}; using {self.previous}", file=sys.stderr)
            state = read_checkpoint(self.previous)
            # the next save would keep it as the one before, in this one's place
            self.checkpoint.unlink(missing_ok=True)
            return self.previous, state

    def save(self, state: dict[str, typing.Any]) -> None:
        """Write the checkpoint; the one it replaces is kept as the one before."""
        buffer = io.BytesIO()  # through memory: a full disk is then an OSError that names the file
        torch.save(state, buffer)
        write_atomic(self.checkpoint, buffer.getbuffer(), self.previous)
