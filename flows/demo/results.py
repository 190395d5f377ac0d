"""The results as HTML: a column per variant, a row per seed, each picture over its reading."""

import base64
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path

from PIL import Image

from calligrapher.data.images import png_bytes
from calligrapher.tiny.world import HEIGHT, MAX_LETTERS, MIN_LETTERS, WIDTH
from flows.demo.sketch import EDITOR_SIDE
from reward_server.client import RewardResult
from reward_server.components import FACTORS
from tasks.inference.painter import BASE, TRAINED
from tasks.pipeline import WARMUP

TITLES = {BASE: "Base", WARMUP: "After the warm-up", TRAINED: "Trained"}


@dataclass(frozen=True)
class Heading:
    """What was asked for. `unknown`: characters of the text that T5 does not know; `beyond`: what
    the embedded tiny model has never seen (`calligrapher.tiny.world.beyond`)."""

    text: str
    seeds: Sequence[int]
    num_steps: int
    scale: float
    unknown: Sequence[str] = ()
    beyond: Sequence[str] = ()


@dataclass
class Column:
    """What one variant has painted so far, and its scores: as many as seeds, or none yet."""

    pictures: Sequence[Image.Image] = ()
    readings: Sequence[RewardResult] = field(default_factory=tuple)
    stopped: bool = False


def results_html(heading: Heading, columns: Mapping[str, Column]) -> str:
    """Return the text, and a grid: the names of the variants over a row of pictures per seed."""
    heads = [_head(variant, column) for variant, column in columns.items()]
    cells = [
        _cell(variant, column, row, seed)
        for row, seed in enumerate(heading.seeds)
        for variant, column in columns.items()
    ]
    grid = f'<div class="results" style="--columns: {len(columns)}">{"".join(heads + cells)}</div>'
    return _title(heading) + grid


def problem_html(error: Exception, folder: Path) -> str:
    """What must hold, for a person on the page, to whom our temporary `folder` means nothing."""
    message = re.sub(rf"{re.escape(str(folder))}/(?:\S*/)?", "", str(error))
    return f'<div class="problem" role="alert">{escape(message)}</div>'


def _title(heading: Heading) -> str:
    first, last = heading.seeds[0], heading.seeds[-1]
    settings = [
        f"seed {first}" if first == last else f"seeds {first} to {last}",
        f"{heading.num_steps} steps",
        f"style scale {heading.scale:g}",
    ]
    title = f"<h2>{escape(heading.text)} <small>{' · '.join(settings)}</small></h2>"
    return title + "".join(
        f'<div class="notice" role="status">{escape(notice)}</div>' for notice in _notices(heading)
    )


def _notices(heading: Heading) -> Iterator[str]:
    """Yield why the results cannot be good, whatever was learned."""
    if heading.unknown:
        yield (
            "T5, which reads the text for the model, does not know"
            f" {' '.join(heading.unknown)}: the model sees an unknown character in its place."
        )
    if heading.beyond:
        *others, last = heading.beyond
        asked = f"{', '.join(others)} and {last}" if others else last
        yield (
            f"The embedded tiny model has learned words of {MIN_LETTERS} to {MAX_LETTERS} capital"
            f" letters in drawn pictures of {WIDTH} x {HEIGHT} pixels, and nothing else. Asked for"
            f" {asked}, it paints smears."
        )


def _head(variant: str, column: Column) -> str:
    scored = [r.ocr_accuracy for r in column.readings if r.ocr_accuracy is not None]
    mean = f"<span>mean accuracy {sum(scored) / len(scored):.2f}</span>" if len(scored) > 1 else ""
    return f"<h3>{TITLES[variant]}{mean}</h3>"


def _cell(variant: str, column: Column, row: int, seed: int) -> str:
    name = f'data-variant="{variant}" data-title="{TITLES[variant]}"'
    if not column.pictures:
        state = "stopped" if column.stopped else "painting …"
        return f'<figure class="waiting" {name}>{state}</figure>'
    picture = column.pictures[row]
    if column.readings:
        caption = _caption(column.readings[row])
    else:
        caption = "stopped" if column.stopped else "reading …"
    crisp = ' class="crisp"' if max(picture.size) < EDITOR_SIDE // 2 else ""
    data = base64.b64encode(png_bytes(picture)).decode("ascii")
    return (
        f'<figure {name} data-seed="{seed}">'
        f'<img{crisp} alt="{variant}, seed {seed}" src="data:image/png;base64,{data}">'
        f"<figcaption>{caption}</figcaption></figure>"
    )


def _caption(reading: RewardResult) -> str:
    """The text read and its numbers; `not scored` and why where there is none.

    A factor of 1 takes nothing from the reward, and is left out.
    """
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
        **{
            name.replace("_", " "): value
            for name, value in reading.own.items()
            if not (name in FACTORS and value == 1)
        },
    }
    scores = " · ".join(
        f"{name} {value:.2f}" for name, value in numbers.items() if value is not None
    )
    return f'<b class="{right}">{escape(reading.ocr_text or "—")}</b> <span>{scores}</span>'
