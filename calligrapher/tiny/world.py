"""Draws the tiny world: words of 3 to 6 capitals in many fonts and colours, 96 x 32 px.

Every letter has a cell of its own (15 px), left-aligned in the line. A case is a picture that shows
one word, a mask over it, a reference that shows another word in the style wanted, and the text to
write. Training and evaluation share no word and no (font, hue) style; everything follows from a
seed.
"""

import colorsys
import functools
import hashlib
import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from calligrapher.durable import atomic_folder

logger = logging.getLogger(__name__)

LISTING = "self_bench.txt"
WIDTH, HEIGHT = 96, 32
CELL, LEFT, MIN_LETTERS, MAX_LETTERS = 15, 3, 3, 6
TOP, BOTTOM = 4, 28
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
FONTS = (
    ("DejaVuSans-Bold.ttf", 18),
    ("DejaVuSerif-Bold.ttf", 17),
    ("DejaVuSansMono-Bold.ttf", 20),
    ("DejaVuSans-BoldOblique.ttf", 18),
    ("STIXGeneralBol.ttf", 20),
    ("cmb10.ttf", 20),
    ("cmss10.ttf", 21),
)
HUES = 12


@dataclass(frozen=True)
class Style:
    """How a word looks: font index, text colour, background left and right (RGB in [0, 1])."""

    font: int
    ink: tuple[float, float, float]
    paper: tuple[tuple[float, float, float], tuple[float, float, float]]

    @property
    def on_light(self) -> bool:
        """Whether the paper is light, so that the ink is dark."""
        return sum(self.paper[0]) > 1.5


@dataclass(frozen=True)
class Drawing:
    """One case: pixel arrays [32, 96, 3] and [32, 96] in [0, 1], and its words.

    `target` is the source with `text` in the reference's ink and font: what a perfect model would
    paint.
    """

    source: np.ndarray
    mask: np.ndarray
    reference: np.ndarray
    target: np.ndarray
    text: str


def split_of(key: str) -> str:
    """Return `train` or `evaluation` for a word or a style: one in six is held out, by hash."""
    return "evaluation" if hashlib.sha256(key.encode()).digest()[0] % 6 == 0 else "train"


def beyond(text: str, size: tuple[int, int]) -> list[str]:
    """Return how a text, and a picture of `size` in pixels, differ from all that a model of the
    tiny world has seen; empty where they do not. Each is a phrase, as `9 characters`."""
    strange = [c for c in dict.fromkeys(text) if c not in LETTERS]
    small = "".join(c for c in strange if c.islower())
    signs = ["a space" if c.isspace() else c for c in strange if not c.islower()]
    found = [f"the small letters {small}"] if small else []
    found += [f"the sign{'s' * (len(signs) > 1)} {' '.join(signs)}"] if signs else []
    if not MIN_LETTERS <= len(text) <= MAX_LETTERS:
        found.append(f"{len(text)} characters")
    if size != (WIDTH, HEIGHT):
        found.append(f"a picture of {size[0]} x {size[1]}")
    return found


def random_word(rng: np.random.Generator, split: str) -> str:
    """Return a word of the split: letters in turn from vowels and consonants, or at random.

    Random is one in three.
    """
    vowels, consonants = "AEIOU", "BCDFGHJKLMNPQRSTVWXYZ"
    while True:
        length = int(rng.integers(MIN_LETTERS, MAX_LETTERS + 1))
        if rng.random() < 1 / 3:
            word = "".join(LETTERS[i] for i in rng.integers(0, 26, length))
        else:
            turn = int(rng.integers(0, 2))
            word = "".join(
                (pool := vowels if (i + turn) % 2 else consonants)[int(rng.integers(0, len(pool)))]
                for i in range(length)
            )
        if split_of(word) == split:
            return word


def random_style(rng: np.random.Generator, split: str) -> Style:
    """Return a legible style of the split: dark ink on light paper or light ink on dark paper."""
    while True:
        font, hue = int(rng.integers(0, len(FONTS))), int(rng.integers(0, HUES))
        if split_of(f"{font}/{hue}") == split:
            break
    dark_ink = bool(rng.integers(0, 2))
    ink_value = rng.uniform(0.1, 0.55) if dark_ink else rng.uniform(0.85, 1.0)
    ink = colorsys.hsv_to_rgb(
        (hue + rng.uniform(0.1, 0.9)) / HUES, rng.uniform(0.5, 1.0), ink_value
    )
    if not dark_ink:
        ink = tuple(0.45 + 0.55 * c for c in ink)
    paper_value = (0.8, 1.0) if dark_ink else (0.05, 0.35)
    paper_hue = rng.uniform()
    paper = tuple(
        colorsys.hsv_to_rgb(paper_hue, rng.uniform(0.0, 0.35), rng.uniform(*paper_value))
        for _ in range(2)
    )
    return Style(font, ink, paper)


