"""What the benchmarks score, random words drawn on pictures of one line; and whom they ask."""

import io
import random

import numpy as np
import requests
from PIL import Image, ImageDraw, ImageFont

from reward_server.client import RewardItem

LETTERS = "abcdefghknoprstuwxyz"
SIZE = (96, 32)  # px, width and height


def picture(text: str, size: tuple[int, int] = SIZE) -> Image.Image:
    """One line of text in the middle of a picture of `size` (width, height)."""
    image = Image.new("RGB", size, (240, 236, 225))
    font = ImageFont.load_default(size=round(size[1] * 0.62))
    ImageDraw.Draw(image).text(
        (size[0] / 2, size[1] / 2), text, font=font, fill=(25, 30, 70), anchor="mm"
    )
    return image


def words(count: int, seed: int = 0) -> list[str]:
    """Random words of five letters."""
    rng = random.Random(seed)
    return ["".join(rng.choices(LETTERS, k=5)) for _ in range(count)]


def scene(text: str, size: tuple[int, int], seed: int = 0) -> tuple[Image.Image, Image.Image]:
    """A picture of `size` with the word's strip of 96 x 32 px in its middle, and the strip's mask.

    The rest is soft colours with grain: as hard for PNG as what a model paints.
    """
    width, height = size
    rng = np.random.default_rng(seed)
    soft = Image.fromarray(rng.integers(0, 255, (8, 8, 3), dtype=np.uint8))
    pixels = np.asarray(soft.resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.integers(-6, 7, (height, width, 3), dtype=np.int16)
    image = Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8))
    left, top = (width - SIZE[0]) // 2, (height - SIZE[1]) // 2
    image.paste(picture(text), (left, top))
    mask = Image.new("L", size)
    mask.paste(255, (left, top, left + SIZE[0], top + SIZE[1]))
    return image, mask


def scenes(count: int, size: tuple[int, int]) -> list[RewardItem]:
    """Scenes with random words, not encoded yet; all share one mask and one reference."""
    _, mask = scene("", size)
    reference, _ = scene("style", size, seed=1)
    return [
        RewardItem(
            scene(word, size, seed)[0], f"The text is '{word}'.", mask, word, reference=reference
        )
        for seed, word in enumerate(words(count))
    ]


def items(count: int) -> list[RewardItem]:
    """Pictures of random words with a mask over all of each, encoded."""
    mask = png(Image.new("L", SIZE, 255))
    return [
        RewardItem(png(picture(word)), f"The text is '{word}'.", mask=mask, text=word)
        for word in words(count)
    ]


def png(image: Image.Image) -> bytes:
    """The picture as a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def pid_of(url: str) -> int:
    """Process id of the server there."""
    return requests.get(url + "/health", timeout=10).json()["pid"]
