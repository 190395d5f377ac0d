"""The OCR scorer with the real PP-OCRv6 weights on small rendered words."""

import base64
import io
import random
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont, ImageOps

from reward_server.scorers.base import Item
from reward_server.scorers.ocr.models import padded_width, rows_of
from reward_server.scorers.ocr.scorer import OCRScorer

FONTS = [
    Path(matplotlib.get_data_path()) / "fonts/ttf" / name
    for name in ("DejaVuSans.ttf", "DejaVuSerif-Bold.ttf", "STIXGeneral.ttf", "cmr10.ttf")
]
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
    "delta",
    "waltz",
    "quiz",
    "jumpy",
    "frost",
]


def picture(text: str, *, size=(112, 36), font=FONTS[0], points=22) -> Image.Image:
    image = Image.new("RGB", size, (240, 236, 225))
    face = ImageFont.truetype(font, points)
    ImageDraw.Draw(image).text(
        (size[0] / 2, size[1] / 2), text, font=face, fill=(25, 30, 70), anchor="mm"
    )
    return image


# Rendered once with IPAex Gothic, as 1-bit PNG: the fonts at hand have no such letters.
CJK = {
    "東京駅前": (
        "iVBORw0KGgoAAAANSUhEUgAAAKYAAAAsAQAAAADH2P5kAAABRElEQVR42s2TPU7DQBCFv7Ud2U1+JBpoSBr60KdwmU"
        "vQ09FQUCDiIApKjkQHnXMER0hIVAQFpDha+1F4ncQhB2CklXaeZr+ZedIa8TcKj0Pxb9SZO8C34mZtYU4M5WFCGQNI"
        "FpBS2WVutbKSrFNXwO0yt8pXkqwHvtLKonZMHkYmgaCihYLiYUuXlBBKqriSIwAwNdHeFv0027w08Xpn3r4y2jFQ1L"
        "Xz84GrDJgAmxkAWLZqdgD00+MqMekBJ9sDmDYIcxP+NCdz3Xxx7LrVhEm6Yt3cwmRAVg4bPpRj6SXtFmcnbyWj3PlQ"
        "BglwYzXo7RDs/TOvjGBd7nT7MDOeON3z7J1rDehyRAi+UzXm4i4mSh4XbH1YD+ndhrPgphMEiakJQUynlcd+5zPz+F"
        "JUqX6C8eiBd2mINlvUsbhyF2v+7W/5BYtnnrWNJPGUAAAAAElFTkSuQmCC"
    ),
    "営業カフェ": (
        "iVBORw0KGgoAAAANSUhEUgAAAMgAAAAsAQAAAAAI9sqnAAABOUlEQVR42tWTsU7CUBSGv9uS2IEgoySaduABdGQwbY"
        "wPwujoA5hQEh/AZ+BJcCqbJD6AGIY6OFB0aEjb38EipSnunPW7/7nn/P+9Rhwoi6Mm100knX8wZ91APlk09LUAUkhZ"
        "waxOOt6Mc1oNGocubZz6CFIBPAC+IinE1m/9v89IhZ3JnwK4WtQ3HcF4YDHc0ySmi0XQMME9nREgRYmkWCtOJCHpSy"
        "/akagk23sU68+D02XamIJTmSA3AePe9sz0YHJPu9mkSFIsyU0kudKy0R151W4OuemZQABF1YPxVan0gGzrRZmXLSPy"
        "wII0rGhcpagfkAEk9VdV3CxIwxVM4PnCVMj3+I5kA3qsa14ZMFGf9Rn4UknejcMtl14bB2dYyUchJnPjzH+TlGtbLc"
        "DVhiH2dN9Hc5Q/+AewRKYCo6K0aAAAAABJRU5ErkJggg=="
    ),
}


@pytest.fixture(scope="module")
def scorer():
    scorer = OCRScorer(num_threads=2, mode="auto")
    yield scorer
    scorer.close()


def test_reads_words_exactly(scorer):
    images = [picture(word, font=FONTS[place % 4]) for place, word in enumerate(WORDS)]
    scores = scorer.score(images, WORDS)
    assert np.mean([score.accuracy for score in scores]) > 0.95
    assert np.mean([score.likelihood for score in scores]) > 0.9
    assert all(not score.errors for score in scores)


