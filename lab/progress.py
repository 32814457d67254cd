"""How far long work has come: a bar in a terminal, a line every 30 seconds in a log file.

    for batch in progress(batches, "evaluation", total=57):     counted by the loop
    bar = Progress("epoch 1/40", 906)                           by hand: bar.update(n), bar.close()

Both write to stderr. What begins inside something else that is shown is silent: the outer one says
how far the whole is.
"""

import sys
import time
import weakref
from collections.abc import Iterable, Iterator
from typing import TypeVar

from tqdm import tqdm

EVERY = 30.0  # seconds between two lines of a log: soon enough to see that it lives, few in a day
Item = TypeVar("Item")


class Progress:
    """One piece of work of `total` units (None: unknown), of which `update` says some are done."""
    shown: weakref.WeakSet = weakref.WeakSet()  # weakly: what an error broke off counts no more
    spoken = time.monotonic()  # the last line of any of them: much short work is long work too

    def __init__(self, what: str, total: int | None, unit: str = "images", silent: bool = False):
        self.what, self.total, self.unit, self.done, self.note = what, total, unit, 0, ""
        self.start = time.monotonic()
        self.silent = silent or len(Progress.shown) > 0
        if not self.silent:
            Progress.shown.add(self)
        self.bar = tqdm(total=total, desc=what, unit=f" {unit}", leave=False,
                        disable=self.silent or not sys.stderr.isatty())

    def update(self, count: int = 1) -> None:
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        # what is done needs no such line: its result follows
        due = now - Progress.spoken >= EVERY and (self.total is None or 0 < self.done < self.total)
        if due and self.bar.disable and not self.silent:
            Progress.spoken = now
            gone = now - self.start
            share, left = f"{self.done} {self.unit}", ""
            if self.total is not None:
                share = f"{100 * self.done / self.total:.0f} % of {self.total} {self.unit}"
                seconds = gone * (self.total - self.done) / self.done
                left = f", {tqdm.format_interval(seconds)} to go"
            print(f"{self.what}: {share}, {tqdm.format_interval(gone)} gone{left}{self.note}",
                  file=sys.stderr, flush=True)

    def say(self, note: str) -> None:
        """Show this beside the numbers from now on, such as the loss."""
        self.note = f", {note}"
        self.bar.set_postfix_str(note)

    def close(self) -> None:
        self.bar.close()
        Progress.shown.discard(self)


def progress(items: Iterable[Item], what: str, total: int | None = None,
             unit: str = "batches") -> Iterator[Item]:
    """The items, one at a time. Without `total` they have a length."""
    bar = Progress(what, len(items) if total is None else total, unit)
    try:
        for item in items:
            yield item
            bar.update()
    finally:
        bar.close()
