"""Downloads and archives: the pinned files, or a reason and nothing left, within seconds."""

import errno
import functools
import gzip
import multiprocessing
import os
import socket
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import urllib.request
from pathlib import Path

import loopback
import pytest
from loopback import Server, archive, chunked, content, link, redirect, unmeasured

import data
from lab import fetch
from lab.fetch import Limits
from lab.files import BadInput, tree_digest

FILES = {"a.jpg": b"image" * 500, "deep/a.png": b"mask"}
DIGEST = tree_digest(list(FILES.items()))
PACKED = {f"set/{name}": body for name, body in FILES.items()}
SHORT = Limits(answer=0.5, silence=0.6)


def keep(name):
    return name.removeprefix("set/") if name.startswith("set/") else None


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "*")
    with Server() as running:
        yield running


def take(root: Path, url: str, limits: Limits = Limits()) -> dict[str, bytes]:
    """What is in root/here after a fetch; else the BadInput, and nothing may be left anywhere."""
    source = {url: lambda folder: fetch.from_archive(url, folder, keep, limits)}
    try:
        fetch.fetch(root / "root", "here", DIGEST, source)
    except BadInput as error:
        assert not list((root / "root").iterdir()) and "\n" not in str(error)
        assert sorted(path.name for path in root.iterdir()) == ["root"]
        raise
    assert [path.name for path in (root / "root").iterdir()] == ["here"]
    folder = root / "root/here"
    return {path.relative_to(folder).as_posix(): path.read_bytes()
            for path in folder.rglob("*") if not path.is_dir()}


def refused(root: Path, url: str, limits: Limits = Limits()) -> str:
    with pytest.raises(BadInput) as caught:
        take(root, url, limits)
    assert str(caught.value).startswith(f"cannot use {url}: ")
    return str(caught.value).removeprefix(f"cannot use {url}: ")


# ---- what is right ----

@pytest.mark.parametrize("mode", ["w", "w:gz", "w:xz", "w:bz2"])
@pytest.mark.parametrize("answer", [content, chunked, unmeasured])
def test_a_good_archive_is_unpacked(server, tmp_path, mode, answer):
    server.answers["/good"] = answer(archive(PACKED, mode=mode))
    assert take(tmp_path, f"{server.url}/good") == FILES


def test_a_file_of_this_machine_will_do(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "root/x.tar.gz").write_bytes(archive(PACKED))
    fetch.fetch(tmp_path / "root", "here", DIGEST, {"it": functools.partial(
        fetch.from_archive, f"file://{tmp_path}/root/x.tar.gz", keep=keep)})
    assert (tmp_path / "root/here/deep/a.png").read_bytes() == b"mask"


def test_only_what_is_kept_comes_out_of_an_archive(server, tmp_path):
    """Beside the set lie files, folders and links that it does not hold, and names that escape."""
    others = [link("elsewhere", "/etc"), link("elsewhere/passwd", "set/a.jpg", tarfile.LNKTYPE)]
    beside = {".DS_Store": b"!", "../escaped": b"!", f"{tmp_path}/escaped": b"!", "settee/a": b"!"}
    server.answers["/x"] = content(archive({**beside, **PACKED}, *others))
    assert take(tmp_path, f"{server.url}/x") == FILES
    assert [path.name for path in tmp_path.iterdir()] == ["root"]


def test_a_new_folder_appears_as_a_whole(tmp_path, monkeypatch):
    moves, replace = [], os.replace
    monkeypatch.setattr(os, "replace", lambda old, new: moves.append(new) or replace(old, new))
    fetch.fetch(tmp_path, "deep/here", DIGEST, {"a source": lambda folder: list(FILES.items())})
    assert moves == [tmp_path / "deep/here"] and (tmp_path / "deep/here/deep/a.png").exists()


