"""One picture, scored in this process or by a server, with what was read drawn."""

import numpy as np
import pytest
from fakes import FakeScorer
from PIL import Image

from reward_server.processes import launch
from reward_server.processes.launch import local_server
from reward_server.scorers import load


@pytest.fixture
def files(tmp_path):
    """A picture of 60 x 40 px and its mask."""
    Image.new("RGB", (60, 40), "white").save(tmp_path / "sign.jpg")
    mask = Image.new("L", (60, 40))
    mask.paste(255, (10, 5, 50, 35))
    mask.save(tmp_path / "mask.png")
    return tmp_path


class Finds(FakeScorer):
    def boxes(self, item):
        assert item.box == (5, 35, 10, 50)
        return [np.array([[20, 10], [40, 10], [40, 20], [20, 20]])]


def try_out(files, *more, mask="mask.png", image="sign.jpg") -> int:
    given = [f"--mask={files / mask}"] if mask else []
    return launch.main(["try", str(files / image), "--text=half", *given, *more])


def test_every_component_is_told_and_the_lines_are_drawn(files, capsys, monkeypatch):
    monkeypatch.setattr(load, "load_scorers", lambda settings: [Finds()])
    assert try_out(files) == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert lines["ocr_text"] == "'half'"
    assert lines["ocr_accuracy"] == "0.016"
    assert lines["ocr_likelihood"] == "null   refused: no alphabet"
    assert lines["style_score"].startswith("null   not_configured: no scorer for it")
    drawn = np.asarray(Image.open(files / "sign-read.png"))
    assert drawn[10, 30].tolist() == [255, 0, 80]
    assert drawn[5, 30].tolist() == drawn[34, 12].tolist() == [0, 160, 255]
    assert drawn[30, 30].tolist() == [255, 255, 255]


def test_how_likely_each_letter_is_stands_in_a_line_of_its_own(files, capsys, monkeypatch):
    monkeypatch.setattr(load, "load_scorers", lambda settings: [Finds()])
    assert try_out(files, "--text=abcd") == 0
    lines = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines() if line)
    assert lines["ocr_letters"] == "0.00 0.25 0.50 0.75"


def test_a_server_that_runs_can_be_asked_instead(files, capsys):
    with local_server(disable_reward_model=True) as url:
        assert try_out(files, f"--url={url}", f"--out={files / 'o.png'}", mask=None) == 0
    told = capsys.readouterr().out
    assert "ocr_text         'half'" in told
    assert "made-up numbers" in told
    assert (files / "o.png").is_file()


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"image": "none.png"}, "none.png must be a picture"),
        ({"mask": "sign.jpg"}, None),
        ({"mask": "small.png"}, "mask must be of the image's size"),
    ],
)
def test_wrong_pictures_are_told_in_one_line_before_anything_is_loaded(
    files, capsys, monkeypatch, more, told
):
    monkeypatch.setattr(load, "load_scorers", lambda settings: [FakeScorer()])
    Image.new("L", (3, 3), 255).save(files / "small.png")
    if told is None:  # an all-white picture is a mask, whatever its format
        assert try_out(files, **more) == 0
        return
    monkeypatch.setattr(load, "load_scorers", None)
    with pytest.raises(SystemExit) as ended:
        try_out(files, **more)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert told in line
