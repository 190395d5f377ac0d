"""The real command, looked at in a real browser: a person paints, types, presses Generate and
compares."""

import base64
import contextlib
import io
import itertools
import os
import shutil
import signal
import socket
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlsplit

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from calligrapher.data.dataset import load_cases
from calligrapher.data.images import load_rgb
from flows.cli.main import main

ROOT = Path(__file__).parents[3]
CHROMIUMS_OWN = "No draw texture found for layer"  # of its compositor, on no fault of the page
CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
PATIENCE_MS, TRY_MS = 120_000, 5_000  # for a busy machine; idle, each step takes a few seconds
FAINT_WORDS = (Path(__file__).parent / "faint_words.js").read_text()
ON_SCREEN = """() => {
  const [heading, first] = ['#results h2', '.results figure'].map(
    part => document.querySelector(part).getBoundingClientRect());
  return heading.top >= -1 && first.bottom <= innerHeight;
}"""
LOOPBACK = ("127.0.0.1", "::1")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of the tiny model: two steps of warm-up, one round without rewards."""
    pytest.importorskip("gradio", reason="the extra `demo` is not installed")
    from calligrapher.data.canvas import Canvas
    from tasks.artifacts.layout import RunsDir
    from tasks.params.run_params import load_params
    from tasks.resources.rewards import RewardScorer
    from tasks.runs.run import open_run, resources_of

    settings = {
        "rounds": 1,
        "warmup.steps": 2,
        "warmup.learning_rate": 0.02,
        "rollout.num_cases": 2,
        "rollout.num_images_per_prompt": 2,
        "rollout.num_inference_steps": 4,
        "reward.disable_reward_model": "true",
        "evaluate.every": 0,
        "tracking.enabled": "false",
    }
    runs = tmp_path_factory.mktemp("runs")
    params = load_params(
        ROOT / "params/tiny-nft.yaml", [f"{key}={value}" for key, value in settings.items()]
    )
    scorer = RewardScorer(params.reward, [], Canvas(96, 32, False))
    with open_run(resources_of(params, RunsDir(runs), scorer), runs / "short") as opened:
        opened.make_planned()
    return opened.folder.path


@pytest.fixture
def demo(run, tmp_path):
    """(address, process) of the running command; its temporary folders lie in `tmp_path`."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = "from flows.cli.main import main; raise SystemExit(main())"
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TMPDIR": str(tmp_path)}
    process = subprocess.Popen(
        [sys.executable, "-c", command, "demo", "--run", run, "--port", str(port)],
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    try:
        assert (
            process.stdout.readline()
            == f"The page is at http://127.0.0.1:{port} (Ctrl-C ends it).\n"
        )
        yield f"http://127.0.0.1:{port}", process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def page():
    """A page of a browser. All that it asks for must be on this machine, and nothing may go wrong
    in it."""
    from playwright.sync_api import sync_playwright

    asked, errors = [], []

    def heard(said):
        if said.type == "error" and said.text != CHROMIUMS_OWN:
            errors.append(said.text)

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1280, "height": 1000})
        page.set_default_timeout(PATIENCE_MS)
        page.on("request", lambda request: asked.append(urlsplit(request.url)))
        page.on("console", heard)
        page.on("pageerror", lambda error: errors.append(str(error)))
        yield page
        browser.close()
    assert {url.hostname for url in asked if url.scheme not in ("data", "blob")} == {"127.0.0.1"}
    assert errors == []


def drag(page, length):
    """Paint from left to right through the middle of the canvas, `length` pixels of the screen."""
    canvas = page.locator("#canvas canvas").first
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    page.mouse.move(x - length / 2, y)
    page.mouse.down()
    page.mouse.move(x + length / 2, y, steps=10)
    page.mouse.up()


def upload(page, button, path):
    with page.expect_file_chooser() as chooser:
        page.get_by_text(button, exact=True).click()
    chooser.value.set_files(path)