def test_scores_are_bit_identical_alone_in_any_batch_in_any_order(scorer):
    sizes = [(96, 32), (200, 40), (60, 50), (33, 21), (400, 30), (112, 36), (7, 90)]
    images = [picture(word, size=size) for word, size in zip(WORDS, sizes, strict=False)]
    alone = [scorer.score([image], [word])[0] for image, word in zip(images, WORDS, strict=False)]
    for seed in range(3):
        order = random.Random(seed).sample(range(len(images)), len(images))
        together = scorer.score(
            [images[place] for place in order], [WORDS[place] for place in order]
        )
        assert together == [alone[place] for place in order]
    items = [
        Item(np.asarray(image), np.asarray(image), word)
        for image, word in zip(images, WORDS, strict=False)
    ]
    for outcome, score in zip(scorer.score_items(items), alone, strict=True):
        assert outcome.values["ocr_likelihood"] == score.likelihood


@pytest.mark.parametrize("word", ["Ωμεγα", "façade", "Größe", "No. 7-8", "don't!"])
def test_other_scripts_and_signs_are_scored(scorer, word):
    (score,) = scorer.score([picture(word, size=(150, 40), points=26)], [word])
    assert score.accuracy >= 0.6
    assert score.likelihood > 0.1


@pytest.mark.parametrize("word", CJK)
def test_chinese_and_japanese_are_read(scorer, word):
    image = Image.open(io.BytesIO(base64.b64decode(CJK[word])))
    right, wrong = scorer.score([image, image], [word, word[::-1]])
    assert right.accuracy == 1.0
    assert right.likelihood > 0.9 > wrong.likelihood


def test_chinese_and_japanese_targets_have_a_likelihood(scorer):
    (score,) = scorer.score([picture("hello")], ["你好カナ"])
    assert score.accuracy == 0.0
    assert 0 <= score.likelihood < 1e-3


def test_a_script_that_the_model_never_learned_is_no_number(scorer):
    (score,) = scorer.score([picture("hello")], ["שלום"])
    assert score.accuracy is None
    assert score.likelihood is None
    assert set(score.errors) == {"ocr_accuracy", "ocr_likelihood"}


def test_the_likelihood_is_dense_where_the_accuracy_is_flat(scorer):
    clean = picture("maple")
    worse = [
        Image.blend(clean, Image.new("RGB", clean.size, "gray"), share)
        for share in (0.0, 0.5, 0.85)
    ]
    scores = scorer.score(worse, ["maple"] * 3)
    assert [score.accuracy for score in scores[:2]] == [1.0, 1.0]
    assert scores[0].likelihood > scores[2].likelihood


def test_a_scene_is_read_line_by_line(scorer):
    page = Image.new("RGB", (320, 240), "white")
    page.paste(picture("Grand Hotel", size=(300, 60), points=38), (10, 30))
    page.paste(picture("since 1920", size=(260, 50), points=30), (30, 150))
    (score,) = scorer.score([page], ["grand hotel since 1920"], scene=True)
    assert score.accuracy == 1.0
    assert score.likelihood > 0.5
    without_mask = Item(
        np.asarray(page), np.asarray(page), "grand hotel since 1920", has_mask=False
    )
    assert scorer.score_items([without_mask])[0].values["ocr_accuracy"] == 1.0


def box(left: float, top: float, width: float, height: float, slant: float = 0.0) -> np.ndarray:
    corners = [
        (left, top),
        (left + width, top + slant),
        (left + width, top + slant + height),
        (left, top + height),
    ]
    return np.array(corners)


@pytest.mark.parametrize(
    "rows",
    [
        [
            [box(10, 42, 80, 60), box(120, 20, 90, 60), box(240, 36, 50, 60)]
        ],  # one row whose words jump
        [[box(10, 0, 50, 20), box(90, 3, 50, 20)], [box(10, 24, 50, 20), box(90, 27, 50, 20)]],
        [
            [
                box(0, 0, 100, 30, slant=20),
                box(110, 22, 100, 30, slant=20),
                box(220, 44, 90, 30, slant=18),
            ],
            [
                box(-10, 38, 100, 30, slant=20),
                box(100, 60, 100, 30, slant=20),
                box(210, 82, 90, 30, slant=18),
            ],
        ],
        [
            [box(40, 0, 200, 90)],
            [box(0, 95, 20, 12), box(30, 97, 25, 12)],
        ],  # a headline over small print
        [],
    ],
)
def test_rows_are_read_from_the_top_and_each_from_the_left(rows):
    boxes = [one for row in rows for one in row]
    for seed in range(3):
        found = rows_of(random.Random(seed).sample(boxes, len(boxes)))
        assert [[one.tolist() for one in row] for row in found] == [
            [one.tolist() for one in row] for row in rows
        ]


