"""A report in a headless browser: no request, no error, nothing too wide, and a slider that
slides."""

from pathlib import Path

import pytest

pytest.importorskip("playwright", reason="the package playwright is not installed")

from browser import CHROMIUM, opened

from tasks.reports.page.document import write_report

FAINT_WORDS = (Path(__file__).parents[3] / "flows/demo/faint_words.js").read_text()
SCREENS = {(1280, "light"): "rgb(255, 255, 255)", (360, "dark"): "rgb(20, 23, 29)"}


@pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH")
def test_a_report_fits_its_screen_asks_nobody_and_slides(train, tmp_path):
    runs = {"a": 3, "b": 4}
    folders = [train(n, seed=s, rounds=1, evaluate={"every": 1})[0] for n, s in runs.items()]
    write_report(folders, tmp_path / "report.html")
    asked, errors = [], []
    with opened(CHROMIUM) as page:
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda said: errors.append(said.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        for (width, scheme), paper in SCREENS.items():
            page.set_viewport_size({"width": width, "height": 800})
            page.emulate_media(color_scheme=scheme, media="screen")
            page.goto((tmp_path / "report.html").as_uri())
            assert page.evaluate("document.documentElement.scrollWidth") <= width
            assert page.evaluate(FAINT_WORDS) == {}
            assert background(page) == paper
            slide(page.locator(".frames").first)
            page.emulate_media(color_scheme=scheme, media="print")
            assert background(page) == "rgb(255, 255, 255)"
            printed = page.locator(".frames").first.locator("figure:visible")
            assert printed.count() == 2, "the first and the last"
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []
    assert errors == []


def slide(frames):
    """Move the slider from the last picture, which is shown first, to the first."""
    shown, label = frames.locator("figure.shown img"), frames.locator("output")
    last = shown.get_attribute("src")
    assert label.inner_text() == "after 1 round"
    frames.locator("input").fill("0")
    assert label.inner_text() == "before training"
    assert shown.count() == 1
    assert shown.get_attribute("src") != last


def background(page):
    return page.evaluate("getComputedStyle(document.body).backgroundColor")
