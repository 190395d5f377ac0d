"""MLflow's pages in a headless browser, for two runs that the tracker mirrored."""

import json
from functools import partial

import pytest
from PIL import Image

from tasks.params.run_params import RunParams
from tasks.tracking.tracker import Tracker

pytest.importorskip("playwright", reason="the package playwright is not installed")

from browser import CHROMIUM, opened
from mlflow_pages import Tracked, served, shoot_comparison, shoot_curves, shoot_grid

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="there is no Chromium on the PATH"),
]
ROUNDS = 3


def write_run(folder, algorithm, shade):
    """A run as `flows.rl_train` leaves it, without the training: evaluated before and after all
    rounds."""
    params = RunParams.model_validate(
        {
            "rounds": ROUNDS,
            "model": {"base": "tiny"},
            "data": {"train": "cases", "evaluation": "held-out"},
            "rollout": {"num_cases": 3, "num_images_per_prompt": 4},
            "reward": {"vlm_weight": 0},
            algorithm: {},
        }
    )
    with Tracker(folder, params) as tracker:
        (folder / "params.json").write_text(json.dumps(params.resolved()))
        for step in range(ROUNDS + 1):
            tracker.log_image(
                "grid", partial(Image.new, "RGB", (90, 30), (shade, 60 * step, 0)), step
            )
            if step in (0, ROUNDS):
                tracker.log(
                    f"{step}/evaluate", step, {"evaluate/ocr_accuracy": shade / 256 + step / 8}
                )
            if step < ROUNDS:
                tracker.log(
                    f"{step}/score", step, {"score/ocr_accuracy_mean": shade / 512 + step / 16}
                )
    assert tracker.failures == 0
    return Tracked.of(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    return [
        write_run(folder / f"a-{name}", name, shade) for name, shade in (("nft", 40), ("grpo", 90))
    ]


@pytest.fixture(scope="module")
def url(runs):
    with served(runs[0].folder.parent) as url:
        yield url


@pytest.fixture
def page(url):
    with opened(CHROMIUM) as page:
        yield page


def test_the_compare_page_draws_the_curves_of_both_runs(page, url, runs, tmp_path):
    shoot_curves(page, url, runs, tmp_path)
    shoot_comparison(page, url, runs, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow-curves.png", "mlflow-compare.png"}


def test_the_grid_has_a_slider_over_the_rounds_and_shows_the_runs_own_pictures(
    page, url, runs, tmp_path
):
    assert sorted(runs[0].grid()) == [0, 1, 2, 3]
    shoot_grid(page, url, runs, tmp_path)
    with Image.open(tmp_path / "mlflow-grid.png") as shot:
        colours = {colour for _, colour in shot.convert("RGB").getcolors(1 << 20)}
    for red in (40, 90):
        for green in (0, 180):  # the first step and the last, as MLflow's WebP has them
            assert any(abs(r - red) < 6 and abs(g - green) < 6 and b < 6 for r, g, b in colours), (
                red,
                green,
            )


def test_a_page_that_shows_less_than_the_run_folder_is_refused(page, url, runs, tmp_path):
    with (runs[1].folder / "metrics.jsonl").open("a") as file:
        file.write(
            json.dumps({"stage": "3/score", "step": 3, "metrics": {"score/ocr_accuracy_mean": 0.5}})
            + "\n"
        )
    with pytest.raises(AssertionError, match=r"must draw the curves of metrics\.jsonl"):
        shoot_curves(page, url, runs, tmp_path)
