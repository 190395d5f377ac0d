"""Odd and broken pictures of a case, row by row as docs/data.md lists them: what is refused, what
is mended.

Files that are missing, cut off, of another size, too small or too tall are rows of test_dataset.py.
"""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from calligrapher.data.canvas import Canvas, prepare
from calligrapher.data.dataset import load_cases
from calligrapher.data.images import load_mask, load_rgb
from calligrapher.errors import DataError

SIZE = (48, 32)
BOX = (6, 8, 30, 20)
ORIENTATION, UPRIGHT, QUARTER, HALF = 0x0112, 1, 6, 3


@pytest.fixture
def folder(tmp_path):
    """One case: a coloured source with a red corner at the top left, a mask, a reference."""
    source = Image.new("RGB", SIZE, (40, 90, 160))
    source.paste((255, 0, 0), (0, 0, 4, 4))
    source.save(tmp_path / "source.png")
    mask = Image.new("L", SIZE)
    mask.paste(255, BOX)
    mask.save(tmp_path / "mask.png")
    Image.new("RGB", (40, 20), (200, 180, 20)).save(tmp_path / "reference.png")
    return tmp_path


def load(folder, **changes):
    files = {role: f"{role}.png" for role in ("source", "mask", "reference")}
    record = files | {"text": "word", "case_id": "one"} | changes
    (folder / "cases.jsonl").write_text(json.dumps(record))
    (case,) = load_cases(folder / "cases.jsonl", "jsonl")
    return case


def turn(path, orientation, to=None):
    """Store the picture turned, with the EXIF note that turns it upright again."""
    image = Image.open(path)
    stored = {QUARTER: Image.Transpose.ROTATE_90, HALF: Image.Transpose.ROTATE_180}.get(orientation)
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    (image.transpose(stored) if stored is not None else image).save(to or path, exif=exif)


def swap(folder):
    (folder / "source.png").rename(folder / "other.png")
    (folder / "mask.png").rename(folder / "source.png")
    (folder / "other.png").rename(folder / "mask.png")


def mark_without_turning(folder):
    exif = Image.Exif()
    exif[ORIENTATION] = QUARTER
    Image.open(folder / "mask.png").save(folder / "mask.png", exif=exif)


