"""The results as HTML: a column per variant, a row per seed, each picture over its reading."""

import base64
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image

from calligrapher.data.images import png_bytes
from flows.demo.sketch import EDITOR_SIDE
from reward_server.client import RewardResult
from tasks.inference.painter import BASE, TRAINED
from tasks.pipeline import WARMUP

TITLES = {BASE: "Base", WARMUP: "After the warm-up", TRAINED: "Trained"}


@dataclass
class Column:
    """What one variant has painted so far, and its scores: as many as seeds, or none yet."""

    pictures: Sequence[Image.Image] = ()
    readings: Sequence[RewardResult] = field(default_factory=tuple)


def results_html(columns: Mapping[str, Column], seeds: Sequence[int]) -> str:
    """A grid: the names of the variants, and below them a row of pictures for each seed."""
    heads = [_head(variant, column) for variant, column in columns.items()]
    cells = [
        _cell(variant, column, row, seed)
        for row, seed in enumerate(seeds)
        for variant, column in columns.items()
    ]
    return f'<div class="results" style="--columns: {len(columns)}">{"".join(heads + cells)}</div>'


def problem_html(error: Exception, folder: Path) -> str:
    """What must hold, for a person on the page, to whom our temporary `folder` means nothing."""
    message = re.sub(rf"{re.escape(str(folder))}/(?:\S*/)?", "", str(error))
    return f'<div class="problem" role="alert">{escape(message)}</div>'


def _head(variant: str, column: Column) -> str:
    scored = [r.ocr_accuracy for r in column.readings if r.ocr_accuracy is not None]
    mean = f"<span>mean accuracy {sum(scored) / len(scored):.2f}</span>" if len(scored) > 1 else ""
    return f"<h3>{TITLES[variant]}{mean}</h3>"


def _cell(variant: str, column: Column, row: int, seed: int) -> str:
    if not column.pictures:
        return f'<figure class="waiting" data-variant="{variant}">painting …</figure>'
    picture = column.pictures[row]
    caption = _caption(column.readings[row]) if column.readings else "reading …"
    crisp = ' class="crisp"' if max(picture.size) < EDITOR_SIDE // 2 else ""
    data = base64.b64encode(png_bytes(picture)).decode("ascii")
    return (
        f'<figure data-variant="{variant}" data-seed="{seed}">'
        f'<img{crisp} alt="{variant}, seed {seed}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _caption(reading: RewardResult) -> str:
    """The text read and its numbers; `not scored` and why where there is none."""
    if reading.ocr_accuracy is None:
        return (
            "<em>not scored:"
            f" {escape(reading.errors.get('ocr_accuracy', 'the server gave none'))}</em>"
        )
    right = "right" if reading.ocr_accuracy == 1 else "wrong"
    numbers = {
        "accuracy": reading.ocr_accuracy,
        "confidence": reading.ocr_confidence,
        "style": reading.style_score,
    }
    told = " · ".join(f"{name} {value:.2f}" for name, value in numbers.items() if value is not None)
    return f'<b class="{right}">{escape(reading.ocr_text or "—")}</b> <span>{told}</span>'
