"""What each measure says of pictures whose worth is known: is it a measure at all?

The pictures: what is right (the cases' targets), another case's target in the mask, the source as
it is, noise in the mask, the reference copied there, and what the model paints before any training.
Where the OCR tells how a text looks, right pictures that are spoiled in just that stand beside.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from calligrapher.data.canvas import Canvas, prepare
from calligrapher.data.case import Case
from calligrapher.data.images import load_rgb, to_image
from calligrapher.errors import DataError
from calligrapher.tables.parquet import decode_png, encode_png, read_shard, read_table
from reward_server.scorers.style import cosine
from reward_server.style_scale import StyleScale
from tasks.evaluation import second_ocr
from tasks.evaluation.measures import measure, style_scorer
from tasks.evaluation.spoiled import SPOILED
from tasks.resources.resources import Resources
from tasks.resources.rewards import measured_numbers
from tasks.stages.evaluate import IMAGES, SCORES, evaluate_weights, write_pictures
from tasks.stages.sampling import rows_of, table_columns
from tasks.stages.statistics import means_with_intervals

STYLE = "style_score"  # an evaluation has it as style_match
UNTOUCHED = ("background_error", "background_psnr")  # a perfect picture has none
CLEAR = 0.1  # by which a measure must tell the perfect picture from the untouched source
KINDS = {
    "perfect": "the case's target",
    "other": "another case's target in the mask",
    "source": "the source as it is",
    "noise": "noise in the mask",
    "copied": "the reference itself in the mask's box",
    "base": "what the model paints before training",
}


@dataclass(frozen=True)
class Spoilt:
    """An aspect of the text: means over the cases whose right picture could be spoiled in it."""

    perfect: float
    spoiled: float
    cases: int


@dataclass(frozen=True)
class Calibration:
    """values: kind of picture -> measure -> mean over cases; unclear: measures that do not tell the
    perfect picture from the untouched one, and aspects of the OCR that do not tell it from one that
    is spoiled in them; style_other, style_same: mean cosines of the perfect pictures with the next
    case's reference and with their own; spoiled: by aspect."""

    cases: int
    values: dict[str, dict[str, float]]
    unclear: list[str]
    style_other: float
    style_same: float
    spoiled: dict[str, Spoilt] = field(default_factory=dict)

    @property
    def scale(self) -> StyleScale:
        """What `style_scale.json` should hold. Raises DataError where the cosines lie too close."""
        try:
            return StyleScale(self.style_other, self.style_same)
        except ValueError as error:
            raise DataError(str(error)) from None

    def text(self) -> str:
        """Return a table, a measure a line."""
        names = dict.fromkeys(name for found in self.values.values() for name in found)
        lines = [" ".join([f"{'measure':22}", *(f"{kind:>8}" for kind in self.values)])]
        for name in (name for name in names if name not in self.spoiled):
            shown = (
                f"{found[name]:8.3f}" if name in found else f"{'-':>8}"
                for found in self.values.values()
            )
            lines.append(" ".join([f"{name:22}", *shown]) + self._note(name))
        if self.spoiled:
            lines.append(f"{'aspect of the text':22} {'perfect':>8} {'spoiled':>8} {'cases':>6}")
        for name, one in self.spoiled.items():
            told = f"{name:22} {one.perfect:8.3f} {one.spoiled:8.3f} {one.cases:6}"
            lines.append(f"{told}  the target {SPOILED[name].told}{self._note(name)}")
        kinds = "; ".join(f"{kind}: {KINDS[kind]}" for kind in self.values)
        return "\n".join(
            [
                *lines,
                f"Means over {self.cases} cases. {kinds}.",
                f"Cosines of style: other {self.style_other:.3f}, same {self.style_same:.3f}.",
            ]
        )

    def _note(self, name: str) -> str:
        return "  no measure here" if name in self.unclear else ""

    def to_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON."""
        return asdict(self)


def calibrate(
    resources: Resources, work: Path, *, num_cases: int, paint: bool = True
) -> Calibration:
    """Measure each kind of picture of the first held-out cases; `work` is left with its tables.

    paint: the model's own pictures as well. Raises DataError where a case has no target.
    """
    cases = list(islice(resources.cases.evaluation, num_cases))
    without = [case.case_id for case in cases if case.target is None]
    if without or len(cases) < 2:
        raise DataError(
            "Measures are calibrated on two held-out cases or more, each with its right picture"
            f" (`testN_target.png`, a column `target`). Got {len(cases)} cases, without a target:"
            f" {', '.join(without[:5]) or 'none'}. `calligrapher tiny cases` draws such cases."
        )
    drawn = _Drawn.of(resources, cases)
    values: dict[str, dict[str, float]] = {}
    for kind, pictures in drawn.kinds(cases):
        values[kind] = _measured(resources, work / kind, cases, pictures)
    if paint:
        out = work / "base"
        out.mkdir(parents=True, exist_ok=True)
        weights = resources.model.policy.snapshot()
        evaluate_weights(
            resources,
            weights,
            out,
            policy_digest="base",
            round_index=0,
            num_cases=len(cases),
            images_per_case=resources.params.evaluate.num_images_per_case,
        )
        values["base"] = _means(resources, out)
    perfect, source = values["perfect"], values["source"]
    rows = read_table(work / "perfect" / SCORES)
    found = {name: _spoilt(resources, cases, drawn, name, rows) for name in SPOILED if name in rows}
    spoiled = {name: one for name, one in found.items() if one is not None}
    unclear = [
        name
        for name, best in perfect.items()
        if name not in (*UNTOUCHED, *SPOILED) and best - source.get(name, best) < CLEAR
    ]
    unclear += [name for name, one in spoiled.items() if one.perfect - one.spoiled < CLEAR]
    cosines = _cosines(resources, work / "perfect", cases)
    return Calibration(len(cases), values, unclear, *cosines, spoiled)


@dataclass(frozen=True)
class _Drawn:
    """Of each case: the right picture and the source, uint8 [H, W, 3], and the mask, [H, W, 1]."""

    targets: list[np.ndarray]
    sources: list[np.ndarray]
    masks: list[np.ndarray]

    @classmethod
    def of(cls, resources: Resources, cases: list[Case]) -> "_Drawn":
        canvas = resources.conditioning.canvas
        prepared = [prepare(case, Canvas(canvas.width, canvas.height)) for case in cases]

        def picture(tensor: torch.Tensor | None) -> np.ndarray:
            assert tensor is not None
            return np.asarray(to_image(tensor))

        return cls(
            [picture(p.target) for p in prepared],
            [picture(p.image) for p in prepared],
            [p.mask[0].numpy()[..., None] > 0 for p in prepared],
        )

    def kinds(self, cases: list[Case]) -> Iterator[tuple[str, list[np.ndarray]]]:
        """Yield kinds of pictures, one of each case."""
        rng = np.random.default_rng(0)
        noise = [rng.integers(0, 256, source.shape, np.uint8) for source in self.sources]

        def inside(contents: list[np.ndarray]) -> list[np.ndarray]:
            parts = zip(self.masks, contents, self.sources, strict=True)
            return [np.where(mask, content, source) for mask, content, source in parts]

        yield "perfect", self.targets
        yield "other", inside([*self.targets[1:], self.targets[0]])
        yield "source", self.sources
        yield "noise", inside(noise)
        yield "copied", inside([_copied(c, m) for c, m in zip(cases, self.masks, strict=True)])


def _spoilt(
    resources: Resources,
    cases: list[Case],
    drawn: _Drawn,
    aspect: str,
    perfect: Mapping[str, list[Any]],
) -> Spoilt | None:
    """Score the right pictures spoiled in an aspect; None where none can be, or has a number.

    perfect: the score table of the right pictures, a case a row.
    """
    made = list(map(SPOILED[aspect].make, drawn.targets, drawn.sources, drawn.masks))
    at = [i for i, picture in enumerate(made) if picture is not None]
    if not at:
        return None
    pngs = [encode_png(Image.fromarray(made[i])) for i in at]
    rows = resources.scorer.score(pngs, [cases[i] for i in at])
    pairs = [(perfect[aspect][i], row.get(aspect)) for i, row in zip(at, rows, strict=True)]
    pairs = [pair for pair in pairs if None not in pair]
    if not pairs:
        return None
    best, worst = np.mean(pairs, axis=0).tolist()
    return Spoilt(best, worst, len(pairs))


def _copied(case: Case, mask: np.ndarray) -> np.ndarray:
    """The case's reference in the box of `mask` [H, W, 1], on black: uint8 [H, W, 3]."""
    (top, bottom), (left, right) = ((at.min(), at.max() + 1) for at in np.nonzero(mask)[:2])
    picture = np.zeros((*mask.shape[:2], 3), np.uint8)
    reference = load_rgb(case.reference).resize((right - left, bottom - top))
    picture[top:bottom, left:right] = np.asarray(reference)
    return picture


