"""The page in hands, under keys and when something fails: `make test-page`."""

import json
from pathlib import Path

import pytest
from browsing import PAGE, browser, content, drop, open_page, site  # noqa: F401 -- fixtures
from PIL import Image

PHONE = {"viewport": {"width": 360, "height": 780}, "has_touch": True, "is_mobile": True}
READY = {"shift": "globalThis.probe?.shift?.found()", "tables": "document.querySelector('td')",
         "facade": "globalThis.probe?.facade?.shown()"}


@pytest.fixture
def show(open_page):  # noqa: F811
    """Opens a part, and waits until it is there."""
    def opened(part, **how):
        page = open_page(f"#{part}", **how)
        page.wait_for_function(READY[part])
        return page

    return opened


# ---- tables ----

def row_of(page, name):
    return page.locator(f"#table tr[data-row='{name}']")


def copied(page):
    """Makes what is copied readable to the test."""
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: {writeText: async (text)"
                  " => { globalThis.copied_ = text; }}})")
    return lambda: page.evaluate("globalThis.copied_")


def test_a_row_that_was_clicked_keeps_its_command(show):
    page = show("tables")
    text, command = copied(page), "make table1/stride-2-32 PROTOCOL="
    row_of(page, "stride-2-32").click()
    row_of(page, "stride-1-32").hover()  # on the way to the button
    page.locator("[data-copy]").click()
    assert text().startswith(command)
    assert page.locator("[data-copy]").inner_text() == "Copied"
    page.locator("[data-close]").click()
    row_of(page, "stride-1-32").hover()
    assert "stride-1-32" in page.locator("#detail").inner_text()


def test_the_keyboard_reaches_a_rows_command(show):
    page = show("tables")
    text = copied(page)
    row_of(page, "stride-2-32").focus()
    page.keyboard.press("Enter")
    page.keyboard.press("Enter")  # on the button
    page.wait_for_function("globalThis.copied_")
    assert text().startswith("make table1/stride-2-32 ")
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.dataset.row") == "stride-2-32"
    page.locator("[data-sort='test.mean']").focus()
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.dataset.sort") == "test.mean"


