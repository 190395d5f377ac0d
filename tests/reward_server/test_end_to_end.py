"""The whole way with the real recogniser: client, HTTP, batching, PaddleOCR."""

import io

import pytest
from PIL import Image, ImageDraw, ImageFont

from reward_server.client import RewardClient, RewardItem
from reward_server.processes.launch import local_server

WORDS = [
    "river",
    "stone",
    "maple",
    "cloud",
    "tiger",
    "piano",
    "lemon",
    "ocean",
    "night",
    "spark",
    "waltz",
]


def item(word: str, place: int) -> RewardItem:
    """A word somewhere on a larger picture, the mask around it; widths differ."""
    image, mask = Image.new("RGB", (180, 70), "beige"), Image.new("L", (180, 70))
    box = (5 + place, 10, 100 + 7 * place, 46)
    font = ImageFont.load_default(size=22)
    centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
    ImageDraw.Draw(image).text(centre, word, font=font, fill="navy", anchor="mm")
    ImageDraw.Draw(image).text(
        (90, 60), "not this line", font=ImageFont.load_default(size=10), fill="red"
    )
    ImageDraw.Draw(mask).rectangle((box[0], box[1], box[2] - 1, box[3] - 1), fill=255)
    return RewardItem(_png(image), f"The text is '{word}'.", mask=_png(mask))


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


@pytest.fixture(scope="module")
def url():
    with local_server(ocr_threads=2, flags=["--answer-cache=0"]) as url:
        yield url


def test_words_are_read_inside_the_mask_and_scores_are_the_same_in_any_company(url):
    items = [item(word, place) for place, word in enumerate(WORDS)]
    with RewardClient([url], chunk_size=1, concurrency=1) as client:
        alone = client.score_batch(items)
    assert [result.ocr_text for result in alone] == WORDS
    assert all(result.ocr_accuracy == 1.0 for result in alone)
    assert min(result.ocr_likelihood for result in alone) > 0.5
    for chunk, concurrency in ((3, 4), (11, 1)):
        with RewardClient([url], chunk_size=chunk, concurrency=concurrency) as client:
            assert client.score_batch(items) == alone
            assert client.score_batch(items[::-1]) == alone[::-1]


def test_a_wrong_target_scores_lower_on_the_same_picture(url):
    right = item("river", 0)
    wrong = RewardItem(right.image, "The text is 'rover'.", mask=right.mask)
    with RewardClient([url]) as client:
        good, bad = client.score_batch([right, wrong])
    assert bad.ocr_accuracy == 0.8
    assert bad.ocr_likelihood < 0.5 < good.ocr_likelihood
    assert bad.ocr_confidence == good.ocr_confidence


def test_without_a_mask_the_lines_of_the_scene_are_read(url):
    page = Image.new("RGB", (300, 160), "white")
    font = ImageFont.load_default(size=30)
    ImageDraw.Draw(page).text((30, 20), "Grand Hotel", font=font, fill="black")
    ImageDraw.Draw(page).text((60, 90), "since 1920", font=font, fill="black")
    with RewardClient([url]) as client:
        (result,) = client.score_batch([RewardItem(page, "The text is 'Grand Hotel since 1920'.")])
        info = client.info()
    assert result.ocr_text == "Grand Hotel since 1920"
    assert info["scorers"]["ocr"]["recogniser_model"] == "PP-OCRv6_small_rec"