def test_words_of_one_row_that_jump_are_read_from_left_to_right(scorer):
    page = Image.new("RGB", (520, 260), "white")
    for text, left, top in (
        ("second", 300, 20),
        ("first", 20, 40),
        ("fourth", 290, 150),
        ("third", 10, 172),
    ):
        page.paste(picture(text, size=(190, 70), points=44), (left, top))
    (score,) = scorer.score([page], ["first second third fourth"], scene=True)
    assert score.text == "first second third fourth"


class Hebrew:
    """A recogniser of three letters that reads the same every time, as CTC does: from left to
    right."""

    characters = ("blank", *"\u05d0\u05d1\u05d2")
    info = {"model": "by hand"}  # noqa: RUF012
    together = 1

    def probs(self, lines):
        return [np.eye(4, dtype=np.float32)[[3, 0, 2, 1]] for _ in lines]

    def decode(self, probs):
        return "".join(self.characters[place] for place in probs.argmax(1) if place), 1.0


def test_right_to_left_text_is_compared_as_it_is_written(monkeypatch):
    monkeypatch.setattr(
        "reward_server.scorers.ocr.scorer.load_recogniser", lambda *args, **options: Hebrew()
    )
    right, backwards = OCRScorer().score(
        [Image.new("RGB", (9, 9))] * 2, ["\u05d0\u05d1\u05d2", "\u05d2\u05d1\u05d0"]
    )
    assert right.text == "\u05d0\u05d1\u05d2"
    assert (right.accuracy, right.likelihood) == (1.0, 1.0)
    assert backwards.accuracy == pytest.approx(1 / 3)
    assert backwards.likelihood < 1e-6


def test_an_empty_scene_reads_nothing(scorer):
    (score,) = scorer.score([Image.new("RGB", (90, 70), "white")], ["word"], scene=True)
    assert (score.text, score.confidence, score.accuracy) == ("", 0.0, 0.0)
    assert score.likelihood < 1e-3


@pytest.mark.parametrize(
    ("size", "width"), [((96, 32), 160), ((1, 1000), 32), ((10_000, 10), 3200), ((48, 48), 64)]
)
def test_the_padded_width_depends_on_the_picture_alone(size, width):
    assert padded_width(*size) == width


def test_extreme_shapes_are_read_without_an_error(scorer):
    shapes = [(1, 1), (1, 300), (300, 1), (4000, 3)]
    assert len(scorer.score([Image.new("RGB", shape) for shape in shapes], ["a"] * 4)) == 4


def test_the_components_are_ordered_as_they_must_be_and_confidence_is_not(scorer):
    """200 held-out pictures: right word, one letter wrong, nothing painted, mirrored."""
    rng = random.Random(7)
    words = ["".join(rng.choices("bcdefghknprstuwxyz", k=5)) for _ in range(50)]
    kinds: dict[str, list] = {"right": [], "one wrong": [], "empty": [], "mirrored": []}
    for place, word in enumerate(words):
        font, spot = FONTS[place % 4], rng.randrange(5)
        wrong = word[:spot] + ("m" if word[spot] != "m" else "a") + word[spot + 1 :]
        right = picture(word, font=font)
        for kind, image in zip(
            kinds,
            (right, picture(wrong, font=font), picture(""), ImageOps.mirror(right)),
            strict=True,
        ):
            kinds[kind].append((image, word))
    means = {}
    for kind, pairs in kinds.items():
        scores = scorer.score(*zip(*pairs, strict=True))
        means[kind] = {
            part: float(np.mean([getattr(score, part) for score in scores]))
            for part in ("accuracy", "likelihood", "confidence")
        }
    assert means["right"]["accuracy"] > 0.95
    assert 0.7 < means["one wrong"]["accuracy"] < 0.85  # four of five letters
    assert means["mirrored"]["accuracy"] < 0.5
    assert means["empty"]["accuracy"] < 0.05
    likelihood = {kind: mean["likelihood"] for kind, mean in means.items()}
    assert likelihood["right"] > 0.95
    assert (
        likelihood["right"]
        > likelihood["one wrong"]
        > 2 * max(likelihood["mirrored"], likelihood["empty"])
    )
    # A crisp wrong word is as confident as the right one: a reward from confidence would not mind.
    assert means["one wrong"]["confidence"] > 0.9 * means["right"]["confidence"]
    assert means["mirrored"]["confidence"] > 0.5
