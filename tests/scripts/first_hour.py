"""Photographs what a newcomer sees: the report of a run, the page that paints with it, the docs.

    python tests/scripts/first_hour.py runs/demo --site site --out docs/images

Needs Chromium and the package `playwright`; writes report.png, demo.png (example 12, or --example)
and, with --site (what `make docs` built), site.png, all in light mode. Prints the seconds from the
command to a page that can be used, and from the click to four pictures that are read.
"""

import argparse
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from browser import CHROMIUM, opened, photograph
from playwright.sync_api import Page, expect

PATIENCE_MS = 300_000  # the model is loaded and the OCR started, on a machine with other work


def shoot_report(page: Page, run: Path, out: Path) -> None:
    """The report's first screen and a half."""
    from tasks.reports.page.document import write_report

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "report.html"
        write_report([run], file)
        page.set_viewport_size({"width": 960, "height": 930})
        page.goto(file.as_uri())
        photograph(page).save(out / "report.png", optimize=True)


@contextmanager
def painted_by(run: Path) -> Iterator[str]:
    """The address of `calligrapher demo --run RUN`, which ends with the block."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "flows.cli", "demo", "--run", run, "--port", port]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert "The page is at" in process.stdout.readline()
        yield f"http://127.0.0.1:{port}/?__theme=light"
    finally:
        process.terminate()
        process.wait()


def shoot_page(page: Page, run: Path, example: int, out: Path) -> None:
    """An example painted by base and trained model, two pictures each, and read."""
    page.set_default_timeout(PATIENCE_MS)
    page.set_viewport_size({"width": 1280, "height": 1000})
    started = time.monotonic()
    with painted_by(run) as address:
        page.goto(address)
        text = page.locator("#text textarea, #text input")
        expect(text).not_to_have_value("", timeout=PATIENCE_MS)
        opened_after = time.monotonic() - started
        before = text.input_value()
        page.locator("#source-gallery button").nth(example - 1).click()
        if example > 1:
            expect(text).not_to_have_value(before, timeout=PATIENCE_MS)
        page.wait_for_timeout(3000)  # the mask comes after the text
        clicked = time.monotonic()
        page.click("#generate")
        page.wait_for_function("document.querySelectorAll('.results figcaption b').length == 4")
        painted_after = time.monotonic() - clicked
        print(f"page: {opened_after:.0f} s to its first use, {painted_after:.0f} s for 4 pictures")
        page.mouse.move(0, 0)
        height = page.evaluate("document.querySelector('#results').getBoundingClientRect().bottom")
        page.set_viewport_size({"width": 1280, "height": int(height + page.evaluate("scrollY"))})
        page.evaluate("scrollTo(0, 0)")
        photograph(page).save(out / "demo.png", optimize=True)


def shoot_site(page: Page, site: Path, out: Path) -> None:
    """A page of the docs."""
    page.set_viewport_size({"width": 1400, "height": 760})
    page.goto((site / "tutorial.html").absolute().as_uri())
    photograph(page).save(out / "site.png", optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("--site", type=Path)
    parser.add_argument("--example", type=int, default=12)
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    chosen = parser.parse_args()
    with opened(CHROMIUM) as page:
        page.emulate_media(color_scheme="light")
        shoot_report(page, chosen.run, chosen.out)
        if chosen.site:
            shoot_site(page, chosen.site, chosen.out)
        shoot_page(page, chosen.run, chosen.example, chosen.out)


if __name__ == "__main__":
    main()
