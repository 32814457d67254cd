"""Files from elsewhere, by download, package or archive: those of the pinned digest, or none.

    fetch(root, "set", digest, {url: lambda folder: from_archive(url, folder, keep)})

A source gets a scratch folder and returns [(path, content)]. The first whose `tree_digest` is the
pinned one is written, and only then: a path out of an archive names no file before the digest has
confirmed it. A server that hangs, trickles or sends without end is given up, see `Limits`.
"""

import bz2
import gzip
import http.client
import lzma
import os
import queue
import subprocess
import tarfile
import tempfile
import threading
import time
import typing
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lab.files import BadInput, tree_digest
from lab.progress import Progress

Item = typing.TypeVar("Item")
Files = list[tuple[str, bytes]]
PIECE = 1 << 16  # bytes read at once
# headers that describe the next one: tarfile reads them whole
DESCRIBING = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE, tarfile.GNUTYPE_LONGNAME,
              tarfile.GNUTYPE_LONGLINK)
UNPACKERS = {b"\x1f\x8b": gzip.open, b"\xfd7zXZ\0": lzma.open, b"BZh": bz2.open}  # by first bytes


@dataclass(frozen=True)
class Limits:
    """How much is taken from a stranger, and how long one is waited for."""
    size: int = 1 << 28  # bytes of a download, and of what it unpacks to; a set has up to 55 MB
    members: int = 10_000  # of an archive; a set has up to 2,040 files
    header: int = 1 << 20  # bytes of one that only describes the next: paths, attributes
    answer: float = 8  # seconds for looking up, connecting and redirects: soon where no network is
    silence: float = 15  # seconds for the next PIECE: slower lines are not worth the wait
    total: float = 3600  # seconds for all of it


# ---- the first source that has exactly the pinned files ----

def fetch(root: Path, name: str, digest: str,
          sources: dict[str, Callable[[Path], Files]]) -> None:
    """Write the files of exactly this `tree_digest` to root/name, from the first source with them.

    A source is named in errors, and may raise what it likes. BadInput says of each why not, and
    nothing is left behind then.
    """
    reasons = []
    root.mkdir(parents=True, exist_ok=True)
    for source, read in sources.items():
        with tempfile.TemporaryDirectory(dir=root, prefix=".fetch-") as scratch:
            try:
                files = read(Path(scratch))
                found = tree_digest(files)
                if found != digest:
                    raise ValueError(f"it has {len(files)} files with the tree digest {found}, "
                                     f"expected {digest}")
            except Exception as error:  # urllib, tarfile, clients and unpackers raise their own
                reasons.append(f"cannot use {source}: {reason(error)}")
                continue
            place(files, Path(scratch, "checked"), root / name)
            return
    raise BadInput("; ".join(reasons))


def place(files: Files, made: Path, target: Path) -> None:
    """Write files into the folder `made` and move it as a whole, or where there is one, each."""
    for path, content in files:
        (made / path).parent.mkdir(parents=True, exist_ok=True)
        (made / path).write_bytes(content)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.replace(made, target)
        return
    except OSError:  # not asked before: a row beside this one may fetch the set too, and be faster
        if not target.exists():
            raise
    for path, _ in files:
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        os.replace(made / path, target / path)


def reason(error: Exception) -> str:
    """An error in one line, with nothing in it that a terminal would obey."""
    if type(error) is urllib.error.URLError:  # it only wraps another
        error = error.reason
    text = " ".join(str(error).split()) or type(error).__name__
    return "".join(sign if sign.isprintable() else "?" for sign in text)


# ---- downloads ----

class SameOrSafer(urllib.request.HTTPRedirectHandler):
    """Follows a redirect to https, or to the scheme that it came by, and to no other."""

    def redirect_request(self, request, reply, code, message, headers, url):
        if urllib.parse.urlsplit(url).scheme not in (request.type, "https"):
            raise urllib.error.HTTPError(request.full_url, code, f"redirects to {url}, which is "
                                         f"refused", headers, reply)
        return super().redirect_request(request, reply, code, message, headers, url)


def opener() -> urllib.request.OpenerDirector:
    """For https, http and file alone, through the proxies of the environment."""
    director = urllib.request.OpenerDirector()
    for handler in (urllib.request.ProxyHandler, urllib.request.HTTPSHandler,
                    urllib.request.HTTPHandler, urllib.request.FileHandler, SameOrSafer,
                    urllib.request.HTTPErrorProcessor, urllib.request.HTTPDefaultErrorHandler,
                    urllib.request.UnknownHandler):
        director.add_handler(handler())
    return director


def body(url: str, limits: Limits = Limits()) -> Iterator[typing.Any]:
    """What lies behind a URL: its length, 0 where no one says, then its bytes in pieces."""
    done = 0
    try:
        # later than `patiently` gives up: this one only ends a thread that no one waits for
        with opener().open(url, timeout=2 * limits.silence) as reply:
            length = int(reply.headers.get("Content-Length") or 0)
            yield length
            while piece := reply.read(PIECE):
                done += len(piece)
                yield piece
    except http.client.IncompleteRead:  # of a body in chunks
        raise ValueError(f"it broke off after {done} bytes; try again") from None
    except urllib.error.HTTPError as error:
        error.close()  # it holds the connection
        raise
    if length and done != length:
        raise ValueError(f"it broke off after {done} of {length} bytes; try again")


