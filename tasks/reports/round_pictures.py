"""What a run shows of each round: the fixed cases, the histogram, the best and worst samples."""

from collections.abc import Sequence
from typing import Any

from PIL import Image

from calligrapher.data.case import Case
from calligrapher.data.images import load_rgb
from calligrapher.tables.parquet import decode_png, read_shard, read_table
from tasks.artifacts.artifact import Artifact
from tasks.pictures import grids
from tasks.stages import evaluate
from tasks.tracking.tracker import Tracker

BEST_AND_WORST = "best_and_worst"
SHOWN = 4  # best, and as many worst, samples of a round
SCORED = ["ocr_text", "reward", "ocr_accuracy", "style_score"]  # what captions say of an image


def show_grid(tracker: Tracker, round_index: int, evaluation: Artifact) -> None:
    """Show the same cases after every round; MLflow has a slider for them."""
    if not tracker.has_image("grid", round_index):
        path = evaluation.file(evaluate.GRID)
        tracker.log_image("grid", lambda: grids.open_picture(path), round_index)


def show_round(tracker: Tracker, round_index: int, *, rollout: Artifact, scores: Artifact) -> None:
    """Show the rewards' histogram and the best and worst images, once per round."""
    if tracker.has_image(BEST_AND_WORST, round_index):
        return
    rows: dict[str, list[Any]] = {}
    for name in sorted(scores.files):
        table = read_table(scores.file(name), ["sample_id", *SCORED])
        shard = read_shard(rollout.file(name.replace("scores-", "shard-")), ["text", "image"])
        for key, values in (table | shard).items():
            rows.setdefault(key, []).extend(values)
    ranked = sorted((r, i) for i, r in enumerate(rows["reward"]) if r is not None)
    rewards = [reward for reward, _ in ranked]
    tracker.log_image("reward_histogram", lambda: grids.score_histogram(rewards), round_index)
    tracker.log_histogram("score/reward", rewards, round_index)
    tracker.log_dataset(f"round-{round_index:04d}-rollout", rollout.digest, rollout.path, "rollout")
    best, worst = (
        [_sample(rows, i) for _, i in part] for part in (ranked[: -SHOWN - 1 : -1], ranked[:SHOWN])
    )
    tracker.log_image(BEST_AND_WORST, lambda: grids.best_and_worst(best, worst), round_index)


def before_and_after(
    cases: Sequence[Case], before: Artifact, after: Artifact, *, images_per_case: int
) -> Image.Image:
    """Return the picture of the first image of each case in two evaluations, side by side."""
    references = [load_rgb(case.reference) for case in cases]
    sources = [load_rgb(case.source) for case in cases]
    targets = [load_rgb(case.target) if case.target else None for case in cases]
    firsts = range(0, len(cases) * images_per_case, images_per_case)
    sides = []
    for evaluation in (before, after):
        rows = read_shard(evaluation.file(evaluate.IMAGES), ["image", "text"])
        rows |= read_table(evaluation.file(evaluate.SCORES), SCORED)
        sides.append([_sample(rows, i) for i in firsts])
    return grids.before_after(references, sources, targets, *sides)


def describe(metrics: dict[str, Any]) -> str:
    """Return the held-out result in one line."""
    if "ocr_accuracy" not in metrics:
        return "held-out OCR accuracy was not measured"
    mean, low, high = (metrics[f"ocr_accuracy{end}"] for end in ("", "_low", "_high"))
    style = f", style {metrics['style_score']:.3f}" if "style_score" in metrics else ""
    return (
        f"held-out OCR accuracy {mean:.3f} [{low:.3f}, {high:.3f}], exact match"
        f" {metrics['exact_match']:.3f}{style}"
    )


def _sample(rows: dict[str, list[Any]], i: int) -> grids.CaptionedImage:
    return grids.CaptionedImage(
        decode_png(rows["image"][i]), rows["text"][i], *(rows[name][i] for name in SCORED)
    )