def test_a_folder_that_is_there_keeps_its_other_files(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here/a.jpg").write_bytes(b"old")
    (tmp_path / "here/mine").write_bytes(b"mine")
    fetch.fetch(tmp_path, "here", DIGEST, {"a source": lambda folder: list(FILES.items())})
    assert (tmp_path / "here/a.jpg").read_bytes() == FILES["a.jpg"]
    assert (tmp_path / "here/deep/a.png").exists() and (tmp_path / "here/mine").exists()


def test_two_that_fetch_at_once_both_end_well(tmp_path, monkeypatch):
    """As the first rows of a table do side by side. Both find no folder, then both have the set."""
    fork, replace = multiprocessing.get_context("fork"), os.replace
    together, met = fork.Barrier(2), []

    def released(old, new):
        if not met:  # the first time, by when each has asked what is there
            met.append(together.wait(30))
        replace(old, new)

    monkeypatch.setattr(os, "replace", released)
    both = [fork.Process(target=fetch.fetch, args=(
        tmp_path, "here", DIGEST, {"instant": lambda folder: list(FILES.items())}))
        for _ in range(2)]
    for process in both:
        process.start()
    for process in both:
        process.join(60)
    assert [process.exitcode for process in both] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["here"]
    assert all((tmp_path / "here" / name).read_bytes() == body for name, body in FILES.items())


def test_a_folder_that_cannot_be_placed_says_why(tmp_path):
    (tmp_path / "here").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError):
        fetch.fetch(tmp_path, "here", DIGEST, {"a source": lambda folder: list(FILES.items())})
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_the_first_source_with_the_pinned_files_is_taken_and_each_other_says_why_not(tmp_path):
    def broken(folder):
        (folder / "half").write_bytes(b"half")
        raise RuntimeError("no\nnetwork \x1b[31m")

    other = lambda folder: [*FILES.items(), ("b", b"")]
    unasked = lambda folder: pytest.fail("asked though another had it")
    good = lambda folder: list(FILES.items())
    with pytest.raises(BadInput) as caught:
        fetch.fetch(tmp_path, "here", DIGEST, {"one": broken, "two": other})
    said = str(caught.value)
    assert said.startswith("cannot use one: no network ?[31m; cannot use two: it has 3 files ")
    assert said.endswith(f", expected {DIGEST}") and not list(tmp_path.iterdir())
    sources = {"one": broken, "two": other, "three": good, "four": unasked}
    fetch.fetch(tmp_path, "here", DIGEST, sources)
    assert [path.name for path in tmp_path.iterdir()] == ["here"]


def test_facades_alone_are_asked_for_without_the_other_sets(tmp_path, monkeypatch, capsys):
    """And make goes on without them, whatever the reason: also in a root that is not ours."""
    monkeypatch.setattr(sys, "argv", ["data.py", "--only", "facades", "--data-root", str(tmp_path)])
    monkeypatch.setattr(data, "load_idx", lambda root, name: pytest.fail(f"asked for {name}"))
    monkeypatch.setattr(data, "FACADE_URL", f"file://{tmp_path}/nowhere")
    data.main()
    assert f"NOTE: cannot use file://{tmp_path}/nowhere: " in capsys.readouterr().err

    def denied(**options):
        raise PermissionError(errno.EACCES, "Permission denied", options["dir"])

    monkeypatch.setattr(tempfile, "TemporaryDirectory", denied)
    data.main()
    assert "NOTE: [Errno 13] Permission denied" in capsys.readouterr().err


# ---- archives that are not the set ----

ARCHIVES = {
    "one bit": ({**PACKED, "set/deep/a.png": b"masc"}, (), "tree digest"),
    "one file more": ({**PACKED, "set/b.png": b"mask"}, (), "it has 3 files with the tree digest"),
    "one file twice": (PACKED, (tarfile.TarInfo("set/a.jpg"),), "it has 3 files with the tree"),
    "one file less": ({"set/a.jpg": FILES["a.jpg"]}, (), "it has 1 files with the tree digest"),
    "nothing": ({}, (), "it has 0 files with the tree digest"),
    "escape": ({**PACKED, "set/../../escaped": b"!"}, (), "tree digest"),
    "absolute": ({**PACKED, "set//tmp/escaped": b"!"}, (), "tree digest"),
    "link": (PACKED, (link("set/b", "../../escaped"),), "'set/b' in it is a link or a device"),
    "link away": (PACKED, (link("set/b", "/etc"),), "'set/b' in it is a link or a device"),
    "hard link": (PACKED, (link("set/b", "set/a.jpg", tarfile.LNKTYPE),), "is a link or a device"),
    "pipe": (PACKED, (link("set/b", "", tarfile.FIFOTYPE),), "is a link or a device"),
    "device": (PACKED, (link("set/b", "", tarfile.CHRTYPE),), "is a link or a device"),
    "link for a file": ({"set/a.jpg": b""}, (link("set/deep/a.png", "a.jpg"),), "is a link or a"),
}


@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_that_is_not_the_set_is_refused(server, tmp_path, name):
    files, others, message = ARCHIVES[name]
    server.answers["/x"] = content(archive(files, *others))
    assert message in refused(tmp_path, f"{server.url}/x")


