"""The page in a real browser, with the toybox: from the example to images and maps, without a request to elsewhere."""

from __future__ import annotations

import asyncio
import json
import threading

import pytest

from model.demo.command import listening, offered, page_server
from model.demo.studio import Studio
from tests.world.browser import Tab, installed, tab

PHONE, DESKTOP = 390, 1280  # px
CLICKS = 5
"""At most, ten seconds apart."""
BUTTON = "[...document.querySelectorAll('button')].find(b => b.textContent.trim().startsWith('{}'))"
SET = """(() => {{ const field = document.querySelector('input[aria-label="{}"]');
  field.value = {}; field.dispatchEvent(new Event('input', {{bubbles: true}}));
  field.dispatchEvent(new Event('change', {{bubbles: true}})); field.blur(); return field.value }})()"""


@pytest.fixture(scope="module")
def browser():
    return installed()


@pytest.fixture
def address(browser, tmp_path, monkeypatch):
    """The page of the toybox's ready adapters, served by a thread."""
    for name in ("GRADIO_ANALYTICS_ENABLED", "GRADIO_TEMP_DIR"):
        monkeypatch.setenv(name, "")  # what the server sets there is undone
    with listening(0) as door:
        server = page_server(Studio(offered(None), None, "cpu", "float32"), tmp_path)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [door]})
        thread.start()
        yield f"http://127.0.0.1:{door.getsockname()[1]}/"
        server.should_exit = True
        thread.join()


async def press(page: Tab, label: str, answer: str) -> None:
    """Click a button until the page answers, as its first listeners may come later than its buttons."""
    await page.until(BUTTON.format(label))
    for _ in range(CLICKS - 1):
        await page.value(f"{BUTTON.format(label)}.click()")
        for _ in range(100):
            if await page.value(f"!!({answer})"):
                return
            await asyncio.sleep(0.1)
    await page.value(f"{BUTTON.format(label)}.click()")
    await page.until(answer)


async def walk(page: Tab, address: str) -> None:
    await page.size(PHONE)
    await page.send("Page.navigate", url=address)
    await page.until("document.querySelector('#draw')")
    await press(page, "Generate", "document.querySelector('#status .error')")
    assert await page.value("document.querySelector('#status').textContent.trim()") == (
        "Error: the class noun is empty; write what the subject is, such as mug"
    )
    await press(page, "Example: mug", "document.querySelector('#editor img')?.naturalWidth")
    assert await page.value("document.querySelector('#noun input, #noun textarea').value") == "mug"
    first = await page.value("document.querySelector('#editor img').src")
    await page.value("document.querySelector('#editor img').scrollIntoView()")
    box = await page.value("document.querySelector('#editor img').getBoundingClientRect().toJSON()")
    for kind in ("mousePressed", "mouseReleased"):  # on the background, beside the mug
        x, y = box["x"] + 0.05 * box["width"], box["y"] + 0.5 * box["height"]
        await page.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)
    await page.until(f"document.querySelector('#editor img').src != '{first}'")
    second = await page.value("document.querySelector('#editor img').src")
    await press(page, "Undo the last click", f"document.querySelector('#editor img').src != '{second}'")
    await press(page, "More", "document.querySelector('input[aria-label=\"number input for Steps\"]')")
    for name, value in (("Images", 1), ("Steps", 4)):
        number, slider = f"number input for {name}", f"range slider for {name}"
        await page.until(f"document.querySelector('input[aria-label=\"{number}\"]')")
        await page.value(SET.format(number, value))
        await page.until(f"document.querySelector('input[aria-label=\"{slider}\"]').value == {value}")
    await page.value("document.querySelector('input[type=checkbox]').click()")
    said = await page.value("document.querySelector('#status').textContent")
    await press(page, "Generate", f"document.querySelector('#status').textContent != {json.dumps(said)}")
    await page.until("/^1 image in/.test(document.querySelector('#status').textContent.trim())")
    await page.until("document.querySelectorAll('#gallery img').length == 1")
    stored = "fetch(document.querySelector('#gallery img').src).then(a => a.blob()).then(b => b.text())"
    assert "iTXtcustomcontrast" in await page.value(stored)
    await page.until("document.querySelectorAll('#maps figure img').length >= 2")
    for width in (PHONE, DESKTOP):
        await page.size(width)
        assert await page.value("document.documentElement.scrollWidth") <= width
    broken = "[...document.images].filter(i => i.complete && !i.naturalWidth).length"
    assert await page.value(broken) == 0
    assert page.faults() == []
    assert [url for url in page.requests() if not url.startswith((address, "data:", "blob:"))] == []


@pytest.mark.slow
def test_example_becomes_an_image_with_maps_and_nothing_is_fetched_from_elsewhere(browser, address, tmp_path):
    async def visit() -> None:
        async with tab(browser, tmp_path / "profile") as page:
            await walk(page, address)

    asyncio.run(visit())
