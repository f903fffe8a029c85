"""Chromium without a window, for the tests of the interactive page; where it is not installed they are skipped.

Every page is offline, and every request but for itself, every message on its console and every error fails the test.
"""

import contextlib
import os
import shutil

import pytest

CHROMIUM = shutil.which("chromium")
if not CHROMIUM and os.environ.get("REQUIRE_CHROMIUM"):
    raise RuntimeError("there is no chromium here, and REQUIRE_CHROMIUM asks for the tests that need it")

try:
    from playwright import sync_api
except ImportError:
    sync_api = None

needed = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="needs chromium, as from apt install chromium"),
    pytest.mark.skipif(sync_api is None, reason="needs playwright, as from pip install playwright"),
]

FINISH = """void (globalThis.finish = (generator) => {  // returns what a generator returns, without a pause
  for (;;) {
    const {done, value} = generator.next();
    if (done) return value;
  }
})"""
DESKTOP, PHONE = {"width": 1440, "height": 900}, {"width": 390, "height": 844}


@contextlib.contextmanager
def chromium():
    """Yields the browser."""
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, address, viewport=None, theme="light", **options):
    """Yields a page once it is ready; afterwards it must have asked for nothing and complained of nothing."""
    context = browser.new_context(viewport=viewport or DESKTOP, color_scheme=theme, **options)
    page, requests, complaints = context.new_page(), [], []
    page.on("request", lambda request: requests.append(request.url))
    page.on("console", lambda message: complaints.append(message.text))
    page.on("pageerror", lambda error: complaints.append(str(error)))
    page.goto(address)
    page.wait_for_selector("body[data-ready]", timeout=60_000)
    page.evaluate(FINISH)
    if address.startswith("file:"):
        context.set_offline(True)
    try:
        yield page
    finally:
        context.close()
        if complaints:
            print("the page complained:", *complaints, sep="\n")
    asked = [
        url
        for url in requests
        if url.partition("#")[0] != address.partition("#")[0] and url[:5] not in ("data:", "blob:")
    ]
    assert asked == []
    assert complaints == []


def written(folder, text):
    """Returns the file:// address of a page, once it is written."""
    path = folder / "page.html"
    path.write_text(text)
    return path.as_uri()