def test_more_members_than_a_set_has_are_refused(server, tmp_path):
    server.answers["/x"] = content(archive(PACKED, *(tarfile.TarInfo(str(i)) for i in range(50))))
    said = refused(tmp_path, f"{server.url}/x", Limits(members=50))
    assert "with '48' it has too much for the set" in said
    assert take(tmp_path, f"{server.url}/x", Limits(members=52)) == FILES


@pytest.mark.parametrize("body, message", [
    (b"<html>", "truncated header"), (b"", "empty file"), (bytes(1 << 15), "it has 0 files"),
    (archive(PACKED)[:-40], "ended before the end-of-stream marker"),
    (b"\x1f\x8b" + bytes(99), "compression method")])
def test_what_is_no_archive_is_refused(server, tmp_path, body, message):
    server.answers["/x"] = content(body)
    assert message in refused(tmp_path, f"{server.url}/x")


@pytest.mark.parametrize("kind, size", [
    (tarfile.DIRTYPE, -(1 << 50)), (tarfile.REGTYPE, -512), (tarfile.GNUTYPE_LONGNAME, 1 << 70),
    (tarfile.GNUTYPE_LONGNAME, 1 << 21)])
def test_a_header_of_impossible_size_is_refused_at_once(server, tmp_path, kind, size):
    info = tarfile.TarInfo("set/odd")
    info.type, info.size = kind, size
    server.answers["/x"] = content(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    assert "a header of impossible size" in refused(tmp_path, f"{server.url}/x")


@pytest.mark.parametrize("body", [bytes(1 << 20), archive({"set/a.jpg": bytes(1 << 20)}),
                                  archive({"beside": bytes(1 << 20)}, mode="w:xz"),
                                  gzip.compress(bytes(1 << 20))])
@pytest.mark.parametrize("answer", [content, chunked])
def test_more_than_a_set_has_is_refused_packed_or_unpacked(server, tmp_path, body, answer):
    server.answers["/x"] = answer(body)
    said = refused(tmp_path, f"{server.url}/x", Limits(size=1 << 19))
    told = answer is content and len(body) > 1 << 19
    assert said == (f"it has {len(body)} bytes, more than the 524288 allowed" if told else
                    "it has more than the 524288 bytes allowed")


def test_a_file_of_holes_that_would_fill_the_memory_is_not_read(server, tmp_path):
    """In an archive of a few blocks, a sparse file may say that it has any size."""
    sparse = tarfile.TarInfo("set/a.jpg")
    sparse.pax_headers = {"GNU.sparse.realsize": str(1 << 40), "GNU.sparse.map": "0,0"}
    server.answers["/x"] = content(sparse.tobuf(tarfile.PAX_FORMAT) + archive(PACKED, mode="w"))
    assert "with 'set/a.jpg' it has too much for the set" in refused(tmp_path, f"{server.url}/x")


def test_attributes_that_would_fill_the_memory_are_not_read(server, tmp_path):
    """They pack to a hundredth, and tarfile would make an object of each, all at once."""
    record = b"20 attribute=value.\n" * 100_000
    info = tarfile.TarInfo("pax")
    info.type, info.size = tarfile.XHDTYPE, len(record)
    bomb = info.tobuf(tarfile.PAX_FORMAT) + record + bytes(-len(record) % 512)
    server.answers["/x"] = content(gzip.compress(bomb + archive(PACKED, mode="w"), 1))
    assert "a header of impossible size" in refused(tmp_path, f"{server.url}/x")
    # nothing else is wrong with it
    assert take(tmp_path, f"{server.url}/x", Limits(header=1 << 22)) == FILES


# ---- servers ----

GOOD = archive(PACKED)
BIG = archive({"set/a.jpg": os.urandom(300_000)})
SERVERS = {
    "cut off": (content(GOOD[:-40], len(GOOD)),
                f"it broke off after {len(GOOD) - 40} of {len(GOOD)} bytes"),
    "cut off between chunks": (chunked(BIG, cut=True), "it broke off after"),
    "cut off without a word": (unmeasured(GOOD[:-40]), "ended before the end-of-stream marker"),
    "not there": (loopback.missing, "HTTP Error 404"),
    "of another kind of file": (redirect("file:///etc/passwd"), "file:///etc/passwd"),
    "of another scheme": (redirect("ftp://127.0.0.1/x"),
                          "redirects to ftp://127.0.0.1/x, which is refused"),
    "going in circles": (redirect("/x"), "infinite loop"),
    "more than it may be": (content(b"", 1 << 40), f"it has {1 << 40} bytes, more than"),
    "silent": (loopback.silent, "no answer within 0.5 seconds"),
    "slow with its header": (loopback.trickling("header"), "no answer within 0.5 seconds"),
    "slow with its body": (loopback.trickling("body"), "less than 64 KiB within 0.6 seconds"),
    "stuck": (loopback.stuck(BIG), "less than 64 KiB within 0.6 seconds"),
}


@pytest.mark.parametrize("name", SERVERS)
def test_a_bad_server_is_refused_within_seconds(server, tmp_path, name):
    server.answers["/x"], message = SERVERS[name]
    start = time.monotonic()
    assert message in refused(tmp_path, f"{server.url}/x", SHORT)
    assert time.monotonic() - start < 4


def test_a_server_without_end_is_refused(server, tmp_path):
    server.answers["/x"] = loopback.endless
    said = refused(tmp_path, f"{server.url}/x", Limits(size=10_000_000))
    assert said == "it has more than the 10000000 bytes allowed"


def test_all_of_it_has_a_limit_too(server, tmp_path):
    """Each piece comes in time, but there is no end of them."""
    def slow(handler):
        handler.head(200)
        while not handler.server.closing.wait(0.05):
            handler.wfile.write(bytes(1 << 16))

    server.answers["/x"] = slow
    assert "too slow" in refused(tmp_path, f"{server.url}/x", Limits(total=0.7))


def test_a_redirect_is_followed_but_never_from_https_to_less(server, tmp_path):
    server.answers["/x"], server.answers["/y"] = redirect("/y"), chunked(GOOD)
    assert take(tmp_path, f"{server.url}/x") == FILES and server.asked == ["/x", "/y"]
    follow = fetch.SameOrSafer().redirect_request
    asked = urllib.request.Request("https://one/x")
    assert follow(asked, None, 302, "Found", {}, "https://other/x").full_url == "https://other/x"
    with pytest.raises(urllib.error.HTTPError, match="redirects to http://one/x, which is ref"):
        follow(asked, None, 302, "Found", {}, "http://one/x")


@pytest.mark.parametrize("url", ["http://127.0.0.1:9/x", "nonsense", "ftp://127.0.0.1/x",
                                 "data:,x", "file:///nowhere"])
def test_addresses_that_lead_nowhere(tmp_path, url):
    refused(tmp_path, url)


def test_a_port_that_takes_no_connection_is_given_up(tmp_path):
    """A full backlog drops what comes, as a network does that leads nowhere."""
    with socket.socket() as full:
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        waiting = []
        for _ in range(4):
            waiting.append(socket.socket())
            waiting[-1].setblocking(False)
            waiting[-1].connect_ex(full.getsockname())
        url = f"http://127.0.0.1:{full.getsockname()[1]}/x"
        assert "no answer within 0.5 seconds" in refused(tmp_path, url, SHORT)
        for one in waiting:
            one.close()


def test_a_name_that_is_looked_up_for_ever_is_given_up(tmp_path, monkeypatch):
    asked, go_on = [], threading.Event()

    def look_up(host, *rest, **more):
        asked.append(host)
        go_on.wait(60)
        raise OSError("too late")

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    start = time.monotonic()
    assert "no answer within 0.5 seconds" in refused(tmp_path, "https://server.invalid/x", SHORT)
    assert asked == ["server.invalid"] and time.monotonic() - start < 4
    go_on.set()


def test_the_process_ends_though_a_name_is_still_looked_up(tmp_path):
    code = """import socket, sys, time
socket.getaddrinfo = lambda *a, **k: time.sleep(600)
from lab import fetch
try:
    fetch.download("http://server.invalid/x", sys.argv[1], fetch.Limits(answer=0.2))
except TimeoutError as error:
    print(error)"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path / "x"],
                          cwd=Path(fetch.__file__).parents[1], env={**os.environ, "no_proxy": "*"},
                          capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("no answer within 0.2 seconds\n", "")
    assert done.returncode == 0


def test_what_limits_there_are_without_a_word():
    assert Limits().answer <= 10 and Limits().silence <= 20 and Limits().total <= 3600
    assert Limits().size <= 1 << 28 and Limits().members <= 10_000


def test_a_reader_that_gives_up_is_followed_by_no_more_requests():
    made, closed = [], threading.Event()

    def items():
        try:
            for i in range(1000):
                made.append(i)
                yield i
        finally:
            closed.set()

    taken = fetch.patiently(items())
    assert [next(taken), next(taken)] == [0, 1]
    taken.close()
    assert closed.wait(5) and len(made) < 20
