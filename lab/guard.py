"""What ends a script before its time: one line and an exit code; signals. Needs no torch.

    sys.exit(guard(main))
"""

import contextlib
import signal
import sys
import threading
import typing
from collections.abc import Callable, Iterator

from lab.files import BadInput

# Ctrl-C, kill, and what schedulers send before they preempt
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
OUT_OF_MEMORY = ("out of memory: where the command has them, lower --batch first, then --size or "
                 "--width", 2)
PEER_ENDED = "another process of the group has ended; run the same command to go on", 1


class Stopped(BaseException):
    """A signal told the process to stop: the conventional exit code is 128 + signal.

    `where` is what the same command goes on from, if what was reached is saved.
    """

    def __init__(self, number: int, where: str | None = None):
        super().__init__(f"stopped by {signal.Signals(number).name}"
                         + (f"; the same command goes on from {where}" if where else ""))
        self.code = 128 + number


def guard(main: Callable[[], None]) -> int:
    """Run a script's main: what is the user's to mend becomes one line and an exit code.

    2 for bad input, 1 for what failed on the way, 128 + the signal for a stop.
    """
    print_any_name()
    # whatever ends it is told: a signal on the way would change nothing but that
    with handling(STOPPING, lambda number, frame: None):
        message, code = outcome(main)
        if message:
            print(f"error: {process()}{' '.join(message.split())}", file=sys.stderr)
        return code


def outcome(main: Callable[[], None]) -> tuple[str, int]:
    """What to say of how main ended, and the exit code."""
    try:
        with handling(STOPPING, raise_stopped):
            main()
        return "", 0
    except Stopped as stopped:
        # a launcher stops the others once one has ended: they may be on their way out by then
        return PEER_ENDED if peer_ended(stopped.__context__) else (str(stopped), stopped.code)
    except BadInput as error:
        return str(error), 2
    except OSError as error:
        return f"{error.filename or 'file'}: {error.strerror or error}", 2
    except FloatingPointError as error:
        return str(error), 1
    except MemoryError:  # NumPy's, where torch's is a RuntimeError
        return OUT_OF_MEMORY
    except RuntimeError as error:
        if not (known := of_torch(error)):
            raise
        return known


def peer_ended(error: BaseException | None) -> bool:
    """Whether it is what torch raises where another process of the group is no more."""
    return (isinstance(error, RuntimeError) and (dist := group()) is not None
            and ("gloo" in str(error) or isinstance(error, dist.DistError)))


def of_torch(error: RuntimeError) -> tuple[str, int] | None:
    """The message and code for what torch raises where memory or another process gives out."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return OUT_OF_MEMORY
    if type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
        reason = str(error).split("\n\n")[0]
        return f"--compile does not work here ({reason}); leave it out", 2
    return PEER_ENDED if peer_ended(error) else None


def print_any_name() -> None:
    """Let standard output take any file's name: it may be no UTF-8, and so may the output."""
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower()
    if hasattr(sys.stdout, "reconfigure"):  # not that of a notebook
        sys.stdout.reconfigure(errors="surrogateescape" if encoding == "utf-8"
                               else "backslashreplace")


def group() -> typing.Any:
    """torch.distributed, if this process is one of a group, else None."""
    dist = getattr(sys.modules.get("torch"), "distributed", None)
    return dist if dist is not None and dist.is_initialized() else None


def process() -> str:
    """Which process of a group speaks, if there are several."""
    dist = group()
    return f"process {dist.get_rank()}: " if dist is not None and dist.get_world_size() > 1 else ""


def raise_stopped(number: int, frame: object) -> typing.NoReturn:
    raise Stopped(number)


@contextlib.contextmanager
def handling(signals: tuple[int, ...], handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handle the signals inside the block, if in the main thread: Python allows it nowhere else."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in signals}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
