"""The page in headless Chromium, against ONNX Runtime and predict.py: `make test-page`."""

import functools
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from browsing import PAGE, browser, content, drop, open_page, site  # noqa: F401 -- fixtures
from PIL import Image

import predict

ROOT = Path(__file__).parent.parent
INDEX = json.loads((Path(PAGE) / "models/index.json").read_text())
FOUND = """() => { const one = globalThis.probe?.shift?.found();
  return one && {...one, grid: [...one.grid], answers: one.answers.map((a) => a &&
    {probabilities: a.probabilities, maps: [...a.maps]})} }"""
DOWNS = ("maxpool", "stride", "blurpool")


# ---- the first part ----

def answers(page, x, y, roll=(0, 0)):
    """What the page says of the garment at (x, y), once it has said it."""
    page.wait_for_function(f"() => {{ const one = globalThis.probe?.shift?.found(); return one &&"
                           f" one.x === {x} && one.y === {y} && one.roll[0] === {roll[0]} &&"
                           f" one.roll[1] === {roll[1]} }}")
    return page.evaluate(FOUND)


def tiles(name, rows):
    """The images of a sprite, uint8 (rows * 10, 28, 28)."""
    picture = np.asarray(Image.open(ROOT / f"web/images/{name}.png").convert("L"))
    return picture.reshape(rows, 28, 10, 28).transpose(0, 2, 1, 3).reshape(-1, 28, 28)