def _measured(
    resources: Resources, out: Path, cases: list[Case], pictures: list[np.ndarray]
) -> dict[str, float]:
    out.mkdir(parents=True, exist_ok=True)
    rows = rows_of(cases, 1)
    columns = table_columns(
        resources,
        rows,
        round_index=0,
        seeds=[0] * len(rows),
        policy_digest=out.name,
        num_steps=0,
    )
    pngs = [encode_png(Image.fromarray(p)) for p in pictures]
    scored = resources.scorer.score(pngs, [row.case for row in rows])
    write_pictures(out, columns, pngs, scored)
    return _means(resources, out)


def _means(resources: Resources, out: Path) -> dict[str, float]:
    """What an evaluation says of the pictures in `out`, and the reward's other components."""
    found = measure(resources, out, second=second_ocr.version() is not None)
    scores = read_table(out / SCORES)
    further = {
        name: scores[name] for name in measured_numbers(scores) if name not in (*found, STYLE)
    }
    found |= means_with_intervals(further)
    return {n: v for n, v in found.items() if not n.endswith(("_low", "_high"))}


def _cosines(resources: Resources, folder: Path, cases: list[Case]) -> tuple[float, float]:
    """Mean cosine of the perfect crops with the next case's references, and with their own."""
    scorer = style_scorer(resources)
    rows = read_shard(folder / IMAGES, ["mask_box", "image"])
    crops = [
        np.asarray(decode_png(png).convert("RGB").crop(tuple(box)))
        for png, box in zip(rows["image"], rows["mask_box"], strict=True)
    ]
    painted = scorer.embed(crops)
    references = scorer.embed([np.asarray(load_rgb(case.reference)) for case in cases])
    same = np.mean([cosine(p, r) for p, r in zip(painted, references, strict=True)])
    pairs = zip(painted, [*references[1:], references[0]], strict=True)
    other = np.mean([cosine(p, r) for p, r in pairs])
    return round(float(other), 4), round(float(same), 4)
