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


Columns = dict[str, list[Any]]


def measure(resources: Resources, out: Path, *, second: bool) -> dict[str, Any]:
    """Measure the pictures of `out/images.parquet`, scored in `out/scores.parquet`.

    Files: `measures.parquet` (an image a row), `cases.parquet` (a case a row, means over its
    images). Returns each metric's mean with a bootstrap 95 % interval over cases; what was not
    measured is absent.
    """
    m, cases = resources.params.model, resources.cases.evaluation
    found, crops = per_image(out, cases, Canvas(m.width, m.height), second=second)
    by_id = {case.case_id: case for case in cases}
    scorer = style_scorer(resources)
    embedded = scorer.embed([np.asarray(crop) for crop in crops])
    found["style_match"] = _style_match(scorer, embedded, [by_id[i] for i in found["case_id"]])
    pq.write_table(
        _table(found, ("sample_id", "case_id", "text", "ocr_text", "second_ocr_text")),
        out / MEASURES,
    )
    unit = np.stack([e / np.linalg.norm(e) for e in embedded])
    measured = per_case(found, PER_IMAGE)
    measured |= {"spread": _spreads(found["case_id"], unit)}
    measured |= per_case(found, further_numbers(read_table(out / SCORES)))
    pq.write_table(_table(measured, ("case_id",)), out / CASES)
    return means_with_intervals({n: v for n, v in measured.items() if n != "case_id"})


def per_image(
    folder: Path, cases: Sequence[Case], canvas: Canvas, *, second: bool
) -> tuple[Columns, list[Image.Image]]:
    """Return what needs no model of the pictures in `folder`, and their painted crops.

    Columns: sample_id, case_id, text, ocr_text, second_ocr_text, what was scored, and all of
    `PER_IMAGE` but `style_match`.
    """
    rows = read_shard(folder / IMAGES, ["sample_id", "case_id", "text", "mask_box", "image"])
    scores = read_table(folder / SCORES)
    by_id = {case.case_id: case for case in cases}
    pictures = [decode_png(png).convert("RGB") for png in rows["image"]]
    crops = [p.crop(tuple(box)) for p, box in zip(pictures, rows["mask_box"], strict=True)]
    found: Columns = {name: rows[name] for name in ("sample_id", "case_id", "text")}
    scored = ("ocr_text", "ocr_accuracy", "reward", *further_numbers(scores))
    found |= {name: scores[name] for name in scored}
    found["exact_match"] = [None if a is None else float(a == 1) for a in found["ocr_accuracy"]]
    read = second_ocr.read_lines(crops) if second else [None] * len(crops)
    found["second_ocr_text"] = read
    found["second_ocr_accuracy"] = [
        None if r is None else ocr_accuracy(t, r) for t, r in zip(rows["text"], read, strict=True)
    ]
    outside = [
        background(canvas, picture, by_id[case_id])
        for picture, case_id in zip(pictures, rows["case_id"], strict=True)
    ]
    found["background_error"], found["background_psnr"] = map(list, zip(*outside, strict=True))
    return found, crops


def per_case(found: Columns, names: Sequence[str]) -> Columns:
    """Return `case_id` and the columns `names` as means over the images of each case."""
    images = _images_of(found["case_id"])
    columns: Columns = {"case_id": list(images)}
    for name in names:
        there = [
            [found[name][i] for i in at if found[name][i] is not None] for at in images.values()
        ]
        columns[name] = [float(np.mean(values)) if values else None for values in there]
    return columns


def differences(this: Path, other: Path) -> dict[str, float]:
    """This minus other, case by case, as in `means_with_intervals`; both are folders with a
    `cases.parquet`."""
    mine, theirs = (pq.read_table(folder / CASES).to_pydict() for folder in (this, other))
    assert mine["case_id"] == theirs["case_id"], "only evaluations of the same cases compare"
    return minus(mine, theirs)


def minus(mine: Columns, theirs: Columns) -> dict[str, float]:
    """`mine` minus `theirs`, columns of `per_case`, for the cases that both have."""
    at = {case_id: row for row, case_id in enumerate(theirs["case_id"])}
    pairs = [(row, at[case_id]) for row, case_id in enumerate(mine["case_id"]) if case_id in at]

    def difference(a: float | None, b: float | None) -> float | None:
        return None if a is None or b is None else a - b

    return means_with_intervals(
        {
            name: [difference(mine[name][i], theirs[name][j]) for i, j in pairs]
            for name in mine
            if name != "case_id" and name in theirs
        }
    )


def style_scorer(resources: Resources) -> StyleScorer:
    """The reward server's measure of style, of the model's own SigLIP."""
    scale = StyleScale.read(siglip_folder(resources.params.model.siglip))
    return StyleScorer(resources.model.encoders.siglip, scale=scale)


def background(canvas: Canvas, picture: Image.Image, case: Case) -> tuple[float, float | None]:
    """How far the picture is from the source outside the mask.

    Mean absolute difference in grey levels of 255 (0 = untouched), and PSNR in dB (None =
    untouched). canvas: the picture's size; a reference on top of it does not count.
    """
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


def _images_of(case_ids: Sequence[str]) -> dict[str, list[int]]:
    """Return where the images of each case are, cases in order."""
    images: dict[str, list[int]] = {}
    for index, case_id in enumerate(case_ids):
        images.setdefault(case_id, []).append(index)
    return images


def _spreads(case_ids: Sequence[str], unit: np.ndarray) -> list[float | None]:
    """1 - mean cosine of the pairs of each case's unit embeddings [B, E]; None for one image."""
    spreads: list[float | None] = []
    for at in _images_of(case_ids).values():
        cosines = unit[at] @ unit[at].T
        pairs = cosines[np.triu_indices(len(at), 1)]
        spreads.append(float(1 - pairs.mean()) if len(pairs) else None)
    return spreads


def _table(columns: dict[str, list[Any]], text: tuple[str, ...]) -> pa.Table:
    kinds = {name: pa.string() if name in text else pa.float64() for name in columns}
    return pa.table({name: pa.array(values, kinds[name]) for name, values in columns.items()})