REFUSED = {
    "source and mask swapped": (swap, {}, "mask.png must be a grey mask"),
    "the mask given as source as well": (
        lambda f: None,
        {"source": "mask.png"},
        "mask.png must be another picture than its source. Found the same bytes in both.",
    ),
    "a copy of the mask as source": (
        lambda f: shutil.copy(f / "mask.png", f / "source.png"),
        {},
        "mask.png must be another picture than its source. Found the same bytes in both.",
    ),
    "the reference given as mask": (
        lambda f: None,
        {"mask": "reference.png"},
        "must be a grey mask",
    ),
    "mask without white": (
        lambda f: Image.new("L", SIZE).save(f / "mask.png"),
        {},
        "must have a white pixel",
    ),
    "mask white everywhere": (
        lambda f: Image.new("1", SIZE, 1).save(f / "mask.png"),
        {},
        "must keep a part of the source",
    ),
    "mask with transparent pixels": (
        lambda f: Image.new("LA", SIZE, (0, 0)).save(f / "mask.png"),
        {},
        "must be an opaque mask. Found transparent pixels.",
    ),
    "mask turned by EXIF, source not": (
        mark_without_turning,
        {},
        "mask.png must be as large as its source, 48x32. Found 32x48.",
    ),
    "16-bit mask with transparent pixels": (
        lambda f: Image.fromarray(np.full(SIZE[::-1], 257, np.uint16)).save(
            f / "mask.png", transparency=257
        ),
        {},
        "must be an opaque mask. Found transparent pixels.",
    ),
    "animated source": (
        lambda f: Image.new("RGB", SIZE).save(
            f / "source.gif", save_all=True, append_images=[Image.new("RGB", SIZE, "red")]
        ),
        {"source": "source.gif"},
        "source.gif must hold one picture. Found 2 frames or pages.",
    ),
    "TIFF of several pages": (
        lambda f: Image.new("RGB", SIZE).save(
            f / "reference.tif", save_all=True, append_images=[Image.new("RGB", SIZE, "red")] * 2
        ),
        {"reference": "reference.tif"},
        "reference.tif must hold one picture. Found 3 frames or pages.",
    ),
    "all pictures of one pixel": (
        lambda f: [
            Image.new("RGB", (1, 1), c).save(f / f"{n}.png")
            for n, c in (("source", 9), ("mask", "white"))
        ],
        {},
        "must be at least 2 pixels a side. Found 1x1.",
    ),
    "text with a newline": (lambda f: None, {"text": "two\nlines"}, "text must be one line"),
    "text of blanks": (lambda f: None, {"text": " \u200b"}, "text must have a visible character"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_it_is_refused_by_name(folder, what):
    damage, changes, message = REFUSED[what]
    damage(folder)
    with pytest.raises(DataError) as caught:
        load(folder, **changes)
    assert message in str(caught.value)


def rgb_mask(folder):
    Image.open(folder / "mask.png").convert("RGB").save(folder / "mask.png")


def soft_mask(folder):
    pixels = np.asarray(Image.open(folder / "mask.png")).astype(int)
    Image.fromarray(np.where(pixels > 0, 128, 127).astype(np.uint8)).save(folder / "mask.png")


def jpeg_mask(folder):
    Image.open(folder / "mask.png").save(folder / "mask.jpg", quality=60)
    (folder / "mask.jpg").rename(folder / "mask.png")


def cmyk_source(folder):
    Image.open(folder / "source.png").convert("CMYK").save(folder / "source.jpg", quality=95)
    (folder / "source.jpg").rename(folder / "source.png")


def clear_reference(folder):
    image = Image.new("RGBA", (40, 20), (0, 0, 0, 0))
    ImageDraw.Draw(image).rectangle((10, 5, 20, 10), fill=(200, 0, 0, 255))
    image.save(folder / "reference.png")


MENDED = {
    "mask in RGB": (rgb_mask, {}),
    "mask of 127 and 128": (soft_mask, {}),
    "mask as JPEG": (jpeg_mask, {}),
    "CMYK JPEG": (cmyk_source, {}),
    "reference with alpha": (clear_reference, {}),
    "source turned by EXIF": (lambda f: turn(f / "source.png", QUARTER), {}),
    "source and mask with different EXIF": (
        lambda f: [turn(f / "source.png", QUARTER), turn(f / "mask.png", HALF)],
        {},
    ),
    "text with quotes": (lambda f: None, {"text": 'it\'s "here"'}),
}


@pytest.mark.parametrize("what", MENDED)
def test_it_is_read_as_what_it_shows(folder, what):
    damage, changes = MENDED[what]
    damage(folder)
    case = load(folder, **changes)
    source, mask = load_rgb(case.source), load_mask(case.mask)
    assert (source.size, source.mode, mask.size) == (SIZE, "RGB", SIZE)
    assert np.abs(np.array(source.getpixel((1, 1))) - (255, 0, 0)).max() <= 8
    assert np.abs(np.array(source.getpixel((40, 25))) - (40, 90, 160)).max() <= 8
    assert mask.getbbox() == BOX
    assert set(np.unique(np.asarray(mask))) == {0, 255}
    prepared = prepare(case, Canvas(96, 64, reference_context=True))
    assert prepared.mask.sum() == 4 * 24 * 12
    assert prepared.style_image.getpixel((256, 5)) == (0, 0, 0)


def test_what_is_clear_in_a_reference_is_white_within_the_black_letterbox(folder):
    clear_reference(folder)
    style = prepare(load(folder), Canvas(96, 64)).style_image
    assert style.getpixel((5, 256)) == (255, 255, 255)
    assert style.getpixel((5, 5)) == (0, 0, 0)


def test_quotes_stay_in_the_prompt(folder):
    assert load(folder, text='it\'s "here"').prompt == "The text is 'it's \"here\"'."


def test_the_documents_list_every_row():
    text = (Path(__file__).parents[3] / "docs" / "data.md").read_text()
    assert [what for what in (*REFUSED, *MENDED) if f"| {what} |" not in text] == []