def problem(page, text):
    """Press Generate until the page says what must hold: what was done before it may still be on
    its way."""
    from playwright.sync_api import TimeoutError

    for _ in range(PATIENCE_MS // TRY_MS):
        page.click("#generate")
        with contextlib.suppress(TimeoutError):
            return page.locator(".problem", has_text=text).wait_for(timeout=TRY_MS)
    pytest.fail(f"the page does not say: {text}")


def painted(page, variant):
    """The pictures of a variant, as arrays [H, W, 3]."""
    found = page.locator(f'figure[data-variant="{variant}"] img').all()
    sources = [img.get_attribute("src").partition("base64,")[2] for img in found]
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in sources]


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_person_paints_a_text_and_compares_what_base_and_trained_made_of_it(demo, page, tmp_path):
    from playwright.sync_api import expect

    address, process = demo
    page.goto(address)
    text = page.locator("#text textarea, #text input")
    expect(text).not_to_have_value("", timeout=PATIENCE_MS)
    (examples,) = tmp_path.glob("calligrapher-demo-*/examples")
    case = load_cases(examples)[3]
    (tmp_path / "broken.png").write_bytes(b"nothing")
    upload(page, "Upload a picture", tmp_path / "broken.png")
    page.locator(".problem", has_text="broken.png must be an image. Found 7 bytes").wait_for()
    Image.new("L", (9, 8)).save(tmp_path / "small.png")
    upload(page, "Upload a mask", tmp_path / "small.png")
    page.locator(
        ".problem", has_text="The mask must be as large as the source, 96x32. Found 9x8."
    ).wait_for()

    page.locator("#source-gallery button").nth(3).click()
    expect(text).to_have_value(case.text, timeout=PATIENCE_MS)
    page.locator("#canvas .zoom-number", has_text="66%").wait_for()
    page.click("#clear")
    problem(page, "The mask must have a painted pixel.")

    drag(page, 200)
    text.fill("ABCDEFGHIJKLMNOPQRSTUVW")
    problem(page, "must fit into model.max_sequence_length = 24 tokens")
    text.fill("")
    problem(page, "text must have a visible character.")

    text.fill("KAWO")
    text.press("Enter")
    page.wait_for_function("document.querySelectorAll('.results figcaption b').length == 6")
    expect(page.locator(".problem")).to_have_count(0, timeout=PATIENCE_MS)
    assert page.locator("#results h2").inner_text().startswith("KAWO")
    with page.expect_download() as download:
        page.click("#download")
    assert len(zipfile.ZipFile(download.value.path()).namelist()) == 6
    assert "accuracy" in page.locator(".results figcaption").first.inner_text()
    source = np.asarray(load_rgb(case.source))
    pictures = {variant: painted(page, variant) for variant in ("base", "warmup", "trained")}
    for picture in itertools.chain(*pictures.values()):
        assert picture.shape == source.shape
        differs = (picture != source).any(-1)
        rows, columns = np.nonzero(differs)
        assert (
            10 <= rows.min() <= rows.max() <= 21
        )  # 200 px of the screen are 30 of the picture, round ends
        assert 24 <= columns.min() <= 33
        assert 62 <= columns.max() <= 71
        assert differs[14:18, 34:62].mean() > 0.9
    assert (pictures["base"][0] != pictures["base"][1]).any()
    assert (pictures["base"][0] != pictures["trained"][0]).any()

    page.locator("#source-gallery button").nth(2).click()
    expect(page.locator(".results")).to_have_count(0, timeout=PATIENCE_MS)

    page.click("#blank")  # and on at once: the editor has not drawn it yet
    text.fill("MORI")
    text.press("Enter")
    page.wait_for_function("document.querySelectorAll('.results figcaption b').length == 6")
    for picture in itertools.chain(*(painted(page, name) for name in ("base", "trained"))):
        assert picture.shape == (32, 96, 3)
        edge = np.ones((32, 96), dtype=bool)
        edge[4:28, 4:92] = False
        assert (picture[edge] == 255).all()
        assert (picture[~edge] != 255).any()

    remote = {c.raddr.ip for c in psutil.Process(process.pid).net_connections("inet") if c.raddr}
    assert remote <= set(LOOPBACK)
    page.close()
    children = psutil.Process(process.pid).children(recursive=True)
    assert children  # the reward server
    process.send_signal(signal.SIGTERM)
    assert process.wait(PATIENCE_MS / 1000) == 130
    assert psutil.wait_procs(children, timeout=60)[1] == []
    assert list(tmp_path.glob("calligrapher-demo-*")) == []


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is installed")
def test_a_phone_in_the_dark_shows_results_below_generate_and_every_word_can_be_read(demo, page):
    from playwright.sync_api import expect

    address, _ = demo
    answer = httpx.get(address, headers={"Host": "evil.example"})
    assert (answer.status_code, "Got 'evil.example'" in answer.text) == (421, True)
    page.emulate_media(color_scheme="dark")
    page.set_viewport_size({"width": 390, "height": 844})
    page.goto(address)
    text = page.locator("#text textarea, #text input")
    expect(text).not_to_have_value("", timeout=PATIENCE_MS)
    page.click("#clear")
    problem(page, "The mask must have a painted pixel.")
    drag(page, 150)
    text.fill("KAŁO")
    page.locator("#steps input[type=number]").fill("50")
    text.press("Enter")
    expect(page.locator("#stop")).to_be_enabled(timeout=PATIENCE_MS)
    page.click("#stop")
    page.locator("#generate:enabled").wait_for()
    assert page.locator("figure", has_text="stopped").count() > 0
    page.locator("#steps input[type=number]").fill("2")
    text.press("Enter")
    page.wait_for_function("document.querySelectorAll('.results figcaption b').length == 6")
    assert "does not know Ł" in page.locator(".notice").first.inner_text()
    assert "the sign Ł, it paints smears" in page.locator(".notice").last.inner_text()
    page.wait_for_function(ON_SCREEN)
    assert page.locator("#canvas").bounding_box()["height"] <= 200
    example, go, results = (
        page.locator(part).first.bounding_box()
        for part in ("#source-gallery button", "#generate", "#results h2")
    )
    assert example["width"] >= 120
    assert 0 < results["y"] - (go["y"] + go["height"]) < 100
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    assert page.evaluate(FAINT_WORDS) == {}
    page.emulate_media(color_scheme="light")
    page.goto(f"{address}/?__theme=light")
    expect(text).not_to_have_value("", timeout=PATIENCE_MS)
    assert page.evaluate(FAINT_WORDS) == {}


