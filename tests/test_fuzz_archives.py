"""Random and mutated archives of the facades: unpacked to exactly what was packed, or refused."""

import gzip
import lzma
import resource
import runpy
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from test_fuzz import bounded, mutated, outcome, scratch

import data
from lab.fetch import Limits
from lab.files import BadInput, tree_digest

FILES = {"mini_facade/train/a.jpg": b"image" * 300, "mini_facade/train/a.png": b"mask"}
# more than the unpackers read at once, so that damage shows in the middle of a member
LARGE = {**FILES, "mini_facade/train/a.jpg": np.random.default_rng(0).bytes(30_000)}


def member(name, kind=tarfile.REGTYPE, link="", size=None, body=b""):
    """One member's blocks, which may announce another size than they have."""
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.size = kind, link, len(body) if size is None else size
    return info.tobuf(tarfile.GNU_FORMAT) + body + bytes(-len(body) % 512)


def tar(members):
    return b"".join(member(**one) for one in members) + bytes(1024)


def members(files, parent="mini_facade"):
    return [{"name": name.replace("mini_facade", parent), "body": content}
            for name, content in files.items()]


def check_archive(content, files=FILES):
    """True if unpacked to exactly these files, else refused without a trace; no more is written.

    The content may be a function of the folder whose subfolder root is the data root.
    """
    digest = tree_digest([(name.removeprefix("mini_facade/"), content)
                          for name, content in files.items()])
    with scratch() as folder:
        folder = Path(folder)
        (folder / "archive").write_bytes(content(folder) if callable(content) else content)
        root, url = folder / "root", f"file://{folder}/archive"
        found = outcome(url, data.fetch_facades, root, url, digest)
        assert sorted(path.name for path in folder.iterdir()) == ["archive", "root"]
        if found is None:
            left = list(root.rglob("*"))
            assert not any(path.is_symlink() for path in left)
            assert {str(path.relative_to(root)): path.read_bytes()
                    for path in left if not path.is_dir()} == files
        else:
            assert not list(root.iterdir())
        return found is None


NAMES = [*FILES, "mini_facade", "./mini_facade/train/../train/a.png", "/mini_facade/train/b.png",
         "../escaped", "../../escaped", "FOLDER/escaped", "mini_facade/../../../escaped",
         "..\\escaped", "archive", ".", "..", "", "link/escaped", "mini_facade/é\n",
         "mini_facade/\udcff", "mini_facade/" + "a/" * 300 + "b", "mini_facade/" + "a" * 300]
KINDS = [*[tarfile.REGTYPE] * 8, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE,
         tarfile.FIFOTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE, tarfile.GNUTYPE_SPARSE]
names, text = st.sampled_from(NAMES), st.text(max_size=8)
odd_members = st.lists(st.fixed_dictionaries({
    "name": st.one_of(names, names, text, text.map("mini_facade/{}".format)),
    "kind": st.sampled_from(KINDS),
    "link": st.sampled_from(["", ".", "..", "../..", "FOLDER", "/etc/passwd", "link", *FILES]),
    "size": st.sampled_from([None] * 8 + [-512, -1536, -1, 1 << 31, 1 << 62, 1 << 70]),
    "body": st.sampled_from([b"", b"!", *FILES.values()])}), max_size=2)


LINK, HARD = tarfile.SYMTYPE, tarfile.LNKTYPE


@bounded
@given(odd_members, st.sampled_from(["mini_facade", "real"]), odd_members)
@example([], "mini_facade", [])
@example([], "mini_facade", [{"name": "../escaped"}])
@example([], "mini_facade", [{"name": "../../escaped"}])
@example([], "mini_facade", [{"name": "FOLDER/escaped"}])
@example([], "mini_facade", [{"name": "z", "size": -512}])  # sends tarfile in circles
@example([], "mini_facade", [{"name": "z", "size": -512, "kind": tarfile.GNUTYPE_SPARSE}])
@example([], "mini_facade", [{"name": "z", "size": 1 << 70, "kind": tarfile.GNUTYPE_LONGNAME}])
@example([], "mini_facade", [{"name": "mini_facade/z", "kind": HARD, "link": "nowhere"}])
@example([], "mini_facade", [{"name": "mini_facade/z", "kind": LINK, "link": "."}])
@example([], "mini_facade", [{"name": "mini_facade/\udcff"}])
@example([], "real", [{"name": "mini_facade", "kind": LINK, "link": "real"}])
def test_an_archive_of_odd_members_writes_nothing_but_the_set(before, parent, after):
    packed = [*before, *members(FILES, parent), *after]

    def content(folder):
        put = lambda value: (value.replace("FOLDER", str(folder))
                             if isinstance(value, str) else value)
        return tar([{key: put(value) for key, value in one.items()} for one in packed])

    unpacked = check_archive(content)
    assert unpacked or before or after or parent == "real"


def test_a_size_below_zero_makes_no_room_for_a_bomb(tmp_path):
    sparse = tarfile.TarInfo("z")
    sparse.pax_headers = {"GNU.sparse.realsize": "-1000000"}
    large = tar([{"name": "mini_facade/b", "body": bytes(100_000)}])
    bomb = sparse.tobuf(tarfile.PAX_FORMAT) + large
    (tmp_path / "archive").write_bytes(gzip.compress(bomb))
    with pytest.raises(BadInput, match="with 'z' it has too much for the set"):
        data.fetch_facades(tmp_path / "root", f"file://{tmp_path}/archive",
                           limits=Limits(size=200_000))


def test_an_archive_that_is_deeper_than_files_may_be_open_is_no_matter():
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (100, hard))
    try:
        assert check_archive(tar([*members(FILES), {"name": "mini_facade/" + "a/" * 200 + "b"}]))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


@bounded
@given(st.sampled_from([bytes, gzip.compress, lzma.compress]), st.data())
def test_a_damaged_archive_is_unpacked_exactly_or_refused(pack, draws):
    content = pack(tar(members(LARGE)))
    check_archive(draws.draw(st.one_of(mutated(content), mutated(content), st.binary())), LARGE)


def unreachable_host(*where, **how):
    raise OSError("no network")


@bounded
@given(st.sampled_from(["http://127.0.0.1:9/", "http://127.0.0.1:9", "http://", "file:///",
                        "file:///no/such/", "data:", "data:,", ""]), st.text(max_size=8))
@example("http://127.0.0.1:9/", "a b")
@example("http://127.0.0.1:", "port/")
def test_a_url_that_leads_nowhere_is_refused(start, rest):
    with scratch() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr("socket.getaddrinfo", unreachable_host)
        url, root = start + rest, Path(folder)
        assert isinstance(outcome(url, data.fetch_facades, root, url), Exception)
        assert not list(root.iterdir())


def test_data_py_says_in_one_line_what_is_wrong(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv",
                        ["data.py", "--data-root", str(tmp_path), "--facades-url", "data:,x"])
    with pytest.raises(SystemExit, match="2"):
        runpy.run_path(data.__file__, run_name="__main__")
    assert len(capsys.readouterr().err.splitlines()) == 1 and not list(tmp_path.iterdir())
