"""The end of a run, in numbers and lines: `summary.json`, before and after, the closing lines."""

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from calligrapher.data.case import Case
from calligrapher.durable import atomic_write
from calligrapher.rl.train_state import EMA, TRAINED
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import SUMMARY, evaluation_name, round_name, round_number
from tasks.artifacts.run_dir import RunDir
from tasks.params.run_params import RunParams
from tasks.reports.round_pictures import before_and_after
from tasks.tracking.backends import tensorboard
from tasks.tracking.journal import METRICS_FILE, REPORT
from tasks.tracking.pointer import read_pointer
from tasks.tracking.tracker import Tracker

WHOLE_RUN = ("before_after.png", "learning_curve.png")
Interval = dict[str, float]  # mean, low, high: bootstrap 95 %


@dataclass(frozen=True)
class Summary:
    """The contents of `summary.json`. What was not measured is None.

    Example: `Summary(run="first", algorithm="nft", rounds=50, images=4800, seconds=401.2,
    training_seconds=315.0, adapter_digest="5f0c...", checkpoint="runs/first/round-0049/update",
    ocr_accuracy_before={"mean": 0.44, "low": 0.40, "high": 0.49}, ocr_accuracy_after={...},
    exact_match_before={...}, exact_match_after={...}, style_before={...}, style_after={...})`
    """

    run: str
    algorithm: str
    rounds: int
    images: int
    seconds: float  # of this start
    training_seconds: float  # of all stages but evaluations, also those of earlier starts
    adapter_digest: str
    checkpoint: str
    ocr_accuracy_before: Interval | None
    ocr_accuracy_after: Interval | None
    exact_match_before: Interval | None
    exact_match_after: Interval | None
    style_before: Interval | None  # of `style_score`
    style_after: Interval | None
    reward_hacking: list[str] = field(default_factory=list)  # what the alarm ended the run for


def summarise(
    folder: RunDir,
    params: RunParams,
    tracker: Tracker,
    *,
    last: Artifact,
    evaluation_cases: Callable[[], Sequence[Case]],
    seconds: float,
    reward_hacking: Sequence[str] = (),
) -> Summary:
    """Write `summary.json` and the picture before and after; return the summary.

    last: the update that the run ends with. reward_hacking: what the alarm ended it for.
    evaluation_cases: asked for only where there is something to draw them with.
    """
    rounds = round_number(last.path.parent.name) + 1  # the run may have ended early
    first, final = _evaluation(folder, 0), _evaluation(folder, rounds)
    summary = Summary(
        run=folder.path.name,
        algorithm=params.algorithm,
        rounds=rounds,
        images=_images(folder, rounds),
        seconds=round(seconds, 1),
        training_seconds=round(_training_seconds(folder), 1),
        adapter_digest=last.files[EMA if params.ema.use_ema else TRAINED].sha256,
        checkpoint=str(last.path),
        ocr_accuracy_before=_interval(first, "ocr_accuracy"),
        ocr_accuracy_after=_interval(final, "ocr_accuracy"),
        exact_match_before=_interval(first, "exact_match"),
        exact_match_after=_interval(final, "exact_match"),
        style_before=_interval(first, "style_score"),
        style_after=_interval(final, "style_score"),
        reward_hacking=list(reward_hacking),
    )
    if first and final:
        settings = params.evaluate
        tracker.log_image(
            "before_after",
            lambda: before_and_after(
                evaluation_cases()[: settings.grid_cases],
                first,
                final,
                images_per_case=settings.num_images_per_case,
            ),
            rounds,
            slider=False,
        )
    text = json.dumps(asdict(summary), indent=1) + "\n"
    atomic_write(folder.path / SUMMARY, text.encode())
    return summary


def closing_lines(summary: Summary, runs_dir: Path) -> list[str]:
    """Return what a person wants to read at the end, and where to look next."""
    folder = runs_dir / summary.run
    lines = [
        f"{summary.run}: {summary.algorithm}, {summary.rounds} rounds, {summary.images} images"
    ]
    measured = {
        "OCR accuracy before": summary.ocr_accuracy_before,
        "OCR accuracy after": summary.ocr_accuracy_after,
        "style before": summary.style_before,
        "style after": summary.style_after,
    }
    for name, found in measured.items():
        if found:
            mean, low, high = found["mean"], found["low"], found["high"]
            lines.append(f"  held-out {name:<19} {mean:.3f}  [{low:.3f}, {high:.3f}]")
    if summary.reward_hacking:
        lines += [
            f"  ended by evaluate.stop_on_alarm: the reward may be gamed"
            f" ({', '.join(summary.reward_hacking)})",
            "  look at the pictures; the same command with evaluate.stop_on_alarm=false goes on",
        ]
    lines += [
        f"  training {summary.training_seconds:.0f} s; this start {summary.seconds:.0f} s",
        f"  adapter {summary.adapter_digest[:16]} in {summary.checkpoint}",
        *_where_pictures_are(folder / REPORT),
        f"Curves:   {_where_curves_are(folder)}",
        f"Report:   calligrapher report {folder}",
    ]
    return lines


def _where_pictures_are(report: Path) -> list[str]:
    """Return a line that names the pictures of the whole run; none where there is no picture."""
    if not report.is_dir():
        return []
    names = [name for name in WHOLE_RUN if (report / name).is_file()]
    return [f"Pictures: {report}" + (f" ({', '.join(names)})" if names else "")]


def _where_curves_are(folder: Path) -> str:
    """Return how a tracker of this machine shows the curves of a run, else the file of them."""
    uri = read_pointer(folder).get("uri", "")
    parts = urlsplit(uri)
    if parts.scheme in ("http", "https"):
        return parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
    if uri and "@" not in uri:  # what stands before it may be a password
        return f"mlflow ui --backend-store-uri {uri}"
    if (folder / tensorboard.FOLDER).is_dir():
        return f"tensorboard --logdir {folder.parent}"
    return str(folder / METRICS_FILE)


def _evaluation(folder: RunDir, rounds_done: int) -> Artifact | None:
    path = folder.stage_path(evaluation_name(rounds_done))
    return Artifact.load(path) if path.exists() else None


def _interval(evaluation: Artifact | None, name: str) -> Interval | None:
    if evaluation is None or name not in evaluation.meta:
        return None
    return {
        "mean": evaluation.meta[name],
        "low": evaluation.meta[f"{name}_low"],
        "high": evaluation.meta[f"{name}_high"],
    }


def _images(folder: RunDir, rounds: int) -> int:
    """Return how many images the first rounds sampled."""
    names = (f"{round_name(number)}/rollout" for number in range(rounds))
    return sum(folder.load(name).meta["images"] for name in names)


def _training_seconds(folder: RunDir) -> float:
    return sum(
        artifact.manifest.seconds for artifact in folder.artifacts() if artifact.stage != "evaluate"
    )
