"""A headless Chromium that visits pages and photographs them."""

import io
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

from PIL import Image
from playwright.sync_api import Page, sync_playwright

CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
_PATIENCE_MS = 60_000  # of a busy machine; idle, a page takes three seconds
# On a first visit MLflow opens a panel over the page's right third.
_NO_PANEL = """
    localStorage.setItem("mlflow.assistant.fab.autoOpenedOnFirstLoad_v1", "true");
    localStorage.setItem("mlflow.assistant.panelOpen_v1", "false");
"""


@contextmanager
def opened(chromium: str) -> Iterator[Page]:
    """A page of a browser that ends with the block."""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1200, "height": 700})
        page.set_default_timeout(_PATIENCE_MS)
        page.add_init_script(_NO_PANEL)
        yield page
        browser.close()


def photograph(page: Page) -> Image.Image:
    """What the window shows, once it stands still."""
    page.wait_for_timeout(1500)  # fonts, and the end of what moves
    return Image.open(io.BytesIO(page.screenshot())).convert("RGB")
