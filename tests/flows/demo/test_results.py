"""The results as HTML, and who reads the pictures: numbers where there are some, else why not."""

import base64
import io
import re
import socket
from pathlib import Path

import pytest
from PIL import Image

from calligrapher.data.dataset import load_cases
from calligrapher.errors import DataError
from calligrapher.tiny.world import beyond
from flows.demo.results import Column, Heading, problem_html, results_html
from flows.demo.scores import PictureScorer, picture_scorer
from reward_server.client import RewardClient, RewardResult
from reward_server.components import NAMES


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    from calligrapher.tiny.world import write_bench

    return load_cases(
        write_bench(tmp_path_factory.mktemp("cases"), num_cases=1, split="train", seed=1)
    )[0]


def pictures(count):
    return [Image.new("RGB", (6, 4), (i, 2, 3)) for i in range(count)]


def heading(seeds):
    return Heading("HI", seeds, num_steps=8, scale=1)


def test_the_grid_has_a_row_per_seed_and_holds_the_very_pixels():
    read = RewardResult(ocr_text="HI", ocr_accuracy=1.0, ocr_confidence=0.876, style_score=0.5)
    wrong = RewardResult(ocr_text="", ocr_accuracy=0.25, ocr_confidence=0.1)
    columns = {
        "base": Column(pictures(2), [wrong, read]),
        "trained": Column(pictures(2)),
        "warmup": Column(),
    }
    html = results_html(heading([5, 6]), columns)
    assert html.count("<figure") == 6
    assert html.index('alt="base, seed 5"') < html.index('alt="trained, seed 5"')
    assert html.index('alt="trained, seed 5"') < html.index('alt="base, seed 6"')
    assert "accuracy 1.00 · confidence 0.88 · style 0.50" in html
    assert '<b class="wrong">—</b> <span>accuracy 0.25 · confidence 0.10</span>' in html
    assert "mean accuracy 0.62" in html
    assert html.count("painting …") == html.count("reading …") == 2
    for i, data in enumerate(
        re.findall(r'base, seed \d" src="data:image/png;base64,([^"]*)"', html)
    ):
        assert Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB") == pictures(2)[i]


def test_components_of_ones_own_scorers_are_shown_by_their_names():
    read = RewardResult(ocr_text="HI", ocr_accuracy=1.0, own={"text_size": 0.25, "judge": None})
    html = results_html(heading([0]), {"base": Column(pictures(1), [read])})
    assert "accuracy 1.00 · text size 0.25</span>" in html


def test_a_factor_that_lessens_nothing_is_not_shown():
    own = {"ocr_visibility": 1.0, "ocr_upright": 0.5}
    read = RewardResult(ocr_text="HI", ocr_accuracy=1.0, own=own)
    html = results_html(heading([0]), {"base": Column(pictures(1), [read])})
    assert "accuracy 1.00 · ocr upright 0.50</span>" in html


def test_what_the_tiny_model_has_never_seen_is_told_beside_its_results():
    assert beyond("KAWO", (96, 32)) == []
    strange = beyond("Hi <no>!", (640, 480))
    assert strange == [
        "the small letters ino",
        "the signs a space < > !",
        "8 characters",
        "a picture of 640 x 480",
    ]
    asked = Heading("Hi <no>!", [0], num_steps=8, scale=1, beyond=strange)
    html = results_html(asked, {"base": Column()})
    assert html.count('class="notice"') == 1
    assert "words of 3 to 6 capital letters in drawn pictures of 96 x 32 pixels" in html
    assert "the signs a space &lt; &gt; !, 8 characters and a picture of 640 x 480, it" in html
    assert "notice" not in results_html(heading([0]), {"base": Column()})


def test_the_pages_own_server_gets_the_runs_scorers(tmp_path, monkeypatch):
    from contextlib import contextmanager

    started = []

    @contextmanager
    def server(**how):
        started.append(how["flags"])
        yield "http://127.0.0.1:9"

    monkeypatch.setattr("flows.demo.scores.local_server", server)
    with picture_scorer([], tmp_path, ["--scorer=a=/r.py:A"]) as scorer:
        assert scorer._urls() == ["http://127.0.0.1:9"]
    assert started == [["--scorer=a=/r.py:A"]]


def test_what_people_and_pictures_say_is_text_never_markup():
    told = RewardResult(ocr_text="<script>", ocr_accuracy=0.0, ocr_confidence=0.0)
    assert "&lt;script&gt;" in results_html(heading([0]), {"base": Column(pictures(1), [told])})
    assert "&lt;b&gt;" in problem_html(DataError("<b>"), Path("/tmp/x"))


def test_a_problem_names_the_file_and_not_where_we_put_it():
    told = problem_html(
        DataError("/tmp/x.y/gradio/ab12/a b.png must be an image."), Path("/tmp/x.y")
    )
    assert ">a b.png must be an image.<" in told


def test_a_picture_that_nobody_scored_shows_why_and_no_number(case):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    results = PictureScorer(lambda: [f"http://127.0.0.1:{port}"], deadline_s=0.3).score(
        pictures(2), case
    )
    assert [getattr(result, name) for result in results for name in NAMES] == [None] * 12
    html = results_html(heading([0, 1]), {"base": Column(pictures(2), results)})
    assert html.count("<em>not scored: ") == 2
    assert f"127.0.0.1:{port}" in html
    assert "accuracy" not in html


def test_numbers_that_a_server_makes_up_are_not_shown(case, monkeypatch):
    made_up = RewardResult(ocr_text="HI", ocr_accuracy=0.5, reward_model_disabled=True)
    monkeypatch.setattr(RewardClient, "score_batch", lambda self, items: [made_up for _ in items])
    (result,) = PictureScorer(lambda: ["http://127.0.0.1:1"]).score(pictures(1), case)
    assert result.ocr_accuracy is None
    assert "made up" in result.errors["ocr_accuracy"]


def test_no_server_is_started_before_there_is_something_to_read(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "flows.demo.scores.local_server", lambda **given: pytest.fail("was started")
    )
    with picture_scorer([], tmp_path) as scorer:
        assert isinstance(scorer, PictureScorer)
