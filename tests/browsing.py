"""The built page in headless Chromium, for the tests that `make test-page` runs.

It needs PAGE, the folder that `make page` built, Debian's chromium and the package playwright.
"""

import base64
import functools
import http.server
import io
import os
import shutil
import threading
from pathlib import Path
from urllib.parse import urlsplit

import pytest

PAGE = os.environ.get("PAGE")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
if not PAGE:
    pytest.skip("PAGE names no built page: make test-page does", allow_module_level=True)
if not CHROMIUM:
    pytest.skip("no chromium (Debian: apt-get install chromium)", allow_module_level=True)
sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install it)")


class Files(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The page's address on a static server, below a path of two folders."""
    folder = tmp_path_factory.mktemp("host")
    (folder / "some").mkdir()
    (folder / "some/where").symlink_to(Path(PAGE).resolve())
    serve = functools.partial(Files, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), serve) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/some/where/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser():
    with sync_api.sync_playwright() as playwright:
        yield playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])


@pytest.fixture
def open_page(browser, site):
    """Opens a part of the page; at the end: no error on the console, no request elsewhere.

    `refused` is a file that the server does not give, `served` are texts that it gives instead of
    files: {file: text}.
    """
    faults, pages, meant = [], [], []

    def open_part(part="", refused=None, served={}, **how):
        how = {"viewport": {"width": 1280, "height": 900}, "reduced_motion": "reduce", **how}
        page = browser.new_context(**how).new_page()
        pages.append(page)
        page.set_default_timeout(90_000)
        page.on("console", lambda m: m.type in ("error", "warning") and faults.append(m.text))
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("requestfailed", lambda request: faults.append(f"failed {request.url}"))
        page.on("request", lambda request: request.url.startswith(("blob:", "data:"))
                or urlsplit(request.url).netloc == urlsplit(site).netloc
                or faults.append(f"elsewhere {request.url}"))
        if refused:
            page.route(f"**/{refused}", lambda route: route.fulfill(status=503))
            meant.extend([refused, "503"])
        for file, text in served.items():
            page.route(f"**/{file}", answering(text))
        page.goto(f"{site}{part}")
        return page

    yield open_part
    for page in pages:
        page.context.close()
    faults = [fault for fault in faults if not any(part in fault for part in meant)]
    assert not faults, faults  # what a test module asserts pytest would show by itself


def answering(text):
    return lambda route: route.fulfill(body=text)


def content(image, kind, **how):
    """The bytes of a Pillow image's file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **how)
    return buffer.getvalue()


def drop(page, name, bytes_, kind, on="#drop"):
    """Drop a file onto the page, as a hand would; whether the page took it from the browser."""
    return page.evaluate("""([name, content, kind, on]) => {
      const dataTransfer = new DataTransfer();
      const bytes = Uint8Array.from(atob(content), (c) => c.charCodeAt(0));
      dataTransfer.items.add(new File([bytes], name, {type: kind}));
      return !document.querySelector(on).dispatchEvent(new DragEvent("drop",
        {dataTransfer, bubbles: true, cancelable: true})); }""",
                         [name, base64.b64encode(bytes_).decode(), kind, on])
