"""What the embedded SigLIP learns: the cosine of two embeddings is the likeness of two looks.

Drawn anew at every step: pairs of pictures of one look that share neither word, place nor paper,
whole or cropped to a mask, soft or noisy as a model paints them; looks between two styles; inks of
any colour; thinner and bolder strokes; papers without a word.
"""

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from calligrapher.tiny import world
from calligrapher.tiny.looks import Look, draw, likeness

EMPTY = 2  # looks of a batch that are a paper without a word


class TowerLoss(nn.Module):
    """How far the cosines of a step's embeddings are from the likeness of its looks.

    Two heads also ask each embedding [B, E] for its fonts and its ink, which the style adapter
    reads from it. anchor: a copy of the tower, whose embeddings of whole pictures must stay: crops
    then show the word anywhere in them.
    """

    def __init__(self, siglip, *, seed: int, looks: int, anchor=None):
        super().__init__()
        width = siglip.config.hidden_size
        self.siglip, self.seed, self.looks = siglip, seed, looks
        self._anchor = (anchor,)  # no part of this module's state
        self.font_head = nn.Linear(width, len(world.FONTS))
        self.ink_head = nn.Linear(width, 3)

    def forward(self, step: int) -> Tensor:
        (anchor,) = self._anchor
        side, loose = self.siglip.config.image_size, anchor is not None
        looks, pixels, whole = batch([self.seed, 4, step], self.looks, side, loose=loose)
        embedded_BE = self.siglip(pixel_values=pixels).pooler_output
        unit_BE = F.normalize(embedded_BE, dim=-1)
        expected_BB = torch.from_numpy(likeness(looks)).to(unit_BE.dtype)
        off_BB = (unit_BE @ unit_BE.T - expected_BB).square()
        same = off_BB[0::2, 1::2].diagonal().mean()  # two pictures of one look
        written = [i for i, look in enumerate(looks) if look is not None]
        fonts = torch.tensor([looks[i].fonts for i in written])
        inks = torch.tensor([looks[i].ink for i in written], dtype=unit_BE.dtype)
        moved = torch.zeros(())
        if loose and any(whole):
            with torch.no_grad():
                before = anchor(pixel_values=pixels[whole]).pooler_output
            moved = F.mse_loss(embedded_BE[whole], before) / before.var()
        return (
            10 * off_BB.mean()
            + (6 if loose else 3) * same
            + 3 * moved
            + 0.3 * F.cross_entropy(self.font_head(embedded_BE[written]), fonts)
            + 3 * F.mse_loss(self.ink_head(embedded_BE[written]), inks)
        )


def batch(
    seed: list[int], num_looks: int, side: int, *, loose: bool
) -> tuple[list[Look | None], Tensor, list[int]]:
    """Return two pictures of each look in turn: their looks, pixels [2N, 3, side, side], and which
    show a whole picture as it is; loose: crops show the word anywhere in them."""
    rng = np.random.default_rng(seed)
    looks: list[Look | None] = []
    pictures, whole = [], []
    for number in range(num_looks):
        look, light = _random_look(rng)
        for _ in range(2):
            looks.append(None if number < EMPTY else look)
            picture = _view(rng, looks[-1], light, loose)
            if picture.shape[1] == world.WIDTH and len(pictures) % 2 == 0:
                whole.append(len(pictures))
            pictures.append(boxed(picture, side))
    x = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
    generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
    painted = x[1::2]  # as a model paints: a little soft, a little noisy
    soft = F.avg_pool2d(painted, 3, 1, 1, count_include_pad=False)
    share = torch.rand(2, len(painted), 1, 1, 1, generator=generator)
    noise = torch.randn(painted.shape, generator=generator)
    x[1::2] = torch.lerp(painted, soft, 0.6 * share[0]) + 0.04 * share[1] * noise
    return looks, x, whole


def boxed(picture: np.ndarray, side: int) -> np.ndarray:
    """A picture [h, w, 3] in [0, 1] -> in a black square, uint8 [side, side, 3]."""
    image = world.to_image(picture)
    scale = side / max(image.size)
    width, height = (max(1, round(length * scale)) for length in image.size)
    square = Image.new("RGB", (side, side))
    square.paste(
        image.resize((width, height), Image.Resampling.BICUBIC),
        ((side - width) // 2, (side - height) // 2),
    )
    return np.asarray(square)


def _random_look(rng: np.random.Generator) -> tuple[Look, bool]:
    """A look, and whether it stands on light paper."""
    style = world.random_style(rng, "train")
    look, kind = Look.of(style), rng.random()
    if kind < 0.25:
        look = look.towards(Look.of(_style_on(rng, style.on_light)), rng.random())
    elif kind < 0.35:
        look = look.but(ink=tuple(rng.random(3)))
    if rng.random() < 0.3:
        look = look.but(weight=float(rng.uniform(-1, 1)))
    return look, style.on_light


def _style_on(rng: np.random.Generator, light: bool) -> world.Style:
    style = world.random_style(rng, "train")
    while style.on_light != light:
        style = world.random_style(rng, "train")
    return style


def _view(rng: np.random.Generator, look: Look | None, light: bool, loose: bool) -> np.ndarray:
    """A word in this look on some paper, moved a little or not, whole or cropped to its mask, in
    which it stands at the left or, where `loose`, anywhere."""
    word = world.random_word(rng, "train") if look is not None else ""
    picture = world.paper(_style_on(rng, light))
    down, right = 0, 0
    if look is not None:
        if rng.random() < 0.5:
            room = world.WIDTH - world.LEFT - world.CELL * len(word)
            down, right = int(rng.integers(-3, 4)), int(rng.integers(-2, 1 + min(room, 20)))
        picture = draw(picture, word, look, (down, right))
    if rng.random() < 0.6:
        top, left = world.TOP + down, world.LEFT + right
        letters = max(len(word), int(rng.integers(3, world.MAX_LETTERS + 1)))
        if loose:
            slack = (letters - len(word)) * world.CELL
            top = max(0, top + int(rng.integers(-3, 4)))
            left = max(0, left - int(rng.integers(-2, slack + 1)))
        height = world.BOTTOM - world.TOP
        picture = picture[top : top + height, left : left + letters * world.CELL]
    return picture