def patiently(items: Iterator[Item], limits: Limits = Limits()) -> Iterator[Item]:
    """The items, made in a thread. TimeoutError where one keeps waiting longer than the limits.

    From a name look-up that hangs nothing else gets away. Its thread stays behind, and ends with
    the process at the latest: it is not waited for, and hands over nothing any more.
    """
    handed: queue.Queue = queue.Queue(8)
    given_up, end = threading.Event(), object()

    def hand_over(item: object) -> None:
        while not given_up.is_set():
            try:
                return handed.put(item, timeout=0.5)
            except queue.Full:
                pass

    def work() -> None:
        try:
            for item in items:
                hand_over(item)
                if given_up.is_set():
                    break
            hand_over(end)
        except Exception as error:
            hand_over(error)
        finally:
            items.close()

    threading.Thread(target=work, daemon=True).start()
    wait, ends, late = limits.answer, time.monotonic() + limits.total, "no answer"
    try:
        while True:
            try:
                item = handed.get(timeout=max(0, min(wait, ends - time.monotonic())))
            except queue.Empty:
                raise TimeoutError(f"{late} within {min(wait, limits.total):g} seconds") from None
            if item is end:
                return
            if isinstance(item, Exception):
                raise item
            yield item
            wait, late = limits.silence, f"too slow or broken off, less than {PIECE >> 10} KiB"
    finally:
        given_up.set()


def download(url: str, path: Path, limits: Limits = Limits()) -> None:
    """Save what lies behind a URL. ValueError or OSError where it is too much, too slow or cut."""
    pieces = patiently(body(url, limits), limits)
    length = next(pieces)
    if length > limits.size:
        raise ValueError(f"it has {length} bytes, more than the {limits.size} allowed")
    bar = Progress("download", length >> 10 or None, "KiB")
    try:
        save(pieces, path, limits, bar)
    finally:
        bar.close()


def save(pieces: Iterator[bytes], path: Path, limits: Limits, bar: Progress | None = None) -> None:
    done = 0
    with open(path, "wb") as file:
        for piece in pieces:
            done += len(piece)
            if done > limits.size:
                raise ValueError(f"it has more than the {limits.size} bytes allowed")
            file.write(piece)
            if bar is not None:
                bar.update(len(piece) >> 10)


# ---- archives ----

def unpack(path: Path, limits: Limits = Limits()) -> Path:
    """The file beside `path` that this gzip, xz or bzip2 file unpacks to; itself if it is none."""
    with open(path, "rb") as file:
        head = file.read(6)
    for magic, opened in UNPACKERS.items():
        if head.startswith(magic):
            plain = path.with_name(f"{path.name}.unpacked")
            with opened(path, "rb") as file:
                save(iter(lambda: file.read(PIECE), b""), plain, limits)
            return plain
    return path


def careful(limits: Limits) -> type[tarfile.TarInfo]:
    """Headers for tarfile to read: of no size that would fill the memory or lead backwards."""
    class Header(tarfile.TarInfo):
        @classmethod
        def frombuf(cls, *args):
            header = super().frombuf(*args)
            if header.size < 0 or header.type in DESCRIBING and header.size > limits.header:
                raise ValueError("its archive has a header of impossible size")
            return header
    return Header


def plain_members(archive: tarfile.TarFile, keep: Callable[[str], str | None],
                  limits: Limits = Limits()) -> Iterator[tuple[str, tarfile.TarInfo]]:
    """The files of an archive that `keep` gives a path for, with that path, one at a time.

    ValueError for links and devices among them, and, whatever is kept, for more than a data set
    has: a sum beforehand would read a hostile archive to its end.
    """
    total = 0
    for count, member in enumerate(archive):
        total += member.size
        # a size below 0, hidden in a sparse file, sends tarfile back and in circles
        if (member.size < 0 or archive.offset <= member.offset
                or total > limits.size or count >= limits.members):
            raise ValueError(f"with {ascii(member.name[:80])} it has too much for the set")
        path = keep(member.name)
        if path is None or member.isdir():
            continue
        if not member.isreg():
            raise ValueError(f"{ascii(member.name[:80])} in it is a link or a device")
        yield path, member


def read_tar(path: Path, keep: Callable[[str], str | None], limits: Limits = Limits()) -> Files:
    """The files of a tar archive, packed or not, that `keep` gives a path for, with that path."""
    with tarfile.open(unpack(path, limits), "r:", tarinfo=careful(limits)) as archive:
        return [(name, archive.extractfile(member).read())
                for name, member in plain_members(archive, keep, limits)]


def from_archive(url: str, folder: Path, keep: Callable[[str], str | None],
                 limits: Limits = Limits()) -> Files:
    """A source: the files of the tar archive behind a URL that `keep` gives a path for."""
    download(url, folder / "archive", limits)
    return read_tar(folder / "archive", keep, limits)


# ---- packages, by their registries' own clients, which check them ----

def run(folder: Path, *command: str) -> None:
    subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=600)


def debian_package(name: str, folder: Path) -> Path:
    """The folder with a package's files, unpacked without root."""
    run(folder, "apt-get", "download", name)
    run(folder, "dpkg-deb", "--extract", next(folder.glob("*.deb")).name, ".")
    return folder


def npm_package(name: str, folder: Path) -> Path:
    """The package as npm packs it, a tar archive of package/."""
    run(folder, "npm", "pack", name)
    return next(folder.glob("*.tgz"))
