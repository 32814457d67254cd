"""A web server on this machine with every vice, and archives in the shapes that servers send."""

import http.server
import io
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path


class Server(http.server.ThreadingHTTPServer):
    """`answers` maps a path to a function of the request's handler; `with` serves, in threads."""
    daemon_threads = True
    block_on_close = False

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.answers: dict[str, Callable[[Handler], None]] = {}
        self.asked: list[str] = []
        self.closing = threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self):
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}).start()
        return self

    def __exit__(self, *error):
        self.closing.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request, client_address):
        pass  # a client that gives up is what is tested


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.server.asked.append(self.path)
        self.close_connection = True
        self.server.answers.get(self.path, missing)(self)

    def head(self, code: int, **headers) -> None:
        self.send_response(code)
        for name, value in {"Connection": "close", **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()


def missing(handler):
    handler.head(404, Content_Length=0)


def content(body: bytes, length: int | None = None):
    """An answer with its length, which may be a lie."""
    def answer(handler):
        handler.head(200, Content_Length=len(body) if length is None else length)
        handler.wfile.write(body)
    return answer


def unmeasured(body: bytes):
    """An answer that ends where the connection does."""
    def answer(handler):
        handler.head(200)
        handler.wfile.write(body)
    return answer


def chunked(body: bytes, cut: bool = False, size: int = 10_000):
    """An answer in chunks, as of a server that packs while it sends; `cut` lacks the last ones."""
    def answer(handler):
        handler.head(200, Transfer_Encoding="chunked", Content_Type="application/x-gzip")
        for at in range(0, len(body), size):
            piece = body[at:at + size]
            handler.wfile.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        if not cut:
            handler.wfile.write(b"0\r\n\r\n")
    return answer


def redirect(url: str):
    return lambda handler: handler.head(302, Location=url, Content_Length=0)


def silent(handler):
    """Takes the request and never says a word."""
    handler.server.closing.wait(60)


def stuck(body: bytes):
    """Stops in the middle of its body, and keeps the connection."""
    def answer(handler):
        handler.head(200, Content_Length=2 * len(body))
        handler.wfile.write(body)
        silent(handler)
    return answer


def trickling(where: str):
    """A byte every 20 ms, without end, of its header or its body: never silent, never done."""
    def answer(handler):
        if where == "body":
            handler.head(200, Content_Length=1 << 20)
        else:
            handler.wfile.write(b"HTTP/1.1 200 OK\r\nX-Slow: ")
        while not handler.server.closing.wait(0.02):
            handler.wfile.write(b"x")
    return answer


def endless(handler):
    """Sends, as fast as it is read, for ever."""
    handler.head(200)
    while not handler.server.closing.is_set():
        handler.wfile.write(bytes(1 << 16))


# ---- archives ----

def archive(files: dict[str, bytes], *others: tarfile.TarInfo, mode: str = "w:gz") -> bytes:
    """A tar archive of these files, then of members without content."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as tar:
        add(tar, files)
        for info in others:
            tar.addfile(info)
    return buffer.getvalue()


def add(tar: tarfile.TarFile, files: dict[str, bytes]) -> None:
    for name, body in files.items():
        info = tarfile.TarInfo(name)
        info.size = len(body)
        tar.addfile(info, io.BytesIO(body))


def link(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = kind, target
    return info


def of_github(files: dict[str, bytes], repository: str, commit: str) -> bytes:
    """GitHub's archive of a commit: its number in a global header, then REPOSITORY-COMMIT/, each
    folder before what lies in it.
    """
    buffer, top, known = io.BytesIO(), f"{repository}-{commit}", set()
    with tarfile.open(fileobj=buffer, mode="w:gz", format=tarfile.PAX_FORMAT, compresslevel=1,
                      pax_headers={"comment": commit}) as tar:
        for name in sorted(files):
            for folder in reversed(Path(top, name).parents[:-1]):
                if folder not in known:
                    known.add(folder)
                    info = tarfile.TarInfo(f"{folder}/")
                    info.type, info.mode = tarfile.DIRTYPE, 0o775
                    tar.addfile(info)
            add(tar, {f"{top}/{name}": files[name]})
    return buffer.getvalue()