@functools.cache
def glyph(font: int, letter: str) -> np.ndarray:
    """Return the coverage [24, 15] of one letter in its cell, in [0, 1].

    The letter is centred, and squeezed when it is wider than the cell.
    """
    from matplotlib import get_data_path

    name, size = FONTS[font]
    scale = 4
    face = ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / name), size * scale)
    wide = Image.new("L", (CELL * scale * 2, (BOTTOM - TOP) * scale))
    ImageDraw.Draw(wide).text((CELL * scale, 19 * scale), letter, font=face, fill=255, anchor="ms")
    left, _, right, _ = wide.getbbox()
    room = (CELL - 1) * scale
    drawn = wide.crop((left, 0, right, wide.height))
    if drawn.width > room:
        drawn = drawn.resize((room, wide.height), Image.Resampling.LANCZOS)
    cell = Image.new("L", (CELL * scale, wide.height))
    cell.paste(drawn, ((cell.width - drawn.width) // 2, 0))
    small = cell.resize((CELL, BOTTOM - TOP), Image.Resampling.BOX)
    return np.asarray(small, dtype=np.float32) / 255.0


def paper(style: Style, width: int = WIDTH, height: int = HEIGHT) -> np.ndarray:
    """Return the empty background [height, width, 3] of a style: a gradient, left to right."""
    t = np.linspace(0.0, 1.0, width, dtype=np.float32)[None, :, None]
    left, right = (np.asarray(c, dtype=np.float32) for c in style.paper)
    return np.broadcast_to((1 - t) * left + t * right, (height, width, 3)).copy()


def write(background: np.ndarray, word: str, style: Style) -> np.ndarray:
    """Return `word` in the ink and font of `style` on a copy of `background` [32, 96, 3]."""
    picture = background.copy()
    ink = np.asarray(style.ink, dtype=np.float32)
    for i, letter in enumerate(word):
        cell = picture[TOP:BOTTOM, LEFT + i * CELL : LEFT + (i + 1) * CELL]
        cover = glyph(style.font, letter)[..., None]
        cell[...] = (1 - cover) * cell + cover * ink
    return picture


def mask_for(letters: int) -> np.ndarray:
    """Return a mask [32, 96] over the cells of a word with so many letters; 1 = paint."""
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.float32)
    mask[TOP:BOTTOM, LEFT : LEFT + letters * CELL] = 1.0
    return mask


def random_case(rng: np.random.Generator, split: str) -> Drawing:
    """Return one case of the split.

    The reference's ink must be legible on the source's paper, so both share lightness; its hue,
    font and paper are its own.
    """
    source_style, reference_style = random_style(rng, split), random_style(rng, split)
    while source_style.on_light != reference_style.on_light:
        reference_style = random_style(rng, split)
    old, shown, text = (random_word(rng, split) for _ in range(3))
    background = paper(source_style)
    return Drawing(
        source=write(background, old, source_style),
        mask=mask_for(max(len(old), len(text))),
        reference=write(paper(reference_style), shown, reference_style),
        target=write(background, text, reference_style),
        text=text,
    )


def to_image(array: np.ndarray) -> Image.Image:
    """Return [H, W] or [H, W, 3] in [0, 1] as a picture."""
    return Image.fromarray((array * 255).round().clip(0, 255).astype(np.uint8))


def shared_bench(folder: Path, *, num_cases: int, split: str, seed: int) -> Path:
    """Return a bench folder that many runs use, drawn first where it is not there.

    Runs may start together: each draws aside, and the first one's folder is renamed into place.
    """
    if folder.is_dir() and not (folder / LISTING).exists():
        shutil.rmtree(folder, ignore_errors=True)  # Half drawn, by a version that drew in place.
    if not folder.is_dir():
        logger.info("drawing %d tiny %s cases into %s", num_cases, split, folder)
        with atomic_folder(folder) as drawing:
            write_bench(drawing, num_cases=num_cases, split=split, seed=seed)
    return folder


def write_bench(folder: Path, *, num_cases: int, split: str, seed: int) -> Path:
    """Write cases in the bench layout.

    That is `testN_source.png`, `testN_mask.png`, `testN_ref.png` and `self_bench.txt`.
    `testN_target.png` is what a perfect model would paint; the supervised warm-up learns from it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for n in range(1, num_cases + 1):
        rng = np.random.default_rng([seed, n, int(split == "evaluation")])
        case = random_case(rng, split)
        to_image(case.source).save(folder / f"test{n}_source.png")
        to_image(case.mask).save(folder / f"test{n}_mask.png")
        to_image(case.reference).save(folder / f"test{n}_ref.png")
        to_image(case.target).save(folder / f"test{n}_target.png")
        lines.append(f"{n}-{case.text}")
    (folder / LISTING).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder
