"""The report in a real browser, where one is installed: no errors, nothing fetched, no scrolling sideways."""

import html
import json
import re
import subprocess

import pytest

from eval.report import stage as report
from eval.report.sections.scores import trials
from eval.trial.record import headline, read_results
from tests.world.browser import FLAGS, installed

PHONE, DESKTOP = 390, 1280  # px
PROBE = """<script>addEventListener("load", async () => {
  const broken = [];
  for (const i of document.images) i.loading = "eager";
  await Promise.all([...document.images].map(i => i.decode().catch(() => broken.push(i.src.slice(0, 60)))));
  parent.postMessage({name, width: innerWidth, needed: document.documentElement.scrollWidth, broken,
    images: document.images.length,
    squeezed: [...document.querySelectorAll("td, th")]
      .filter(c => c.textContent.trim().length > 20 && c.clientHeight > 4 * c.clientWidth).map(c => c.textContent),
    charts: [...document.querySelectorAll("svg")].filter(s => s.clientHeight > 40).length,
    fetched: performance.getEntriesByType("resource").map(e => e.name).filter(n => !n.startsWith("data:"))}, "*");
});</script>"""
FRAMES = """<!doctype html><body><pre></pre><script>const got = {}; onmessage = e => { got[e.data.name] = e.data;
  document.querySelector("pre").textContent = JSON.stringify(got); };</script>"""
BAD = """<!doctype html><body><img src="http://pictures.example/a.png"><img src="data:image/png;base64,AAAA">
<p style="width: 900px">wide</p>
<table><tr><td style="overflow-wrap: anywhere; max-width: 20px">
one letter a line in a narrow cell</td></tr></table>
<script>missing()</script>"""


@pytest.fixture(scope="module")
def browser():
    return installed()


BUDGETS = (20_000, 100_000, 500_000)
"""Virtual milliseconds until the browser stops. They pass quickly where it waits for another process, so on a busy
machine a page may not have reported yet."""


def seen(browser, folder, pages):
    """Open each page (name -> text, width) in a frame of that width; return what each reports, and the log."""
    frames = FRAMES
    for name, (text, width) in pages.items():
        (folder / f"{name}.html").write_text(text + PROBE, encoding="utf-8")
        frames += f'<iframe name="{name}" src="{name}.html" style="width:{width}px;height:800px;border:0"></iframe>'
    (folder / "all.html").write_text(frames, encoding="utf-8")
    found, console = {}, []
    for budget in BUDGETS:
        command = [
            browser, *FLAGS, "--host-resolver-rules=MAP * ~NOTFOUND", "--enable-logging=stderr", "--log-level=0",
            f"--user-data-dir={folder / f'profile-{budget}'}", f"--virtual-time-budget={budget}", "--dump-dom",
            (folder / "all.html").as_uri(),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        (text,) = re.findall(r"<pre>(.*?)</pre>", done.stdout, flags=re.DOTALL)
        found = json.loads(html.unescape(text) or "{}")
        console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
        if found.keys() == pages.keys():
            break
    return found, console


def test_the_page_opens_in_a_browser_without_errors_or_network_and_fits_a_phone(browser, full, tmp_path, monkeypatch):
    stored = [(result, headline(result)) for result in read_results()]
    monkeypatch.setitem(trials.__globals__, "with_weights", lambda *_: stored)  # the page shows trials of its encoders
    page = report.page(full)
    folder = tmp_path / "browser"
    folder.mkdir()
    found, console = seen(browser, folder, {"phone": (page, PHONE), "desktop": (page, DESKTOP)})
    for name, width in (("phone", PHONE), ("desktop", DESKTOP)):
        assert found[name]["needed"] <= found[name]["width"] == width, name
        assert found[name]["broken"] == found[name]["fetched"] == [], name
        assert found[name]["squeezed"] == [], name
        assert found[name]["images"] == page.count("<img")
        assert found[name]["charts"] >= 16
    assert console == []


def test_the_probe_sees_what_is_wrong_with_a_page(browser, tmp_path):
    found, console = seen(browser, tmp_path, {"bad": (BAD, PHONE)})
    assert found["bad"]["needed"] > PHONE
    assert found["bad"]["fetched"] == ["http://pictures.example/a.png"]
    assert len(found["bad"]["broken"]) == 2
    assert found["bad"]["squeezed"] == ["\none letter a line in a narrow cell"]
    assert any("missing is not defined" in line for line in console)