def test_without_a_clipboard_the_command_is_selected(show):
    page = show("tables")
    page.evaluate("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    row_of(page, "stride-2-32").click()
    page.locator("[data-copy]").click()
    page.wait_for_function("getSelection().toString().startsWith('make table1/stride-2-32 ')")
    assert "Copied" not in page.locator("#detail").inner_text()


def test_another_protocol_shows_the_same_row_again(show):
    tables = json.loads((Path(PAGE) / "data/tables.json").read_text())
    of_desk = json.dumps(tables["desk"])
    both = {"desk": tables["desk"], "report": json.loads(of_desk.replace("=desk", "=report"))}
    page = show("tables", served={"data/tables.json": json.dumps(both)})
    for protocol in ("desk", "report"):
        page.select_option("#protocol", protocol)
        page.mouse.move(0, 0)
        row_of(page, "stride-1-32").hover()
        assert f"make table1/stride-1-32 PROTOCOL={protocol}" in \
            page.locator("#detail").inner_text()


def test_a_claim_leaves_the_rest_of_a_phone_free(show):
    """C1 compares sixteen rows: its detail scrolls, and goes."""
    page = show("tables", **PHONE)
    page.select_option("#which", "claims")
    row_of(page, "C1").tap()
    assert page.locator("[data-close]").is_visible()
    assert page.locator("#detail").bounding_box()["height"] <= 0.4 * 780 + 1
    page.locator("#which").scroll_into_view_if_needed()
    page.select_option("#which", "table2")
    row_of(page, "unet").tap()
    page.locator("[data-close]").tap()
    assert "make" not in page.locator("#detail").inner_text()


# ---- shift ----

def test_a_drag_past_the_border_comes_back_with_the_pointer(show):
    page = show("shift")
    box = page.locator("#grid").bounding_box()
    pixel, x, y = box["width"] / 56, box["x"] + 9, box["y"] + 9
    place = "[probe.shift.state.x, probe.shift.state.y]"
    page.mouse.move(x, y)
    page.mouse.down()
    page.mouse.move(x + 50.5 * pixel, y, steps=5)
    assert page.evaluate(place) == [28, 0]
    page.mouse.move(x + 20.5 * pixel, y, steps=5)
    assert page.evaluate(place) == [20, 0]
    page.mouse.up()
    page.mouse.move(x, y)
    page.mouse.down(button="right")
    page.mouse.move(x + 5 * pixel, y)
    page.mouse.up(button="right")
    assert page.evaluate(place) == [20, 0]
    page.locator("#slide").click()  # to the farther border, and no further
    page.wait_for_function("probe.shift.state.x === 0 && probe.shift.found()?.x === 0")


def test_who_sees_nothing_is_told(show):
    page = show("shift")
    page.locator("#grid").focus()
    page.keyboard.press("Shift+ArrowRight")
    spoken = page.locator("#spoken")
    page.wait_for_function("document.getElementById('spoken').textContent.includes('28 right')")
    assert spoken.get_attribute("role") == "status"
    said = spoken.text_content()
    assert all(f"{name} {mark}" in said.replace("✗", "✓") for name, mark in
               (("max-pool", "✓"), ("stride", "✓"), ("blur pool", "✓"))), said
    for name in ("garments", "digits", "slots"):  # a tab stop each, and arrow keys
        assert page.locator(f"#{name} button[tabindex='0']").count() == 1
    page.locator("#garments button[tabindex='0']").focus()
    for key in ("ArrowRight", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    assert page.evaluate("probe.shift.state.garment") == 2 + 1 + 10


def test_a_network_that_the_page_lacks_is_no_right_answer(show):
    page = show("shift")
    page.select_option("#surrogate", "scratch-0")
    missing = page.locator(".card.missing")
    missing.first.wait_for()
    assert missing.count() == 2
    for card in missing.all():
        assert card.locator(".verdict").get_attribute("class") == "verdict faint"
        assert not card.locator("canvas").is_visible()


def test_a_fault_is_told_where_it_is_and_as_long_as_it_lasts(show):
    page = show("shift", refused="maxpool-scratch-tie0.onnx")
    line = page.locator("#shift > .failure")
    page.select_option("#surrogate", "scratch-0")
    line.wait_for()
    assert "This part does not work here" in line.inner_text()
    page.select_option("#surrogate", "frozen-0.9")
    line.wait_for(state="hidden")
    page.select_option("#surrogate", "scratch-0")
    line.wait_for()
    page.locator("#tab-tables").click()
    page.wait_for_function(READY["tables"])
    assert not page.locator(".failure").filter(visible=True).count()


def test_plots_fit_after_a_change_of_width_that_they_did_not_see(show):
    page = show("tables")
    page.locator("#tab-shift").click()
    page.wait_for_function(READY["shift"])
    page.set_viewport_size({"width": 500, "height": 900})
    page.wait_for_function(
        "document.querySelector('#trace svg').clientWidth === "
        "document.querySelector('#trace').clientWidth")
    page.locator("#tab-tables").click()
    page.wait_for_function(
        "Math.abs(document.querySelector('#table > svg').clientWidth - "
        "document.querySelector('#table').clientWidth) <= 1")


def test_the_page_stays_for_a_stray_file_or_word(show):
    page = show("shift")
    picture = content(Image.new("L", (20, 20), 9), "PNG")
    assert drop(page, "a.png", picture, "image/png", on="#grid")
    page.goto(f"{page.url.split('#')[0]}#toString")
    assert page.locator("#shift").is_visible()


# ---- facade ----

def test_a_phones_photo_is_drawn_no_larger_than_it_is_seen(show):
    page = show("facade")
    drop(page, "big.jpg", content(Image.effect_noise((4000, 3000), 60), "JPEG"), "image/jpeg")
    page.wait_for_function("probe.facade.shown().name === 'big.jpg'")
    photo = page.locator("#photo")
    assert photo.evaluate("(canvas) => [canvas.width, canvas.height]") == [1280, 960]
    assert page.evaluate("probe.facade.shown().mask.length") == 12_000_000
    label = photo.get_attribute("aria-label")
    shares = page.locator("#legend output").all_inner_texts()
    assert label.startswith("big.jpg") and all(share in label for share in shares)
