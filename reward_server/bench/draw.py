"""Draws labelled pictures of text in scenes, for `cases`: right ones, and wrong ones of many kinds.

Another seed draws other words, fonts, colours and places. Fonts are those that matplotlib carries.
"""

import json
import random
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont

SIDE = 384  # px
_SMALLEST = 5  # px, of letters
_FONTS = (
    "DejaVuSans DejaVuSans-Bold DejaVuSans-Oblique DejaVuSerif DejaVuSerif-Bold DejaVuSerif-Italic"
    " DejaVuSansMono STIXGeneral STIXGeneralBol STIXGeneralItalic cmr10 cmb10 cmss10 cmtt10"
)
_WORDS = (
    "anchor bakery Bistro blue bread bridge Brooklyn cabin candle Canyon castle CINEMA cloud coffee"
    " compass copper Corner Diner dragon Echo EXPRESS falcon Fancy FLOWERS forest frost galaxy"
    " Gallery ginger harbor Hazel HERITAGE honey Horizon island Jasmine jungle kitchen lantern"
    " lemon LIBRARY lucky magnet maple mellow meteor Midnight moment museum nectar NORTH Oasis"
    " orchid oxygen paddle pepper phoenix Pilgrim planet POTTERY pumpkin quartz Quick rabbit radio"
    " Ribbon rocket saffron SALOON sketch spirit STUDIO sugar summit sunset Theatre thunder tiger"
    " travel tulip velvet Victory violet walnut whisper willow Winter wizard yellow zephyr"
)
_LONG = (
    "The early bird gets the worm",
    "Fresh bread every single day",
    "No parking in front of gate",
    "Please mind the gap today",
    "Made with love in the city",
    "Open until late on Fridays",
    "Wash your hands before work",
)
_PUNCTUATED = ("It's here!", "Salt & Pepper", "50% off", "Don't panic", "Room #12", "Who's next?")
_DIGITS = ("1984", "2031", "350", "47", "6:30", "90210", "24/7")
_ACCENTS = {"Crème": "Creme", "Señor": "Senor", "Müller": "Muller", "château": "chateau"}
_LETTERS = "abdefghknprstuy"