def grid(garment, digits, x, y, roll):
    """The grid by the page's rules, in NumPy."""
    home = (x >= 14) + 2 * (y >= 14)
    cells = [-1, 0, 1, 2]
    cells[0], cells[home] = cells[home], cells[0]
    full = np.zeros((56, 56), np.uint8)
    for cell, digit in enumerate(cells):
        if digit >= 0:
            top, left = 28 * (cell // 2), 28 * (cell % 2)
            full[top:top + 28, left:left + 28] = tiles("digits", 3)[digits[digit]]
    part = full[y:y + 28, x:x + 28]
    np.maximum(part, tiles("garments", 4)[garment], out=part)
    return np.roll(full, (roll[1], roll[0]), (0, 1))


@functools.cache
def session(file):
    return onnxruntime.InferenceSession(Path(PAGE) / "models" / file)


def expected(image, down, kind, tie):
    """Probabilities (10,), maps (10, 14, 14) of ONNX Runtime in Python; None: no such network."""
    for one in INDEX["files"]:
        for network in one["networks"]:
            if (network.get("down"), network["kind"], network.get("tie")) == (down, kind, tie):
                logits, maps = session(one["file"]).run(None, {"images": image[None, None]})
                part = slice(10 * network["head"], 10 * network["head"] + 10)
                odds = np.exp(logits[0, part] - logits[0, part].max())
                return odds / odds.sum(), maps[0, part]
    return None


def check(found, state, x, y, roll=(0, 0)):
    image = np.array(found["grid"], np.uint8).reshape(56, 56)
    assert np.array_equal(image, grid(state["garment"], state["digits"], x, y, roll))
    for down, said in zip(DOWNS, found["answers"]):
        exact = expected(image, down, state["kind"], state["tie"])
        assert (exact is None) == (said is None)
        if exact is not None:
            assert np.abs(np.array(said["probabilities"]) - exact[0]).max() < 1e-3
            assert np.abs(np.array(said["maps"]).reshape(10, 14, 14) - exact[1]).max() < 1e-3
    return [None if said is None else said["probabilities"] for said in found["answers"]]


def test_a_dragged_garment_is_what_onnx_runtime_says(open_page):
    """Ten places, by the mouse: the grid byte for byte, probabilities and maps to 1e-3."""
    page = open_page()
    answers(page, 0, 0)
    state = page.evaluate("probe.shift.state")
    box = page.locator("#grid").bounding_box()
    pixel, at, seen = box["width"] / 56, (box["x"] + 60, box["y"] + 60), set()
    places = [(1, 0), (4, 0), (9, 3), (14, 0), (13, 14), (28, 2), (28, 28), (3, 28), (0, 13),
              (7, 7)]
    for x, y in places:
        here = page.evaluate("[probe.shift.state.x, probe.shift.state.y]")
        page.mouse.move(*at)
        page.mouse.down()
        # a hair past the pixel, as a hand is
        page.mouse.move(at[0] + (x - here[0]) * pixel + np.sign(x - here[0]) * 0.3,
                        at[1] + (y - here[1]) * pixel + np.sign(y - here[1]) * 0.3, steps=3)
        page.mouse.up()
        probabilities = check(answers(page, x, y), state, x, y)
        seen.add(str(probabilities))
    assert len(seen) == len(places)  # each move changed something
    assert len(page.evaluate("probe.shift.trace")) >= len(places) + 1
    assert page.locator("#trace polyline").count() == 3
    said = page.locator(".card .verdict").first.inner_text()
    assert said.endswith(f"{100 * max(probabilities[0]):.0f}\u202f%")


def test_the_keyboard_alone_moves_rolls_and_chooses(open_page):
    page = open_page()
    answers(page, 0, 0)
    page.locator("#grid").focus()
    for key in ("ArrowRight", "ArrowRight", "ArrowDown", "Shift+ArrowRight", "ArrowLeft"):
        page.keyboard.press(key)
    state = page.evaluate("probe.shift.state")
    check(answers(page, 27, 1), state, 27, 1)
    page.locator("input[value=grid]").focus()
    page.keyboard.press("Space")
    page.locator("#grid").focus()
    for key in ("ArrowUp", "ArrowLeft", "Shift+ArrowDown"):
        page.keyboard.press(key)
    check(answers(page, 27, 1, (55, 27)), state, 27, 1, (55, 27))
    page.locator("#garments button").nth(9).focus()
    page.keyboard.press("Enter")
    page.locator("#slots button").nth(2).focus()
    page.keyboard.press("Enter")
    page.locator("#digits button").nth(23).focus()
    page.keyboard.press("Enter")
    state = page.evaluate("probe.shift.state")
    assert (state["garment"], state["digits"][2]) == (9, 23)
    check(answers(page, 27, 1, (55, 27)), state, 27, 1, (55, 27))


KINDS = {f"{network['kind']}-{network['tie']}" for one in INDEX["files"]
         for network in one["networks"] if "tie" in network}


@pytest.mark.parametrize("network", sorted(KINDS - {"frozen-0"}))
def test_every_network_answers(open_page, network):
    page = open_page()
    offered = page.locator("#surrogate option")
    before = check(answers(page, 0, 0), page.evaluate("probe.shift.state"), 0, 0)
    assert {option.get_attribute("value") for option in offered.all()} == KINDS
    page.select_option("#surrogate", network)
    page.wait_for_function("probe.shift.found() && probe.shift.trace.length === 1")
    state = page.evaluate("probe.shift.state")
    assert f"{state['kind']}-{state['tie']}" == network
    assert check(answers(page, 0, 0), state, 0, 0) != before
    assert page.locator("#tied").is_visible() == network.endswith("0.9")


def test_it_stays_live(open_page, capsys):
    """While three networks run, frames come at ten a second or more. Times are of the machine."""
    page = open_page()
    page.wait_for_function("globalThis.probe?.shift?.found()")
    first = page.evaluate("performance.now()")
    start = "globalThis.frames_ = []; const tick = (t) => { frames_.push(t);" \
            " requestAnimationFrame(tick); }; requestAnimationFrame(tick);"
    page.evaluate(f"() => {{ {start} }}")
    page.locator("#slide").click()
    page.wait_for_function("probe.shift.trace.length === 29")
    frames = np.diff(page.evaluate("frames_"))
    with capsys.disabled():
        print(f"\nfirst answer {first / 1000:.1f} s after the page was asked for; then "
              f"{1000 / np.median(frames):.0f} frames and {28e3 / frames.sum():.1f} answers of "
              f"three networks a second")
    assert np.median(frames) <= 100
    check(answers(page, 28, 0), page.evaluate("probe.shift.state"), 28, 0)


# ---- the second ----

def photos():
    """Files of other sizes and kinds than the network's, one turned by its EXIF tag."""
    names = sorted((ROOT / "web/images/facades").iterdir())
    images = [Image.open(name) for name in names]
    exif = Image.Exif()
    exif[0x0112] = 6
    return {names[0].name: names[0].read_bytes(),
            "wide.png": content(images[1].resize((611, 300)), "PNG"),
            "tall.jpg": content(images[2].resize((200, 450)), "JPEG", quality=90),
            "small.png": content(images[3].resize((90, 70)), "PNG"),
            "turned.jpg": content(images[4].resize((480, 320)), "JPEG", quality=92, exif=exif)}


def test_masks_are_those_of_predict(open_page, tmp_path, capsys):
    """Dropped, predicted, downloaded: at least 99.9 % of the pixels of predict.py's mask."""
    page = open_page("#facade")
    page.wait_for_function("globalThis.probe?.facade?.shown()")
    for name, bytes_ in photos().items():
        (tmp_path / name).write_bytes(bytes_)
        drop(page, name, bytes_, "image/png" if name.endswith("png") else "image/jpeg")
        page.wait_for_function(f"probe.facade.shown().name === {name!r}")
        with page.expect_download() as waiting:
            page.locator("#download").click()
        assert waiting.value.suggested_filename == f"{Path(name).stem}.png"
        predict.main(["--model", str(Path(PAGE) / "models/facade.onnx"), "--out",
                      str(tmp_path / "masks"), str(tmp_path / name)])
        found, exact = Image.open(waiting.value.path()), Image.open(
            tmp_path / "masks" / f"{Path(name).stem}.png")
        assert found.mode == "P" and found.size == exact.size
        assert found.getpalette()[:15] == exact.getpalette()[:15]
        same = (np.asarray(found) == np.asarray(exact)).mean()
        with capsys.disabled():
            print(f"\n{name} {found.size}: {100 * same:.3f} % of the mask's pixels are equal")
        assert same >= 0.999
        shares = page.locator("#legend output").all_inner_texts()
        counts = np.bincount(np.asarray(found).ravel(), minlength=5) / found.width / found.height
        assert shares == [f"{100 * share:.1f} %" for share in counts]
    assert not page.locator("#facade-error").is_visible()


def test_classes_and_opacity_change_what_is_seen(open_page):
    page = open_page("#facade")
    page.wait_for_function("globalThis.probe?.facade?.shown()")
    look = lambda: page.evaluate("document.getElementById('photo').toDataURL()")
    whole = look()
    page.locator("#legend input").nth(3).uncheck()
    without = look()
    page.locator("#opacity").fill("0")
    assert len({whole, without, look()}) == 3


def test_what_is_no_photo_is_refused_in_a_line(open_page):
    page = open_page("#facade")
    page.wait_for_function("globalThis.probe?.facade?.shown()")
    line = page.locator("#facade-error")
    for name, bytes_, kind in (("notes.txt", b"no photo at all", "text/plain"),
                               ("cut.png", photos()["small.png"][:60], "image/png")):
        drop(page, name, bytes_, kind)
        page.wait_for_function(f"document.getElementById('facade-error').innerText"
                               f".startsWith({name!r})")
        assert line.is_visible() and "cannot be read as an image" in line.inner_text()
        assert "\n" not in line.inner_text()
    drop(page, "good.png", photos()["small.png"], "image/png")
    page.wait_for_function("probe.facade.shown().name === 'good.png'")
    assert not line.is_visible()


def test_a_sample_that_comes_late_replaces_no_later_photo(open_page):
    page = open_page("#facade")
    page.wait_for_function("globalThis.probe?.facade?.shown()")
    page.evaluate("""() => {
      const now = fetch;
      globalThis.fetch = async (...what) => {
        if (String(what[0]).includes("/facades/"))
          await new Promise((done) => { globalThis.comes = done; });
        return now(...what);
      };
    }""")
    page.locator("#photos button").nth(1).click()
    page.wait_for_function("!!globalThis.comes")
    drop(page, "good.png", photos()["small.png"], "image/png")
    page.wait_for_function("probe.facade.shown().name === 'good.png'")
    page.evaluate("comes()")
    page.wait_for_timeout(1500)
    assert page.evaluate("probe.facade.shown().name") == "good.png"
    assert page.locator("#facade-time").inner_text().startswith("good.png")


def test_a_photo_too_large_for_a_canvas_gets_no_mask(open_page):  # in Chromium 65,535 a side
    page = open_page("#facade")
    page.wait_for_function("globalThis.probe?.facade?.shown()")
    before = page.evaluate("probe.facade.shown().name")
    drop(page, "tall.png", content(Image.new("L", (100, 70_000), 9), "PNG"), "image/png")
    page.wait_for_function("document.getElementById('facade-error').innerText")
    assert page.locator("#facade-error").inner_text() == (
        "tall.png cannot be read as an image (more pixels a side than this browser draws): choose "
        "a photo.")
    assert page.evaluate("probe.facade.shown().name") == before


def test_a_broken_worker_fails_its_own_requests_alone(open_page):
    page = open_page("#tables")
    said = page.evaluate("""async () => {
      const [made, said] = [[], []];
      globalThis.Worker = class {
        constructor() { made.push(this); }
        postMessage({ id }) { this.id = id; }
        terminate() {}
      };
      Object.defineProperty(navigator, "hardwareConcurrency", { value: 2 });
      const { prepare } = await import(new URL("js/nets.js?alone", document.baseURI));
      const note = (name, asked) => asked.then(() => "done", (error) => error.message)
        .then((how) => said.push(`${name} ${how}`));
      const both = [note("first", prepare(0, "a")), note("second", prepare(1, "b"))];
      made[0].onerror({ preventDefault() {}, message: "broken" });
      made[1].onmessage({ data: { id: made[1].id } });
      await Promise.all(both);
      const again = note("again", prepare(0, "a"));
      made[2]?.onmessage({ data: { id: made[2].id } });
      await Promise.race([again, new Promise((done) => setTimeout(done, 500))]);
      return said;
    }""")
    assert said == ["first broken", "second done", "again done"]


# ---- the third ----

def test_tables_sort_and_show_their_seeds(open_page):
    tables = json.loads((Path(PAGE) / "data/tables.json").read_text())
    page = open_page("#tables")
    page.select_option("#protocol", "desk")
    rows = page.locator("#table tbody tr")
    shown = tables["desk"]["table1"]["rows"]
    assert rows.count() == len(shown)
    rows.nth(3).hover()
    detail = page.locator("#detail").inner_text()
    for seed, value in shown[3]["columns"]["test"]["own"].items():
        assert f"seed {seed} {value:.2f} %" in detail
    assert shown[3]["command"] in detail
    page.locator("[data-sort='test.mean']").click()
    best = max(shown[1:], key=lambda row: row["columns"]["test"]["mean"])
    assert rows.nth(1).get_attribute("data-row") == best["row"]
    assert rows.nth(0).get_attribute("data-row") == shown[0]["row"]
    page.select_option("#which", "claims")
    assert rows.count() == len(tables["desk"]["claims"])
    said = (ROOT / "results/desk/claims.md").read_text().splitlines()
    for one in tables["desk"]["claims"]:
        shown = page.locator(f"tr[data-row={one['claim']}]").inner_text()
        line = next(line for line in said if line.startswith(f"| {one['claim']} "))
        effect = line.split(" | ")[1].split(", `")[0]  # "+0.57 wgap"
        assert one["verdict"] in shown and f"**{one['verdict']}**" in line
        assert all(part in shown.replace("−", "-") for part in effect.split())


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("part", ["shift", "facade", "tables"])
def test_a_phone_sees_it_all(open_page, part, scheme):
    """Nothing is wider than the screen, and text stands out from what is behind it."""
    page = open_page(f"#{part}", viewport={"width": 360, "height": 780}, color_scheme=scheme)
    ready = {"shift": "globalThis.probe?.shift?.found()", "tables": "document.querySelector('td')",
             "facade": "globalThis.probe?.facade?.shown()"}[part]
    page.wait_for_function(ready)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    colours = page.evaluate("""() => ["color", "background-color"].map((name) =>
      getComputedStyle(document.body).getPropertyValue(name).match(/\\d+/g).map(Number))""")
    ink, paper = (np.mean(colour) for colour in colours)
    assert abs(ink - paper) > 150 and (ink > paper) == (scheme == "dark")
