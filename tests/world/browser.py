"""A real browser without a window: Chromium, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import shutil
import subprocess
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update",
)  # fmt: skip
PATIENCE = 120
"""Seconds until something is given up that a busy machine may do late."""


def installed() -> str:
    """Path of a browser; skips the test where there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None:
        pytest.skip(f"no browser on this machine ({', '.join(NAMES)})")
    return found


class Tab:
    """A tab, by its DevTools connection; `events` are those that came so far."""

    def __init__(self, connection: aiohttp.ClientWebSocketResponse) -> None:
        self.connection, self.count = connection, 0
        self.events: list[dict[str, Any]] = []

    async def send(self, method: str, **params: Any) -> dict[str, Any]:
        """The result of a DevTools command."""
        self.count += 1
        await self.connection.send_json({"id": self.count, "method": method, "params": params})
        while True:
            message = await self.connection.receive_json(timeout=PATIENCE)
            if message.get("id") == self.count:
                return message["result"]
            self.events.append(message)

    async def value(self, script: str) -> Any:
        """The value of a JavaScript expression."""
        answer = await self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    async def until(self, script: str) -> None:
        """Wait until a JavaScript expression is true."""
        end = time.monotonic() + PATIENCE
        while not await self.value(f"!!({script})"):
            if time.monotonic() > end:
                raise AssertionError(f"{script}: {await self.value('document.body.innerText')}")
            await asyncio.sleep(0.1)

    async def size(self, width: int, height: int = 900) -> None:
        """Set the page's size in pixels."""
        await self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False
        )

    def requests(self) -> list[str]:
        """Addresses of all that the page asked for."""
        asked = [event["params"] for event in self.events if event["method"] == "Network.requestWillBeSent"]
        return [event["request"]["url"] for event in asked]

    def faults(self) -> list[str]:
        """Errors and exceptions in the console."""
        entries = [event["params"]["entry"] for event in self.events if event["method"] == "Log.entryAdded"]
        found = [entry["text"] for entry in entries if entry["level"] == "error"]
        thrown = [event["params"] for event in self.events if event["method"] == "Runtime.exceptionThrown"]
        return found + [str(event["exceptionDetails"]) for event in thrown]


@asynccontextmanager
async def tab(browser: str, profile: Path) -> AsyncIterator[Tab]:
    """A tab of a fresh browser, which reaches this machine only."""
    here = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    command = [browser, *FLAGS, here, "--remote-debugging-port=0", f"--user-data-dir={profile}", "about:blank"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        place, end = profile / "DevToolsActivePort", time.monotonic() + PATIENCE
        while not (place.exists() and "\n" in place.read_text()):
            assert time.monotonic() < end and process.poll() is None, "the browser does not start"
            await asyncio.sleep(0.1)
        address = f"http://127.0.0.1:{place.read_text().splitlines()[0]}/json/list"
        async with aiohttp.ClientSession() as session:
            async with session.get(address) as answer:
                pages = [one for one in await answer.json(content_type=None) if one["type"] == "page"]
            async with session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0) as connection:
                opened = Tab(connection)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await opened.send(f"{domain}.enable")
                yield opened
    finally:
        process.terminate()
        process.wait(timeout=PATIENCE)
