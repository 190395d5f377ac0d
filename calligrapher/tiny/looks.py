"""How alike two words look: ink, font and weight, whatever the word, its place and its paper.

`likeness` is what the embedded style tower learns: the cosine of two pictures' embeddings is the
likeness of what is written on them. Looks can be mixed, so a wrong one can be made right step by
step.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from calligrapher.tiny import world

INK_REACH = 18.0  # CIELAB: inks so far apart are alike by exp(-1/2); 2 is just noticeable
WEIGHT_REACH = 0.5


@dataclass(frozen=True)
class Look:
    """How a word is drawn.

    ink: RGB in [0, 1]; fonts: the share of each of `world.FONTS`, they add up to 1; weight: 0 as
    the font has it, 1 a pixel bolder on each side of a stroke, -1 a pixel thinner.
    """

    ink: tuple[float, float, float]
    fonts: tuple[float, ...]
    weight: float = 0.0

    @classmethod
    def of(cls, style: world.Style) -> "Look":
        """Return the look of a style of the drawn world."""
        return cls(style.ink, tuple(float(style.font == i) for i in range(len(world.FONTS))))

    def towards(self, other: "Look", share: float) -> "Look":
        """Return the look so far on the way to another (0 this one, 1 the other)."""

        def mixed(a: Sequence[float], b: Sequence[float]) -> tuple[float, ...]:
            return tuple((1 - share) * x + share * y for x, y in zip(a, b, strict=True))

        red, green, blue = mixed(self.ink, other.ink)
        (weight,) = mixed((self.weight,), (other.weight,))
        return Look((red, green, blue), mixed(self.fonts, other.fonts), weight)

    def but(self, **changes) -> "Look":
        """Return the same look with some of its parts replaced."""
        return replace(self, **changes)


def draw(background: np.ndarray, word: str, look: Look, shift: tuple[int, int] = (0, 0)):
    """Return `word` in this look on a copy of `background` [32, 96, 3], moved by (down, right) px.

    A shift must keep the word inside the picture.
    """
    picture, ink = background.copy(), np.asarray(look.ink, dtype=np.float32)
    top, left = world.TOP + shift[0], world.LEFT + shift[1]
    for i, letter in enumerate(word):
        cover = sum(
            share * world.glyph(font, letter) for font, share in enumerate(look.fonts) if share
        )
        cover = _weighted(cover, look.weight)[..., None]
        height, width = cover.shape[:2]
        cell = picture[top : top + height, left + i * width : left + (i + 1) * width]
        cell[...] = (1 - cover) * cell + cover * ink
    return picture


def _weighted(cover: np.ndarray, weight: float) -> np.ndarray:
    """Coverage [h, w] with strokes a share `weight` of a pixel bolder, or thinner below 0."""
    if weight == 0:
        return cover
    h, w = cover.shape
    wide = np.pad(cover, 1)
    steps = ((1, 1), (0, 1), (2, 1), (1, 0), (1, 2))
    moved = np.stack([wide[y : y + h, x : x + w] for y, x in steps])
    other = moved.max(0) if weight > 0 else moved.min(0)
    return (1 - abs(weight)) * cover + abs(weight) * other


def likeness(looks: Sequence[Look | None]) -> np.ndarray:
    """Return how alike each two of N looks are [N, N], in [0, 1]; None is a picture without a word.

    The mean of the likeness of inks (Gaussian in CIELAB) and of fonts (cosine of the shares), times
    that of weights. A word and no word are not alike at all.
    """
    there = [look for look in looks if look is not None]
    inks = lab(np.array([look.ink for look in there]).reshape(-1, 3))
    fonts = np.array([look.fonts for look in there]).reshape(-1, len(world.FONTS))
    fonts = fonts / np.linalg.norm(fonts, axis=1, keepdims=True)
    weights = np.array([[look.weight] for look in there]).reshape(-1, 1)
    known = (_near(inks, INK_REACH) + fonts @ fonts.T) / 2 * _near(weights, WEIGHT_REACH)
    found = np.zeros((len(looks), len(looks)))
    written = np.array([look is not None for look in looks], dtype=bool)
    found[np.ix_(written, written)] = known
    found[np.ix_(~written, ~written)] = 1.0
    return found


def _near(points: np.ndarray, reach: float) -> np.ndarray:
    squares = ((points[:, None] - points[None]) ** 2).sum(-1)  # [N, N]
    return np.exp(-squares / (2 * reach**2))


def lab(rgb: np.ndarray) -> np.ndarray:
    """sRGB [..., 3] in [0, 1] -> CIELAB [..., 3] under D65 (CIE 15:2004)."""
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = linear @ to_xyz.T / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    x, y, z = f[..., 0], f[..., 1], f[..., 2]
    return np.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], axis=-1)
