"""Paints cases into a folder: PNG files that say how they were made, and contact sheets.

```
OUT/test3-CAMBEL-seed0.png      one file per case and seed, settings in text chunk `calligrapher`
OUT/sheet-1.png                 source with mask, reference and results of the first cases
```
"""

import logging
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from pydantic import Field

from calligrapher.data.case import Case
from calligrapher.data.images import load_mask, load_rgb
from calligrapher.durable import atomic_path
from calligrapher.errors import DataError, ParamsError
from calligrapher.sampling.generate import BATCH_SIZE, FEATHER, GROW
from tasks.artifacts.digests import canonical_json
from tasks.inference.painter import Painter
from tasks.params.sections import Count, Positive, Section
from tasks.pictures.sheets import MUTED, Span, cell, shown, stacked
from tasks.progress import Progress

logger = logging.getLogger(__name__)

CHUNK = "calligrapher"  # keyword of the PNG text chunk
CASES_PER_SHEET = 24
_SIDE, _LEAST = 256, 120  # pixels: a sheet's picture at most, its cell at least
_TINT = (236, 72, 153)


class GenerateParams(Section):
    """How cases are painted."""

    seed: Count = Field(0, description="Seed of a case's first picture; the next ones count up.")
    num_images: Positive = Field(4, description="Pictures per case.")
    scale: float = Field(
        1.0, description="Weight of the style; 0 = FLUX.1-Fill without an adapter."
    )
    crop: bool = Field(
        True, description="Paint the part around the mask; false = stretch the whole picture."
    )
    grow: Annotated[float, Field(ge=1)] = Field(
        GROW, description="Of a mask too large for the canvas: how much larger the crop is."
    )
    feather: Count = Field(
        FEATHER, description="Depth of the seam in pixels, at most; inside the mask."
    )
    batch_size: Positive = Field(BATCH_SIZE, description="Pictures sampled at once.")


def paint_cases(
    painter: Painter, variant: str, cases: Sequence[Case], params: GenerateParams, out: Path
) -> list[Path]:
    """Paint every case with `num_images` seeds; returns the pictures' paths, the sheets' last.

    A whole picture with the same settings that is there already is kept, so that a stopped call
    goes on. Raises, before anything is painted, DataError naming every text that is too long, and
    ParamsError for a variant that there is not.
    """
    painter.weights(variant)
    painter.model.encoders.check_prompts(cases)
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    seeds = range(params.seed, params.seed + params.num_images)
    made = {
        case: {seed: out / f"{case.case_id}-seed{seed}.png" for seed in seeds} for case in cases
    }
    painted = 0
    with Progress("generate", total=len(cases) * len(seeds), unit="img") as bar:
        for case, paths in made.items():
            painted += _paint(painter, variant, case, params, paths)
            bar.advance(len(paths))
    kept = len(cases) * len(seeds) - painted
    logger.info("%d picture(s) were painted, %d were there already", painted, kept)
    return [path for paths in made.values() for path in paths.values()] + _sheets(made, out)


def check_folder(out: Path) -> None:
    """Raise ParamsError unless `out` is a folder that can be written to, or can become one."""
    there = next(path for path in (out, *out.absolute().parents) if path.exists())
    if not there.is_dir():
        raise ParamsError(f"The results need a folder. Got {out}, and {there} is a file.")
    if not os.access(there, os.W_OK):
        raise ParamsError(
            f"The results need a folder to write to. Got {out}: {there} is read-only."
        )


def settings_of(path: Path) -> str | None:
    """Return the settings in a picture's text chunk as JSON; None without a whole picture."""
    if not path.is_file():
        return None
    try:
        load_rgb(path)
    except DataError:
        return None
    with Image.open(path) as image:
        return image.info.get(CHUNK)


def _paint(
    painter: Painter, variant: str, case: Case, params: GenerateParams, paths: dict[int, Path]
) -> int:
    """Paint a case and write the seeds that are not there; returns how many.

    All seeds are sampled if one is missing: the batch that a picture is sampled in decides its last
    bits.
    """
    common = _settings(painter, variant, case, params)
    settings = {seed: canonical_json(common | {"seed": seed}).decode() for seed in paths}
    missing = [seed for seed, path in paths.items() if settings_of(path) != settings[seed]]
    if not missing:
        return 0
    how = params.model_dump(exclude={"seed", "num_images"})
    images = dict(zip(paths, painter.paint(variant, case, seeds=list(paths), **how), strict=True))
    for seed in missing:
        chunk = PngInfo()
        chunk.add_itxt(CHUNK, settings[seed])
        with atomic_path(paths[seed]) as partial:
            images[seed].save(partial, pnginfo=chunk)
    return len(missing)


def _settings(painter: Painter, variant: str, case: Case, params: GenerateParams) -> dict[str, Any]:
    """What a picture depends on; files and weights by their digests."""
    return {
        "text": case.text,
        "case": case.digest,
        "variant": variant,
        "weights": painter.digests[variant],
        "precision": str(painter.model.policy.autocast or "float32"),
        "guidance_scale": painter.model.policy.model.guidance_scale,
        "num_steps": painter.num_steps,
        "canvas": asdict(painter.canvas),
        **params.model_dump(include={"scale", "crop", "grow", "feather"}),
        # Only where there is some: what was painted before there was such an option is found again.
        **({"noise_level": painter.noise_level} if painter.noise_level else {}),
    }


def _sheets(made: dict[Case, dict[int, Path]], out: Path) -> list[Path]:
    cases, sheets = list(made), []
    for number, start in enumerate(range(0, len(cases), CASES_PER_SHEET), start=1):
        rows = [_row(case, made[case]) for case in cases[start : start + CASES_PER_SHEET]]
        sheets.append(out / f"sheet-{number}.png")
        with atomic_path(sheets[-1]) as partial:
            stacked(rows).save(partial)
    return sheets


def _row(case: Case, paths: dict[int, Path]) -> list[Image.Image]:
    """Source with the mask tinted, reference, results."""
    source, mask = load_rgb(case.source), load_mask(case.mask)
    source.paste(_TINT, mask=mask.point(lambda white: white // 2))
    row = [
        (source, Span(case.text, bold=True)),
        (load_rgb(case.reference), Span("reference", MUTED)),
    ]
    row += [(load_rgb(path), Span(f"seed {seed}", MUTED)) for seed, path in paths.items()]
    return [_cell(image, caption) for image, caption in row]


def _cell(image: Image.Image, caption: Span) -> Image.Image:
    picture = shown(image, _SIDE)
    return cell(picture, [([caption], [])], max(picture.width + 2, _LEAST))