@dataclass
class Page:
    """One picture on its way: a ground, a layer of ink in one colour, and a mask.

    ground: float [SIDE, SIDE, 3]. ink: how much of the colour lies where, 0..1 [SIDE, SIDE]. box:
    left, top, right, bottom of the mask. text: where the text was drawn, as `box`. below: how many
    levels the ink lies from the ground in place of its colour (None: it has its colour).
    """

    rng: random.Random
    target: str
    font: str = field(init=False)
    ground: np.ndarray = field(init=False)
    colour: np.ndarray = field(init=False)
    ink: np.ndarray = field(init=False)
    box: tuple[int, int, int, int] = field(init=False)
    text: tuple[int, int, int, int] = (0, 0, 0, 0)
    mask: Image.Image = field(init=False)
    below: float | None = None

    def __post_init__(self) -> None:
        rng = self.rng
        noise = np.random.default_rng(rng.getrandbits(32))
        self.font = rng.choice(
            [one for one in _FONTS.split() if self.target.isascii() or one[:2] != "cm"]
        )
        dark = rng.random() < 0.5
        base = noise.uniform(20, 90, 3) if dark else noise.uniform(165, 235, 3)
        spread = rng.choice((4, 12, 24))
        soft = noise.normal(0, 1, (rng.choice((3, 12, 30)),) * 2 + (3,)).astype(np.float32)
        soft = cv2.resize(soft, (SIDE, SIDE), interpolation=cv2.INTER_CUBIC)
        self.ground = base + spread * soft + noise.normal(0, rng.choice((0, 3)), soft.shape)
        self.colour = noise.uniform(175, 255, 3) if dark else noise.uniform(0, 80, 3)
        self.ink = np.zeros((SIDE, SIDE), dtype=np.float32)
        wide, high = rng.randint(230, 330), rng.randint(64, 110)
        self.put_mask(wide, high)

    def put_mask(self, wide: int, high: int) -> None:
        """Make the mask a box of this size, anywhere."""
        left = self.rng.randint(8, SIDE - wide - 8)
        top = self.rng.randint(8, SIDE - high - 8)
        self.box = (left, top, left + wide, top + high)
        self.mask = _rectangle(self.box)

    def write(
        self, text: str, box: tuple[float, ...] | None = None, fill: float = 0.0, **style: Any
    ) -> None:
        """Draw lines of text into the middle of a box, as large as fits to `fill` of it."""
        fill = fill or self.rng.uniform(0.7, 0.95)
        layer, self.text = text_in(text, self.font, box or self.box, fill, **style)
        self.ink = np.maximum(self.ink, layer)

    def write_beside(self, text: str) -> None:
        """Draw text above or below the mask, clear of it."""
        left, top, right, bottom = self.box
        room = (
            (left, 0, right, top - 12) if top > SIDE - bottom else (left, bottom + 12, right, SIDE)
        )
        self.write(text, room, 0.8, largest=60)

    def mask_around(self, room: int) -> None:
        """Make the mask the box of the text and some px around it."""
        left, top, right, bottom = self.text
        self.box = (left - room, top - room, right + room, bottom + room)
        self.mask = _rectangle(self.box)

    def flip(self, *, across: bool) -> None:
        """Mirror the text within its own box, left to right or (`across`) top to bottom."""
        left, top, right, bottom = self.text
        part = self.ink[top:bottom, left:right]
        self.ink[top:bottom, left:right] = part[::-1].copy() if across else part[:, ::-1].copy()

    def shift(self, by: float) -> None:
        """Move ink and mask along; what leaves the picture is lost."""
        at = np.array([[1, 0, round(by)], [0, 1, 0]], dtype=np.float32)
        self.ink = cv2.warpAffine(self.ink, at, (SIDE, SIDE))
        self.mask = Image.fromarray(cv2.warpAffine(np.asarray(self.mask), at, (SIDE, SIDE)))

    def blur(self, share: float) -> None:
        """Blur the ink, by a share of the text's height."""
        self.ink = cv2.GaussianBlur(self.ink, (0, 0), share * (self.text[3] - self.text[1]))

    def hide(self, left: float, top: float, right: float, bottom: float) -> None:
        """Cover a part of the ink with ground: as it was, or a flat patch of its mean."""
        rows = slice(max(round(top), 0), round(bottom))
        columns = slice(max(round(left), 0), round(right))
        self.ink[rows, columns] = 0
        if self.rng.random() < 0.5:
            self.ground[rows, columns] = self.ground[rows, columns].mean(axis=(0, 1))

    def turn(self, degrees: float) -> None:
        """Turn ink and mask about the middle of the picture, where the box must be."""
        at = cv2.getRotationMatrix2D((SIDE / 2, SIDE / 2), degrees, 1)
        self.ink = cv2.warpAffine(self.ink, at, (SIDE, SIDE))
        self.mask = Image.fromarray(cv2.warpAffine(np.asarray(self.mask), at, (SIDE, SIDE)))

    def strike(self, points: list[tuple[float, float]], width: int) -> None:
        """Draw a stroke of ink through these points."""
        layer = Image.fromarray((self.ink * 255).astype(np.uint8))
        ImageDraw.Draw(layer).line(points, fill=255, width=width, joint="curve")
        self.ink = np.asarray(layer, dtype=np.float32) / 255

    def picture(self) -> Image.Image:
        """The page as it is seen, without its mask."""
        colour = self.colour if self.below is None else self.ground + self.below
        shown = self.ground + self.ink[..., None] * (colour - self.ground)
        return Image.fromarray(shown.round().clip(0, 255).astype(np.uint8))


def text_in(
    text: str,
    font: str,
    box: tuple[float, ...],
    fill: float,
    spread: float = 0.0,
    outline: bool = False,
    largest: int = 400,
) -> tuple[np.ndarray, tuple[int, int, int, int]]:
    """(ink 0..1 [SIDE, SIDE], its box) of lines of text in the middle of a box.

    spread: space between letters, in ems. outline: of its letters alone.
    """
    import matplotlib

    file = str(Path(matplotlib.get_data_path()) / "fonts/ttf" / f"{font}.ttf")
    layer = Image.new("L", (SIDE, SIDE))
    left, top, right, bottom = box
    points = min(round(bottom - top) + 8, largest)
    while True:
        face = ImageFont.truetype(file, points)
        lines = [_line(part, face, spread) for part in text.split("\n")]
        wide = max(line.width for line in lines)
        step = round(1.15 * points)
        high = lines[0].height if len(lines) == 1 else step * (len(lines) - 1) + lines[-1].height
        fits = min(fill * (right - left) / wide, fill * (bottom - top) / high)
        if fits >= 1 or points <= _SMALLEST:
            break
        points = max(min(points - 1, int(points * fits) + 1), _SMALLEST)
    y = round((top + bottom - high) / 2)
    for line in lines:
        x = round((left + right - line.width) / 2)
        layer.paste(255, (x, y), line)
        y += step
    if outline:
        grown = layer.filter(ImageFilter.MaxFilter(3))
        inner = layer.filter(ImageFilter.MinFilter(3))
        layer = ImageChops.subtract(grown, inner)
    return np.asarray(layer, dtype=np.float32) / 255, layer.getbbox() or (0, 0, 1, 1)


