"""Scores one picture as a server would, and shows what was read and where.

`calligrapher reward-server try sign.png --text "Grand Hotel" --mask mask.png` prints every
component and draws the lines that were found into `sign-read.png`. Flags are those of a server;
with `--url` a server that runs is asked instead.
"""

import argparse
import asyncio
import io
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, UnidentifiedImageError

from reward_server.client import RewardClient, RewardClientError, RewardItem
from reward_server.components import LETTERS, NAMES
from reward_server.processes.serve import EXIT_SCORERS_FAILED, EXIT_USAGE, add_flags, parse_settings
from reward_server.settings import Settings

_MASK, _LINES = (0, 160, 255), (255, 0, 80)  # RGB of what is drawn


def main(argv: Sequence[str] | None = None) -> int:
    """`calligrapher reward-server try`: 0 when something was measured. Returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="calligrapher reward-server try",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("image", type=Path, help="the painted picture")
    parser.add_argument("--text", required=True, help="what it should show")
    parser.add_argument("--mask", type=Path, help="white where the text was painted")
    parser.add_argument("--reference", type=Path, help="the picture whose style was wanted")
    parser.add_argument("--prompt", default="", help="what the model was told")
    parser.add_argument("--out", type=Path, help="picture to write; default: IMAGE-read.png")
    parser.add_argument("--url", help="ask this server instead of loading scorers here")
    add_flags(parser)
    options = vars(parser.parse_args(argv))
    image, out = options.pop("image"), options.pop("out")
    words = {name: options.pop(name) for name in ("text", "prompt")}
    paths = {"image": image, "mask": options.pop("mask"), "reference": options.pop("reference")}
    url = options.pop("url")
    settings = parse_settings(parser, options)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    try:
        pictures = {name: _file(path) for name, path in paths.items() if path is not None}
        if url is None:
            measured, boxes = _here(settings, words, pictures)
        else:
            measured, boxes = _there(url, words, pictures), []
    except ValueError as error:
        parser.exit(EXIT_USAGE, f"{parser.prog}: error: {error}\n")
    except (RuntimeError, OSError) as error:
        parser.exit(EXIT_SCORERS_FAILED, f"{parser.prog}: error: {error}\n")
    sys.stdout.write(table(measured))
    out = out or image.with_name(f"{image.stem}-read.png")
    drawn(pictures["image"], pictures.get("mask"), boxes).save(out)
    sys.stdout.write(f"\n{len(boxes)} lines of text drawn into {out}\n")
    return 0 if any(measured.get(name) is not None for name in _names(measured)) else 1


def table(measured: Mapping[str, Any]) -> str:
    """A line for each component: its value, or of what kind its error is, and why.

    And one of how likely each letter is, where it is known.
    """
    lines = []
    for name in _names(measured):
        value = measured[name]
        if value is None:
            kind = measured["kinds"].get(name, "error")
            told = f"null   {kind}: {measured['errors'].get(name, 'no reason was given')}"
        else:
            told = repr(value) if isinstance(value, str) else f"{value:.3f}"
        lines.append(f"{name:<16} {told}\n")
    if measured.get(LETTERS):
        told = " ".join(f"{letter['likelihood']:.2f}" for letter in measured[LETTERS])
        lines.append(f"{LETTERS:<16} {told}\n")
    if measured["reward_model_disabled"]:
        lines.append("made-up numbers: the reward model is disabled\n")
    return "".join(lines)


def drawn(image: bytes, mask: bytes | None, boxes: Sequence[np.ndarray]) -> Image.Image:
    """The picture with the mask's edge in blue and the lines' boxes [4 corners, 2 px] in red."""
    shown = Image.open(io.BytesIO(image)).convert("RGB")
    if mask is not None:
        white = np.asarray(Image.open(io.BytesIO(mask)).convert("L")) >= 128
        inner = np.pad(white, 1)
        inner = inner[:-2, 1:-1] & inner[2:, 1:-1] & inner[1:-1, :-2] & inner[1:-1, 2:]
        pixels = np.array(shown)
        pixels[white & ~inner] = _MASK
        shown = Image.fromarray(pixels)
    pen = ImageDraw.Draw(shown)
    for box in boxes:
        corners = [(float(x), float(y)) for x, y in box]
        pen.line([*corners, corners[0]], fill=_LINES, width=max(1, round(max(shown.size) / 400)))
    return shown


def _here(
    settings: Settings, words: Mapping[str, str], pictures: Mapping[str, bytes]
) -> tuple[dict[str, Any], list[np.ndarray]]:
    """Score with scorers loaded in this process. Raises ItemError and what loading raises."""
    from reward_server.scorers.load import load_scorers
    from reward_server.service.intake import (
        ItemError,
        Opened,
        decode,
        open_pictures,
        read_item,
        shared_pictures,
    )
    from reward_server.service.service import RewardService

    # Before the models are loaded: what is wrong with the pictures is told at once.
    asked = {**words, **{name: name for name in pictures}, "letters": True}
    ask = read_item(asked, pictures)
    shared = shared_pictures(0)
    opened = open_pictures(ask, settings.max_pixels, shared, reference=True)
    if not isinstance(opened, Opened):
        raise opened
    item = decode(ask, opened, shared)
    scorers = load_scorers(settings)
    service = RewardService(settings, lambda: scorers)
    try:
        service.start()
        (answer,) = asyncio.run(service.score([ask]))
        if isinstance(answer, ItemError):
            raise answer
        finders = [scorer.boxes for scorer in scorers if hasattr(scorer, "boxes")]
        return answer.model_dump(), [box for boxes in finders for box in boxes(item)]
    finally:
        service.close()


def _there(url: str, words: Mapping[str, str], pictures: Mapping[str, bytes]) -> dict[str, Any]:
    """Ask a server; it does not say where it read. Raises RuntimeError."""
    item = RewardItem(
        pictures["image"],
        words["prompt"],
        pictures.get("mask"),
        words["text"],
        pictures.get("reference"),
        letters=True,
    )
    try:
        with RewardClient([url], deadline_s=120, needed=()) as client:
            (result,) = client.score_batch([item])
    except RewardClientError as error:
        raise RuntimeError(str(error)) from error
    return {
        **result.components(),
        LETTERS: result.ocr_letters and [vars(letter) for letter in result.ocr_letters],
        "errors": result.errors,
        "kinds": result.kinds,
        "reward_model_disabled": result.reward_model_disabled,
    }


def _names(measured: Mapping[str, Any]) -> list[str]:
    rest = {"errors", "kinds", "reward_model_disabled", LETTERS, *NAMES}
    return [name for name in NAMES if name in measured] + [
        name for name in measured if name not in rest
    ]


def _file(path: Path) -> bytes:
    """The picture as a PNG file, whatever it was. Raises ValueError."""
    try:
        with Image.open(path) as image:
            image.load()
            if path.suffix.lower() == ".png":
                return path.read_bytes()
            buffer = io.BytesIO()
            image.convert("RGB").save(buffer, format="PNG")
            return buffer.getvalue()
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path} must be a picture that can be read. Got: {error}.") from None
