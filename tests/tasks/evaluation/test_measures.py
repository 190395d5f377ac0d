import os

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from calligrapher.data.images import load_rgb
from reward_server.scorers.base import Item
from reward_server.scorers.style import StyleScorer
from tasks.evaluation import second_ocr
from tasks.evaluation.measures import background, style_scorer


def test_the_background_is_compared_outside_the_mask_only(make_resources):
    resources = make_resources()
    case = resources.cases.evaluation[0]
    canvas = resources.conditioning.canvas
    source = load_rgb(case.source).resize((canvas.width, canvas.height), Image.Resampling.LANCZOS)
    mask = Image.open(case.mask).convert("L").resize(source.size, Image.Resampling.NEAREST)
    painted = source.copy()
    painted.paste((255, 0, 0), mask=mask.point(lambda value: 255 * (value > 127)))
    assert background(canvas, painted, case) == (0.0, None)
    shifted = Image.fromarray(
        np.where(np.asarray(source) > 127, np.asarray(source) - 2, np.asarray(source) + 2)
    )
    error, psnr = background(canvas, shifted, case)
    assert error == pytest.approx(2.0)
    assert psnr == pytest.approx(20 * np.log10(255 / 2))


def test_an_evaluations_style_is_the_reward_servers_to_the_bit(make_resources):
    resources = make_resources()
    served = StyleScorer.load(resources.files.siglip, device="cpu", max_wait_s=0.0)
    first, second = (np.asarray(load_rgb(c.reference)) for c in resources.cases.evaluation)
    items = [Item(first, crop, "a", reference=first) for crop in (first, second)]
    scores = [outcome.values["style_score"] for outcome in served.score_items(items)]
    scorer = style_scorer(resources)
    reference, *crops = scorer.embed([first, first, second])
    assert [scorer.match(crop, reference) for crop in crops] == scores
    assert scores[0] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.skipif(second_ocr.version() is None, reason="Tesseract is not installed")
def test_tesseract_reads_a_line_of_text():
    line = Image.new("RGB", (220, 48), "white")
    ImageDraw.Draw(line).text((10, 6), "HELLO", fill="black", font=ImageFont.load_default(32))
    assert second_ocr.read_lines([line, line]) == ["HELLO", "HELLO"]


@pytest.mark.parametrize("script", ["echo broken >&2; exit 1", "printf '\\377'"])
def test_a_reader_that_fails_gives_no_reading_and_one_warning(
    script, tmp_path, monkeypatch, caplog
):
    program = tmp_path / "tesseract"
    program.write_text(f"#!/bin/sh\ncat > /dev/null\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert second_ocr.read_lines([Image.new("RGB", (40, 20))] * 3) == [None, None, None]
    assert [r.message.split(":")[0] for r in caplog.records] == [
        "no second reading of 3 of 3 pictures"
    ]


def test_the_reader_gets_the_users_environment(tmp_path, monkeypatch):
    program = tmp_path / "tesseract"
    program.write_text('#!/bin/sh\ncat > /dev/null\nprintf "$TESSDATA_PREFIX"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("TESSDATA_PREFIX", "/models")
    assert second_ocr.read_lines([Image.new("RGB", (40, 20))]) == ["/models"]
