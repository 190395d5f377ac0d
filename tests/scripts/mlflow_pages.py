"""MLflow's pages of runs: photographed, and compared with what the runs' files say."""

import io
import json
import os
import socket
import sqlite3
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import parse_qs, quote, unquote, urlsplit

from browser import photograph
from PIL import Image, ImageChops
from playwright.sync_api import Locator, Page

from flows.services.daemons import Daemons
from flows.services.servers import mlflow_server, wait_answers
from tasks.tracking.journal import METRICS_FILE, REPORT
from tasks.tracking.pointer import read_pointer

CURVES = ("evaluate/ocr_accuracy", "score/ocr_accuracy_mean")
GRID = "grid"
_CARD = "experiment-view-compare-runs-card"
_DRAWN = """() => [...document.querySelectorAll(".js-plotly-plot")].flatMap(plot => plot.data)
    .filter(line => line.x.length)
    .map(line => [line.uuid, line.metricKey, [...line.x].map((x, i) => [x, line.y[i]])])"""
_ALL_DRAWN = f"count => new Set(({_DRAWN})().map(line => line[0] + line[1])).size === count"


@dataclass(frozen=True)
class Tracked:
    """A run folder and the MLflow run that mirrors it."""

    folder: Path
    run_id: str
    experiment_id: str

    @classmethod
    def of(cls, folder: Path) -> "Tracked":
        pointer = read_pointer(folder)
        assert pointer.get("run_id"), f"{folder} must be a tracked run. It has no MLflow run id."
        return cls(folder, pointer["run_id"], pointer["experiment_id"])

    def curve(self, key: str) -> list[list[float]]:
        """[[step, value], ...] of a metric, from the run's own file."""
        rows = map(json.loads, (self.folder / METRICS_FILE).read_text().splitlines())
        return sorted(
            [r["step"], r["metrics"][key]] for r in rows if r["metrics"].get(key) is not None
        )

    def grid(self) -> dict[int, Path]:
        """The picture of the fixed cases after each round that has one."""
        return {
            int(path.stem): path for path in sorted((self.folder / REPORT / GRID).glob("*.png"))
        }


@contextmanager
def served(runs: Path) -> Iterator[str]:
    """The address of an MLflow server on a copy of the runs' database, stopped at the end."""
    with tempfile.TemporaryDirectory() as name, socket.create_server(("127.0.0.1", 0)) as listener:
        folder, port = Path(name), listener.getsockname()[1]
        listener.close()
        with (
            closing(sqlite3.connect(f"file:{runs / 'mlflow.db'}?mode=ro", uri=True)) as source,
            closing(sqlite3.connect(folder / "mlflow.db")) as copy,
        ):
            source.backup(copy)
        daemons = Daemons(folder, os.environ)
        try:
            daemons.start("mlflow", *mlflow_server(folder, port))
            wait_answers(daemons, "mlflow", f"http://127.0.0.1:{port}/health")
            yield f"http://127.0.0.1:{port}"
        finally:
            daemons.stop_all()


def shoot_curves(page: Page, url: str, runs: Sequence[Tracked], out: Path) -> None:
    """Both metrics of all runs over the rounds, in one chart: drawn is what the run folders
    hold."""
    keys = quote(json.dumps(CURVES))
    page.goto(
        f"{url}/#/metric?{_of(runs)}&plot_metric_keys={keys}&metric=%22{CURVES[0]}%22&x_axis=step"
    )
    page.get_by_label("Toggle sidebar").click()
    page.wait_for_function(_ALL_DRAWN, arg=len(runs) * len(CURVES))
    drawn = {(run_id, key): points for run_id, key, points in page.evaluate(_DRAWN)}
    wanted = {(run.run_id, key): run.curve(key) for run in runs for key in CURVES}
    assert drawn == wanted, f"{page.url} must draw the curves of metrics.jsonl. Drawn: {drawn}"
    for run in runs:
        page.get_by_text(f"{run.folder.name} ({CURVES[0]})").first.wait_for()
    photograph(page).save(out / "mlflow-curves.png", optimize=True)


def shoot_comparison(page: Page, url: str, runs: Sequence[Tracked], out: Path) -> None:
    """The compare page: that which differs between the params of the runs."""
    page.set_viewport_size({"width": 1200, "height": 1050})
    page.goto(f"{url}/#/compare-runs?{_of(runs)}")
    page.get_by_label("Parameters - Show diff only").click()
    page.get_by_role("button", name="Visualizations").click()
    text = page.locator("main").inner_text()
    for wanted in (*(run.folder.name for run in runs), *_differing(runs)):
        assert wanted in text, f"{page.url} must show {wanted}. It reads: {text}"
    photograph(page).save(out / "mlflow-compare.png", optimize=True)