def _line(text: str, face: ImageFont.FreeTypeFont, spread: float) -> Image.Image:
    """One line, cut out close: letters as an L picture."""
    room = round(face.size)
    wide = round(face.getlength(text) + spread * face.size * len(text)) + 2 * room
    line = Image.new("L", (wide, 3 * room))
    draw = ImageDraw.Draw(line)
    if not spread:
        draw.text((room, room), text, font=face, fill=255)
    x = float(room)
    for letter in text if spread else "":
        draw.text((x, room), letter, font=face, fill=255)
        x += face.getlength(letter) + spread * face.size
    return line.crop(line.getbbox() or (0, 0, 1, 1))


# --- right ones: a person reads the target, and nothing else, in the mask ---


def _plain(page: Page) -> None:
    page.write(page.target)


def _tight(page: Page) -> None:
    page.write(page.target)
    page.mask_around(page.rng.randint(2, 5))


def _square(page: Page) -> None:
    page.put_mask(220, 200)
    page.write(page.target)


def _tall(page: Page) -> None:
    page.put_mask(200, 330)
    page.write(page.target)


def _small(page: Page) -> None:
    page.write(page.target, largest=page.rng.randint(20, 26), fill=0.9)
    page.mask_around(6)


def _lines(page: Page) -> None:
    page.put_mask(page.rng.randint(220, 300), page.rng.randint(120, 200))
    page.write(page.target.replace(" ", "\n"))


def _long(page: Page) -> None:
    page.put_mask(350, page.rng.randint(40, 60))
    page.write(page.target, fill=0.95)


def _turned(page: Page) -> None:
    page.box = (60, 150, 324, 226)
    page.mask = _rectangle(page.box)
    page.write(page.target)
    page.turn(page.rng.choice((-1, 1)) * page.rng.uniform(6, 35))


def _upward(page: Page) -> None:
    page.box = (40, 150, 344, 230)
    page.mask = _rectangle(page.box)
    page.write(page.target)
    page.turn(page.rng.choice((-90, 90)))


def _column(page: Page) -> None:
    page.target = page.target.upper()[:6]
    page.put_mask(80, 340)
    page.write("\n".join(page.target), fill=0.95)


def _near(page: Page) -> None:
    page.write(page.target)
    page.write_beside(_other(page))


def _spread(page: Page) -> None:
    page.write(page.target, spread=0.25)


def _outlined(page: Page) -> None:
    page.write(page.target, outline=True, spread=0.12)


def _underlined(page: Page) -> None:
    page.write(page.target, fill=0.7)
    left, _, right, bottom = page.text
    page.strike([(left, bottom + 5), (right, bottom + 5)], 3)


def _pale(page: Page) -> None:
    page.write(page.target)
    page.below = page.rng.choice((-1, 1)) * page.rng.uniform(28, 45)


def _soft(page: Page) -> None:
    page.write(page.target)
    page.blur(0.04)


# --- wrong ones: other letters, or none ---


def _spelled(change: Callable[[random.Random, str], str]) -> Callable[[Page], None]:
    def draw(page: Page) -> None:
        page.write(change(page.rng, page.target))

    return draw


def _substituted(rng: random.Random, word: str) -> str:
    place = rng.randrange(len(word))
    return word[:place] + _letter(rng, word[place]) + word[place + 1 :]


def _deleted(rng: random.Random, word: str) -> str:
    place = rng.randrange(len(word))
    return word[:place] + word[place + 1 :]


def _inserted(rng: random.Random, word: str) -> str:
    place = rng.randrange(len(word) + 1)
    return word[:place] + _letter(rng, "") + word[place:]


def _swapped(rng: random.Random, word: str) -> str:
    place = rng.choice([i for i in range(len(word) - 1) if word[i] != word[i + 1]])
    return word[:place] + word[place + 1] + word[place] + word[place + 2 :]


def _letter(rng: random.Random, beside: str) -> str:
    letter = rng.choice([one for one in _LETTERS if one != beside.lower()])
    return letter.upper() if beside.isupper() else letter


def _two_lines(second: Callable[[Page], str]) -> Callable[[Page], None]:
    def draw(page: Page) -> None:
        page.put_mask(page.rng.randint(240, 320), page.rng.randint(110, 160))
        page.write(f"{page.target}\n{second(page)}")

    return draw