def test_without_the_extra_the_command_says_how_to_get_it(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "gradio", None)
    monkeypatch.delitem(sys.modules, "flows.demo.page", raising=False)
    assert main(["demo"]) == 2
    assert "The page needs the package gradio: `pip install 'gradio" in capsys.readouterr().err


def test_a_run_and_a_model_exclude_each_other(capsys):
    assert main(["demo", "--run", "a", "--siglip", "b"]) == 2
    assert "--run brings its own model" in capsys.readouterr().err


def test_a_port_that_is_taken_is_told_before_a_model_is_loaded(monkeypatch, capsys):
    monkeypatch.setattr("flows.demo.server._layout", lambda folder: None)
    monkeypatch.setattr("flows.demo.server.open_painter", lambda **given: pytest.fail("was loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["demo", "--port", str(port)]) == 2
    assert f"must be free to listen on. Got 127.0.0.1:{port}: " in capsys.readouterr().err


@pytest.mark.parametrize(("host", "warned"), [("0.0.0.0", True), ("127.0.0.1", False)])
def test_a_page_that_other_machines_reach_is_warned_of(monkeypatch, caplog, host, warned):
    def interrupted():
        raise KeyboardInterrupt

    shown = SimpleNamespace(launch=lambda host, port: None)
    layout = SimpleNamespace(Page=lambda *parts: shown)
    stubs = {
        "_layout": lambda folder: layout,
        "open_painter": lambda run, **given: SimpleNamespace(variants=["base"]),
        "example_cases": lambda *given: [],
        "threading": SimpleNamespace(Event=lambda: SimpleNamespace(wait=interrupted)),
        "signal": SimpleNamespace(signal=lambda *given: None, SIGTERM=0, default_int_handler=None),
    }
    for name, stub in stubs.items():
        monkeypatch.setattr(f"flows.demo.server.{name}", stub)
    assert main(["demo", "--host", host, "--port", "0"]) == 130
    assert ("The page has no password: whoever reaches 0.0.0.0" in caplog.text) == warned


def test_examples_are_the_first_held_out_cases_or_none(tmp_path, caplog):
    from flows.demo.server import example_cases
    from tasks.params.run_params import DataParams

    drawn = example_cases(DataParams(train="tiny", evaluation="tiny"), tmp_path, None)
    assert len(drawn) == 12
    assert drawn == load_cases(tmp_path / "examples")
    assert example_cases(DataParams(train="x"), tmp_path, None) == []
    assert example_cases(DataParams(train="x", evaluation=f"{tmp_path}/gone"), tmp_path, None) == []
    assert "shows no examples" in caplog.text
