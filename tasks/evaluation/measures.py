"""What an evaluation measures in its pictures beyond the reward: second reading, style, background,
spread; and the means of what further scorers measured.

Everything is measured per image and averaged per case: cases are what intervals and comparisons
resample.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from calligrapher.data.canvas import Canvas, prepare
from calligrapher.data.case import Case
from calligrapher.data.images import load_rgb, to_image
from calligrapher.tables.parquet import decode_png, read_shard, read_table
from reward_server.scorers.style import StyleScorer
from reward_server.style_scale import StyleScale
from reward_server.text import ocr_accuracy
from tasks.evaluation import second_ocr
from tasks.resources.resources import Resources
from tasks.resources.rewards import further_numbers
from tasks.stages.evaluate import IMAGES, SCORES
from tasks.stages.statistics import means_with_intervals
from tasks.weights.checkpoints import siglip_folder

MEASURES, CASES = "measures.parquet", "cases.parquet"
PER_IMAGE = (
    "ocr_accuracy",
    "exact_match",
    "second_ocr_accuracy",
    "style_match",
    "background_error",
    "background_psnr",
    "reward",
)
MEASURED = (*PER_IMAGE, "spread")


def measure(resources: Resources, out: Path, *, second: bool) -> dict[str, Any]:
    """Measure the pictures of `out/images.parquet`, scored in `out/scores.parquet`.

    Files: `measures.parquet` (an image a row), `cases.parquet` (a case a row, means over its
    images). Returns each metric's mean with a bootstrap 95 % interval over cases; what was not
    measured is absent.
    """
    rows = read_shard(out / IMAGES, ["sample_id", "case_id", "text", "mask_box", "image"])
    scores = read_table(out / SCORES)
    further = further_numbers(scores)
    rows |= {name: scores[name] for name in ("ocr_text", "ocr_accuracy", "reward", *further)}
    by_id = {case.case_id: case for case in resources.cases.evaluation}
    cases = [by_id[i] for i in rows["case_id"]]
    pictures = [decode_png(png).convert("RGB") for png in rows["image"]]
    crops = [p.crop(tuple(box)) for p, box in zip(pictures, rows["mask_box"], strict=True)]
    scorer = style_scorer(resources)
    embedded = scorer.embed([np.asarray(crop) for crop in crops])
    found: dict[str, list[Any]] = {
        name: rows[name] for name in ("sample_id", "case_id", "text", "ocr_text")
    }
    found["ocr_accuracy"], found["reward"] = rows["ocr_accuracy"], rows["reward"]
    found |= {name: rows[name] for name in further}
    found["exact_match"] = [None if a is None else float(a == 1) for a in rows["ocr_accuracy"]]
    read = second_ocr.read_lines(crops) if second else [None] * len(crops)
    found["second_ocr_text"] = read
    found["second_ocr_accuracy"] = [
        None if r is None else ocr_accuracy(t, r) for t, r in zip(rows["text"], read, strict=True)
    ]
    found["style_match"] = _style_match(scorer, embedded, cases)
    outside = [background(resources, p, c) for p, c in zip(pictures, cases, strict=True)]
    found["background_error"], found["background_psnr"] = map(list, zip(*outside, strict=True))
    pq.write_table(
        _table(found, ("sample_id", "case_id", "text", "ocr_text", "second_ocr_text")),
        out / MEASURES,
    )
    unit = np.stack([e / np.linalg.norm(e) for e in embedded])
    per_case = _per_case(found, unit, (*PER_IMAGE, *further))
    pq.write_table(_table(per_case, ("case_id",)), out / CASES)
    return means_with_intervals({n: v for n, v in per_case.items() if n != "case_id"})


def differences(this: Path, other: Path) -> dict[str, float]:
    """This minus other, case by case, as in `means_with_intervals`; both are folders with a
    `cases.parquet`."""
    mine, theirs = (pq.read_table(folder / CASES).to_pydict() for folder in (this, other))
    assert mine["case_id"] == theirs["case_id"], "only evaluations of the same cases compare"
    pairs = {
        name: zip(mine[name], theirs[name], strict=True)
        for name in mine
        if name != "case_id" and name in theirs
    }
    return means_with_intervals(
        {
            name: [None if a is None or b is None else a - b for a, b in both]
            for name, both in pairs.items()
        }
    )


def style_scorer(resources: Resources) -> StyleScorer:
    """The reward server's measure of style, of the model's own SigLIP."""
    scale = StyleScale.read(siglip_folder(resources.params.model.siglip))
    return StyleScorer(resources.model.encoders.siglip, scale=scale)


def background(
    resources: Resources, picture: Image.Image, case: Case
) -> tuple[float, float | None]:
    """How far the picture is from the source outside the mask.

    Mean absolute difference in grey levels of 255 (0 = untouched), and PSNR in dB (None =
    untouched).
    """
    canvas = resources.conditioning.canvas
    prepared = prepare(case, Canvas(canvas.width, canvas.height))
    source = np.asarray(to_image(prepared.image), dtype=np.float64)
    outside = prepared.mask[0].numpy() == 0  # [H, W]
    difference = (np.asarray(picture, dtype=np.float64) - source)[outside]
    if not difference.any():
        return 0.0, None
    return float(np.abs(difference).mean()), float(
        10 * np.log10(255**2 / np.square(difference).mean())
    )


def _style_match(
    scorer: StyleScorer, embedded: Sequence[np.ndarray], cases: Sequence[Case]
) -> list[float]:
    """Each crop's style against its reference's, in [0, 1]: the reward server's `style_score`.

    Evaluations of before there was a scale have `style`, the plain cosine; the two do not compare.
    """
    distinct = {case.case_id: case for case in cases}
    references = scorer.embed([np.asarray(load_rgb(c.reference)) for c in distinct.values()])
    by_id = dict(zip(distinct, references, strict=True))
    return [scorer.match(e, by_id[c.case_id]) for e, c in zip(embedded, cases, strict=True)]


def _per_case(
    found: dict[str, list[Any]], unit: np.ndarray, names: Sequence[str]
) -> dict[str, list[Any]]:
    """Means over a case's images; spread = 1 - mean cosine of the pairs of its unit embeddings
    [B, E], None for a single image."""
    ids = list(dict.fromkeys(found["case_id"]))
    columns: dict[str, list[Any]] = {"case_id": ids, **{n: [] for n in (*MEASURED, *names)}}
    for case_id in ids:
        rows = [i for i, other in enumerate(found["case_id"]) if other == case_id]
        for name in names:
            there = [found[name][i] for i in rows if found[name][i] is not None]
            columns[name].append(float(np.mean(there)) if there else None)
        cosines = unit[rows] @ unit[rows].T
        pairs = cosines[np.triu_indices(len(rows), 1)]
        columns["spread"].append(float(1 - pairs.mean()) if len(pairs) else None)
    return columns


def _table(columns: dict[str, list[Any]], text: tuple[str, ...]) -> pa.Table:
    kinds = {name: pa.string() if name in text else pa.float64() for name in columns}
    return pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()})