def _small_beside(page: Page) -> None:
    left, top, right, bottom = page.box
    page.write(page.target, (left, top, right, bottom - 22))
    page.write(_other(page), (left, bottom - 20, right, bottom), 1.0, largest=14)


def _only_outside(page: Page) -> None:
    page.write_beside(page.target)


def _tiny(page: Page) -> None:
    page.put_mask(330, 130)
    page.write(page.target, largest=9)


def _repeated(page: Page) -> None:
    page.write("\n".join([" ".join([page.target] * 3)] * 4))


def _mirrored(page: Page) -> None:
    page.write(page.target)
    page.flip(across=False)


def _upside_down(page: Page) -> None:
    page.write(page.target)
    page.flip(across=True)
    page.flip(across=False)


# --- wrong ones: the right letters, spoilt ---


def _cut_by_mask(page: Page) -> None:
    page.write(page.target)
    left, top, right, bottom = page.text
    letter = (right - left) / len(page.target)
    off = page.rng.uniform(0.5, 0.9) * letter
    first = page.rng.random() < 0.5
    page.mask = _rectangle(
        (
            left + off if first else left - 6,
            top - 6,
            right + 6 if first else right - off,
            bottom + 6,
        )
    )


def _cut_by_picture(page: Page) -> None:
    page.write(page.target)
    left, _, right, _ = page.text
    off = page.rng.uniform(0.5, 0.9) * (right - left) / len(page.target)
    page.shift(-left - off if page.rng.random() < 0.5 else SIDE - right + off)


def _cut_by_ground(page: Page) -> None:
    page.write(page.target)
    left, top, right, bottom = page.text
    off = page.rng.uniform(0.5, 0.9) * (right - left) / len(page.target)
    if page.rng.random() < 0.5:
        page.hide(left - 4, top - 4, left + off, bottom + 4)
    else:
        page.hide(right - off, top - 4, right + 4, bottom + 4)


def _rows_hidden(first: float, last: float) -> Callable[[Page], None]:
    def draw(page: Page) -> None:
        page.write(page.target)
        left, top, right, bottom = page.text
        high = bottom - top
        page.hide(left - 4, top + first * high - 2, right + 4, top + last * high + 2)

    return draw


def _letter_hidden(page: Page) -> None:
    """Half of a letter in the middle is covered."""
    page.write(page.target)
    left, top, right, bottom = page.text
    letter, high = (right - left) / len(page.target), bottom - top
    at = left + letter * page.rng.randrange(1, len(page.target) - 1)
    upper = page.rng.random() < 0.5
    page.hide(
        at + 0.1 * letter,
        top - 2 if upper else top + 0.45 * high,
        at + 0.9 * letter,
        top + 0.55 * high if upper else bottom + 2,
    )


def _struck(page: Page) -> None:
    page.write(page.target)
    left, top, right, bottom = page.text
    high = bottom - top
    for _ in range(page.rng.choice((1, 1, 2))):
        y = top + page.rng.uniform(0.4, 0.65) * high
        page.strike([(left - 4, y), (right + 4, y)], max(round(0.07 * high), 2))


def _scribbled(page: Page) -> None:
    page.write(page.target)
    left, top, right, bottom = page.text
    xs = np.linspace(left, right, page.rng.randint(7, 11))
    ys = [page.rng.uniform(top, top + 0.3 * (bottom - top)) for _ in xs]
    ys[1::2] = [page.rng.uniform(bottom - 0.3 * (bottom - top), bottom) for _ in ys[1::2]]
    page.strike(list(zip(xs, ys, strict=True)), max(round(0.08 * (bottom - top)), 2))


def _rows_missing(page: Page) -> None:
    page.write(page.target)
    for row in range(8):
        if row % 8 >= 3:
            page.ink[row::8] = 0


def _faint(page: Page) -> None:
    page.write(page.target)
    page.below = page.rng.choice((-2, 2))


def _blurred(page: Page) -> None:
    page.write(page.target)
    page.blur(0.3)


def _over_another(page: Page) -> None:
    page.write(page.target, fill=0.8)
    page.write(_other(page), fill=0.8)


def _other(page: Page) -> str:
    return page.rng.choice([one for one in _WORDS.split() if one.lower() != page.target.lower()])


def _rectangle(box: tuple[float, ...]) -> Image.Image:
    mask = Image.new("L", (SIDE, SIDE))
    left, top, right, bottom = map(round, box)
    ImageDraw.Draw(mask).rectangle((left, top, right - 1, bottom - 1), fill=255)
    return mask


