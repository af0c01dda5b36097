"""A headless Chromium, and pages that must stay silent: no message on the console, no request, no dialog."""

import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NoReturn

import pytest
from playwright.sync_api import Browser, Page, Playwright, expect, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run", "--disable-quic"]
MISSING = "no Chromium here: apt-get install chromium, or playwright install chromium"
PATIENCE = 10 * 60_000
"""Milliseconds after which a page counts as hanging, so that a test that looks for what is not there still says so."""

Open = Callable[..., Page]


def find(play: Playwright) -> str | None:
    """The system's own browser, or else the one that Playwright has fetched."""
    own = play.chromium.executable_path
    return next(filter(None, map(shutil.which, NAMES)), None) or (own if Path(own).exists() else None)


def refuse() -> NoReturn:
    """Without a browser these tests are skipped, but never where every test must run."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(MISSING)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=PATIENCE)
    with sync_playwright() as play:
        path = find(play) or refuse()
        with play.chromium.launch(executable_path=path, args=FLAGS, timeout=PATIENCE) as chromium:
            yield chromium


@pytest.fixture
def opened(browser: Browser) -> Iterator[Open]:
    """Opens a file: `opened(path, width=1400, scheme="light", script=True, at="")`."""
    contexts, said = [], []

    def open_page(path: Path, width: int = 1400, scheme: str = "light", script: bool = True, at: str = "") -> Page:
        context = browser.new_context(
            viewport={"width": width, "height": 900},
            color_scheme=scheme,
            reduced_motion="reduce",
            java_script_enabled=script,
            accept_downloads=False,
        )
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE)
        address = path.as_uri()
        page.on("console", lambda message: said.append(f"console: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("dialog", lambda dialog: (said.append(f"dialog: {dialog.message}"), dialog.dismiss()))
        page.on(
            "request",
            lambda request: (
                None
                if request.url.partition("#")[0] == address or request.url.startswith("data:")
                else said.append(f"request: {request.url[:100]}")
            ),
        )
        page.goto(address + at)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