def shoot_grid(page: Page, url: str, runs: Sequence[Tracked], out: Path) -> None:
    """The fixed cases of all runs at the first and the last step of the slider, which has every
    step."""
    chosen = quote(f"attributes.run_id IN ({', '.join(repr(run.run_id) for run in runs)})")
    page.goto(
        f"{url}/#/experiments/{runs[0].experiment_id}/runs?compareRunsMode=CHART&searchFilter={chosen}"
    )
    page.get_by_placeholder("Search metric charts").fill(GRID)
    card = page.get_by_test_id(_CARD).filter(has=page.get_by_title(GRID, exact=True))
    _hide_params(page, card)
    steps = sorted({step for run in runs for step in run.grid()})
    found = slider_steps(card)
    assert found == steps, f"the slider of {page.url} must have the steps {steps}. It has {found}."
    first_and_last = (steps[0], steps[-1])
    for step in first_and_last:
        _go_to(card, step)
        for run in runs:
            _check_picture(page, card, url, run, step)
    card.locator("[data-component-id=fullscreen_button_chartcard]").click()
    page.set_viewport_size({"width": 650, "height": 480})
    shots = []
    for step in first_and_last:
        _go_to(page.get_by_role("dialog"), step)
        shots.append(photograph(page))
    _stacked(shots).save(out / "mlflow-grid.png", optimize=True)


def slider_steps(chart: Locator) -> list[int]:
    """The steps at which the chart's slider stops, from its first to its last."""
    slider = chart.get_by_role("slider")
    steps = [int(slider.get_attribute("aria-valuenow") or 0)]
    last = int(slider.get_attribute("aria-valuemax") or 0)
    while steps[-1] < last:
        slider.press("ArrowRight")
        steps.append(int(slider.get_attribute("aria-valuenow") or 0))
        assert steps[-1] > steps[-2], f"the slider must go on to {last}. It stays at {steps[-1]}."
    return steps


def _hide_params(page: Page, card: Locator) -> None:
    """MLflow prints all params of a run above its picture, which they push out of sight."""
    card.get_by_test_id(f"{_CARD}-menu").click()
    page.get_by_role("menuitem", name="Configure").click()
    page.get_by_role("dialog").get_by_role("switch").click()
    page.get_by_role("button", name="Save changes").click()
    page.get_by_role("dialog").wait_for(state="hidden")


def _go_to(chart: Locator, step: int) -> None:
    field = chart.get_by_role("spinbutton")
    field.select_text()
    field.press_sequentially(str(step))
    field.blur()
    pictures = chart.locator(f"img[src*='{GRID}%2Bstep%2B{step}%2B']")
    pictures.first.wait_for()
    for picture in pictures.all():
        picture.evaluate("picture => picture.decode()")


def _check_picture(page: Page, chart: Locator, url: str, run: Tracked, step: int) -> None:
    """What a click on the run's picture shows is the file of MLflow's store, and of the run's own
    folder."""
    name = f"{GRID}%2Bstep%2B{step}%2B"
    chart.locator(f"img[src*='{name}'][src*='{run.run_id}']").click()
    full = page.locator(f".rc-image-preview img[src*='{name}'][src*='{run.run_id}']")
    full.wait_for()
    source = full.get_attribute("src") or ""
    page.locator(".rc-image-preview-wrap").filter(has=full).press("Escape")
    full.wait_for(state="hidden")
    body = page.request.get(f"{url}/{source}").body()
    stored = page.request.get(f"{url}/api/2.0/mlflow/runs/get?run_id={run.run_id}").json()
    store = Path(unquote(urlsplit(stored["run"]["info"]["artifact_uri"]).path))
    path = store / parse_qs(urlsplit(source).query)["path"][0]
    assert body == path.read_bytes(), f"{source} must be {path}. It differs."
    ours = run.grid()[step]
    with Image.open(ours) as drawn, Image.open(io.BytesIO(body)) as seen:
        differing = ImageChops.difference(drawn.convert("RGB"), seen.convert("RGB")).getbbox()
    assert differing is None, f"{source} must show {ours}. It differs within {differing}."


def _of(runs: Sequence[Tracked]) -> str:
    ids, experiments = [run.run_id for run in runs], [runs[0].experiment_id]
    return f"runs={quote(json.dumps(ids))}&experiments={quote(json.dumps(experiments))}"


def _differing(runs: Sequence[Tracked]) -> list[str]:
    """Sections of the params that only some of the runs have: `nft`, `grpo`."""
    given = [json.loads((run.folder / "params.json").read_text()) for run in runs]
    return [name for name in given[0] if len({params.get(name) is None for params in given}) > 1]


def _stacked(pictures: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new(
        "RGB", (pictures[0].width, sum(picture.height for picture in pictures)), "white"
    )
    top = 0
    for picture in pictures:
        sheet.paste(picture, (0, top))
        top += picture.height
    return sheet
