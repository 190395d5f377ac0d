"""One generation: what it yields, how it is stopped, what is told of the text and what is saved."""

import dataclasses
import io
import zipfile
from threading import Event

import numpy as np
import pytest
from PIL import Image

from flows.demo.session import DemoSession
from flows.demo.sketch import DemoInput
from reward_server.client import RewardResult
from tasks.inference.painter import open_painter


class Reads:
    """A scorer that reads `A` everywhere."""

    def score(self, pictures, case):
        return [RewardResult(ocr_text="A", ocr_accuracy=0.5) for _ in pictures]


@pytest.fixture(scope="module")
def painter():
    """The embedded model, with its base once more as `trained`."""
    painter = open_painter(num_steps=3)
    painter.variants["trained"] = painter.variants["base"]
    return painter


@pytest.fixture
def session(painter, tmp_path):
    return DemoSession(painter, ["base", "trained"], Reads(), tmp_path)


def given(text="AB"):
    source = Image.fromarray(np.full((32, 96, 3), 200, np.uint8))
    mask = Image.new("L", source.size)
    mask.paste(255, (8, 8, 60, 24))
    return DemoInput(source, mask, source, text)


def results(session, text="AB", stop=None):
    stop = stop or Event()
    return session.results(given(text), range(4, 6), num_steps=3, scale=0.5, stop=stop)


def test_results_say_what_was_asked_for_and_end_with_all_pictures_in_one_file(session):
    shown = list(results(session, "A<B"))
    assert all(
        "<h2>A&lt;B <small>seeds 4 to 5 · 3 steps · style scale 0.5" in s.html for s in shown
    )
    assert [s.archive is None for s in shown] == [True] * 4 + [False]
    with zipfile.ZipFile(shown[-1].archive) as archive:
        names = archive.namelist()
        pictures = [Image.open(io.BytesIO(archive.read(name))) for name in names]
    variants = [name.removeprefix(f"{shown[-1].archive.stem}-") for name in names]
    assert variants == [f"{v}-seed{s}.png" for v in ("base", "trained") for s in (4, 5)]
    assert {picture.size for picture in pictures} == {(96, 32)}
    assert list(session.folder.iterdir()) == [shown[-1].archive.parent]


def test_characters_that_t5_does_not_know_are_told(session):
    html = next(results(session, "AŁЖA A")).html
    assert "does not know Ł Ж: the model sees an unknown character" in html
    assert "notice" not in next(results(session, "AB CD")).html
    of_tiny = dataclasses.replace(session, is_tiny=True)
    html = next(results(of_tiny, "AB CD")).html
    assert "Asked for the sign a space, it paints smears" in html


def test_a_stop_ends_the_painting_at_its_next_step_and_keeps_what_is_painted(session):
    stop, steps = Event(), []

    def count(*call):
        steps.append(call)
        if len(steps) == 5:  # the second of three steps of the second variant
            stop.set()

    hook = session.painter.model.policy.model.register_forward_hook(count)
    *_, last = results(session, stop=stop)
    hook.remove()
    assert len(steps) == 5
    assert last.html.count("accuracy 0.50") == 3  # two pictures and their mean
    assert last.html.count(">stopped<") == 2
    with zipfile.ZipFile(last.archive) as archive:
        assert len(archive.namelist()) == 2


def test_a_stop_before_the_first_step_leaves_nothing_to_save(session):
    stop = Event()
    stop.set()
    *_, last = results(session, stop=stop)
    assert last.archive is None
    assert list(session.folder.iterdir()) == []
    assert list(results(session))[-1].archive  # the next one is not stopped
