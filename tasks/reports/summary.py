"""What a run shows people: pictures of each round, `summary.json`, and the closing lines."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from calligrapher.data.images import load_rgb
from calligrapher.durable import atomic_write
from calligrapher.rl.train_state import EMA, TRAINED
from calligrapher.tables.parquet import decode_png, read_shard, read_table
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import evaluation_name, round_number
from tasks.pictures import grids as report
from tasks.stages import evaluate
from tasks.tracking.tracker import METRICS, Tracker, read_pointer

if TYPE_CHECKING:
    from tasks.runs.run import Run

PICTURE = "best_and_worst"
WHOLE_RUN = ("before_after.png", "learning_curve.png")
SHOWN = 4  # best, and as many worst, samples of a round


def show_grid(tracker: Tracker, round: int, evaluation: Artifact) -> None:
    """The same cases after every round; MLflow shows them with a slider."""
    if not tracker.has_image("grid", round):
        path = evaluation.file(evaluate.GRID)
        tracker.log_image("grid", lambda: report.open_picture(path), round)


def show_round(tracker: Tracker, round: int, rollout: Artifact, scores: Artifact) -> None:
    """Histogram of the rewards, and the best and worst images with what was read; drawn once per
    round."""
    if tracker.has_image(PICTURE, round):
        return
    rows: dict[str, list[Any]] = {}
    for name in sorted(scores.files):
        table = read_table(scores.file(name), ["sample_id", "ocr_text", "reward"])
        shard = read_shard(rollout.file(name.replace("scores-", "shard-")), ["text", "image"])
        for key, values in (table | shard).items():
            rows.setdefault(key, []).extend(values)
    ranked = sorted((r, i) for i, r in enumerate(rows["reward"]) if r is not None)
    tracker.log_image(
        "reward_histogram", lambda: report.score_histogram([r for r, _ in ranked]), round
    )
    tracker.log_dataset(f"round-{round:04d}-rollout", rollout.digest, rollout.path, "rollout")
    best, worst = (
        [_sample(rows, i) for _, i in part] for part in (ranked[: -SHOWN - 1 : -1], ranked[:SHOWN])
    )
    tracker.log_image(PICTURE, lambda: report.best_and_worst(best, worst), round)


def summarise(run: "Run", last: Artifact) -> dict[str, Any]:
    """Write `summary.json` and the before-and-after picture; returns the summary."""
    params = run.params
    rounds = round_number(last.path.parent.name) + 1  # max_train_steps may have ended the run early
    first, final = _evaluation(run, 0), _evaluation(run, rounds)
    found = {
        "run": run.folder.path.name,
        "algorithm": params.algorithm,
        "rounds": rounds,
        "images": rounds * params.images_per_round,
        "seconds": round(time.monotonic() - run.started, 1),
        "training_seconds": round(_training_seconds(run), 1),
        "adapter_digest": last.files[EMA if params.ema.use_ema else TRAINED].sha256,
        "checkpoint": str(last.path),
    }
    for name in ("ocr_accuracy", "exact_match"):
        for when, artifact in (("before", first), ("after", final)):
            found[f"{name}_{when}"] = _interval(artifact, name)
    if first and final:
        run.tracker.log_image(
            "before_after", lambda: _before_after(run, first, final), rounds, slider=False
        )
    atomic_write(run.folder.path / "summary.json", (json.dumps(found, indent=1) + "\n").encode())
    return found


def describe(metrics: dict[str, Any]) -> str:
    """The held-out result in one line."""
    if "ocr_accuracy" not in metrics:
        return "held-out OCR accuracy was not measured"
    mean, low, high = (metrics[f"ocr_accuracy{end}"] for end in ("", "_low", "_high"))
    return (
        f"held-out OCR accuracy {mean:.3f} [{low:.3f}, {high:.3f}], exact match"
        f" {metrics['exact_match']:.3f}"
    )


def closing_lines(summary: dict[str, Any], runs_dir: Path) -> list[str]:
    """What a person wants to read at the end, and where to look next."""
    folder = runs_dir / summary["run"]
    lines = [
        f"{summary['run']}: {summary['algorithm']}, {summary['rounds']} rounds, {summary['images']}"
        " images"
    ]
    for when in ("before", "after"):
        if found := summary[f"ocr_accuracy_{when}"]:
            mean, low, high = found["mean"], found["low"], found["high"]
            lines.append(f"  held-out OCR accuracy {when:<6} {mean:.3f}  [{low:.3f}, {high:.3f}]")
    lines += [
        f"  training {summary['training_seconds']:.0f} s; this start {summary['seconds']:.0f} s",
        f"  adapter {summary['adapter_digest'][:16]} in {summary['checkpoint']}",
        *_where_pictures_are(folder / "report"),
        f"Curves:   {_where_curves_are(folder)}",
    ]
    return lines


def _where_pictures_are(report: Path) -> list[str]:
    """Return a line that names the pictures of the whole run; none where there is no picture."""
    if not report.is_dir():
        return []
    names = [name for name in WHOLE_RUN if (report / name).is_file()]
    return [f"Pictures: {report}" + (f" ({', '.join(names)})" if names else "")]


def _where_curves_are(folder: Path) -> str:
    """Return how MLflow shows the curves of a run, or the file of them where it does not."""
    uri = read_pointer(folder).get("uri", "")
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    if uri and "@" not in uri:  # what stands before it may be a password
        return f"mlflow ui --backend-store-uri {uri}"
    return str(folder / METRICS)


def _sample(rows: dict[str, list[Any]], i: int) -> report.CaptionedImage:
    return report.CaptionedImage(
        decode_png(rows["image"][i]), rows["text"][i], rows["ocr_text"][i], rows["reward"][i]
    )


def _evaluation(run: "Run", round: int) -> Artifact | None:
    path = run.folder.stage_path(evaluation_name(round))
    return Artifact.load(path) if path.exists() else None


def _interval(evaluation: Artifact | None, name: str) -> dict[str, float] | None:
    if evaluation is None or name not in evaluation.meta:
        return None
    return {
        "mean": evaluation.meta[name],
        "low": evaluation.meta[f"{name}_low"],
        "high": evaluation.meta[f"{name}_high"],
    }


def _training_seconds(run: "Run") -> float:
    """Seconds of all stages but evaluations, from the manifests: also those of earlier starts."""
    return sum(
        artifact.manifest.seconds
        for artifact in run.folder.artifacts()
        if artifact.stage != "evaluate"
    )


def _before_after(run: "Run", first: Artifact, final: Artifact) -> Any:
    group, count = run.params.evaluate.num_images_per_case, run.params.evaluate.grid_cases
    sides = []
    for found in (first, final):
        rows = read_shard(found.file(evaluate.IMAGES), ["image", "text"])
        rows |= read_table(found.file(evaluate.SCORES), ["ocr_text", "reward"])
        sides.append([_sample(rows, i) for i in range(0, count * group, group)])
    cases = run.resources.cases.evaluation[:count]
    sources, references = (
        [load_rgb(path) for path in paths]
        for paths in zip(*((c.source, c.reference) for c in cases), strict=True)
    )
    return report.before_after(sources, references, *sides)