def _word(rng: random.Random) -> str:
    return rng.choice(_WORDS.split())


def _pair(rng: random.Random) -> str:
    return " ".join(rng.sample(_WORDS.split(), 2))


# kind: (what the target is, how it is drawn)
RIGHT = {
    "word": (_word, _plain),
    "tight mask": (_word, _tight),
    "square mask": (_word, _square),
    "tall mask": (_word, _tall),
    "small": (_word, _small),
    "two words": (_pair, _plain),
    "two lines": (_pair, _lines),
    "three lines": (lambda rng: " ".join(rng.sample(_WORDS.split(), 3)), _lines),
    "long": (lambda rng: rng.choice(_LONG), _long),
    "digits": (lambda rng: rng.choice(_DIGITS), _plain),
    "punctuation": (lambda rng: rng.choice(_PUNCTUATED), _plain),
    "accents": (lambda rng: rng.choice(list(_ACCENTS)), _plain),
    "rotated": (_word, _turned),
    "up or down": (_word, _upward),
    "column": (_word, _column),
    "text outside": (_word, _near),
    "letterspaced": (_word, _spread),
    "outlined": (_word, _outlined),
    "underlined": (_word, _underlined),
    "pale": (_word, _pale),
    "soft": (_word, _soft),
}
WRONG = {
    "a letter substituted": (_word, _spelled(_substituted)),
    "a letter lost": (_word, _spelled(_deleted)),
    "a letter too many": (_word, _spelled(_inserted)),
    "letters swapped": (_word, _spelled(_swapped)),
    "case": (_word, _spelled(lambda _, word: word.swapcase())),
    "space lost": (_pair, _spelled(lambda _, words: words.replace(" ", ""))),
    "accent lost": (lambda rng: rng.choice(list(_ACCENTS)), _spelled(lambda _, w: _ACCENTS[w])),
    "word twice": (_word, _spelled(lambda _, word: f"{word} {word}")),
    "longer word": (_word, _spelled(lambda _, word: word + ("ERS" if word.isupper() else "ers"))),
    "word order": (_pair, _spelled(lambda _, words: " ".join(words.split()[::-1]))),
    "word added": (_word, lambda page: page.write(f"{page.target} {_other(page)}")),
    "word twice on two lines": (_word, _two_lines(lambda page: page.target)),
    "word added on a second line": (_word, _two_lines(_other)),
    "small text beside": (_word, _small_beside),
    "another word": (_word, lambda page: page.write(_other(page))),
    "empty": (_word, lambda page: None),
    "outside the mask": (_word, _only_outside),
    "tiny": (_word, _tiny),
    "tiny, repeated": (_word, _repeated),
    "mirrored": (_word, _mirrored),
    "upside down": (_word, _upside_down),
    "cut by the mask": (_word, _cut_by_mask),
    "cut by the picture": (_word, _cut_by_picture),
    "cut by ground": (_word, _cut_by_ground),
    "upper half hidden": (_word, _rows_hidden(0, 0.5)),
    "lower half hidden": (_word, _rows_hidden(0.5, 1)),
    "lower third hidden": (_word, _rows_hidden(0.66, 1)),
    "half a letter hidden": (_word, _letter_hidden),
    "struck out": (_word, _struck),
    "scribbled over": (_word, _scribbled),
    "5 of 8 rows missing": (_word, _rows_missing),
    "faint": (_word, _faint),
    "blurred": (_word, _blurred),
    "over another word": (_word, _over_another),
}


def draw(folder: Path, seed: int, per_kind: int) -> dict[str, Any]:
    """Draw pictures into a folder, which must not be there: as many of each kind."""
    folder.mkdir(parents=True)
    labelled = []
    for verdict, kinds in (("right", RIGHT), ("wrong", WRONG)):
        for kind, (target, paint) in kinds.items():
            for place in range(per_kind):
                rng = random.Random(f"{seed} {kind} {place}")
                page = Page(rng, target(rng))
                paint(page)
                name = f"{verdict}-{kind.replace(' ', '-').replace(',', '')}-{place}"
                page.picture().save(folder / f"{name}.jpg", quality=95)
                page.mask.save(folder / f"{name}.mask.png")
                labelled.append(
                    {"id": name, "kind": kind, "verdict": verdict, "target": page.target}
                )
    text = json.dumps(labelled, indent=1, ensure_ascii=False)
    (folder / "cases.json").write_text(text + "\n", encoding="utf-8")
    return {"folder": str(folder), "seed": seed, "pictures": len(labelled)}
