"""What `warmup` and `update` share: a loop that saves itself every few steps and goes on from
there."""

import json
import math
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from calligrapher.durable import fsync_path
from calligrapher.rl.train_loop import BatchSchedule, TrainLoop, is_maximum
from tasks.artifacts.layout import INNER
from tasks.progress import Progress

STEP_METRICS_FILE = "metrics.jsonl"
SKIPPED, NOT_FINITE = "skipped_steps", "not_finite"  # counts; the other metrics are measurements


def run_with_checkpoints(
    loop: TrainLoop,
    rows: Any,
    schedule: BatchSchedule,
    out: Path,
    *,
    every: int,
    bar: Progress,
    limit: int | None = None,
) -> dict[str, Any]:
    """Run `loop` with a checkpoint in `out/inner` every `every` steps; write state and metrics to
    `out`.

    Goes on from the newest inner checkpoint of an earlier attempt. The first rank writes; the files
    do not depend on how many there are. Returns the metrics of the whole
    stage, the number of steps taken, and that of the images they and the skipped steps went
    through (each pass counts).
    """
    history: list[dict[str, float]] = []
    inner = out / INNER
    saved = sorted(inner.glob("step-*")) if inner.exists() else []
    if saved:
        loop.state.load(loop.policy, saved[-1])
        lines = (saved[-1] / STEP_METRICS_FILE).read_text().splitlines()
        history = [_finite(json.loads(line)) for line in lines]
        bar.advance(len(history))

    def on_step(metrics: dict[str, float]) -> None:
        history.append({"step": loop.state.step, **_finite(metrics)})
        bar.advance(**{name: metrics[name] for name in ("loss",) if name in metrics})
        if len(history) % every == 0:
            _checkpoint(loop, history, inner)

    loop.run(rows, schedule, done=len(history), limit=limit, on_step=on_step)
    _save(loop, history, out)
    images = sum(len(batch.index) for step in schedule.steps()[: len(history)] for batch in step)
    metrics = _of_stage(history)
    taken = len(history) - metrics.get(SKIPPED, 0)
    return {"optimizer_steps": taken, "images": images, **metrics}


def by_step(rows: Iterable[dict[str, float]]) -> dict[int, dict[str, float]]:
    """Return what was measured at each step of the optimizer, by its number.

    Steps skipped before the next one was taken have the number of the last one that was: they are
    added up there.
    """
    steps: dict[int, dict[str, float]] = {}
    for row in rows:
        measured = steps.setdefault(int(row["step"]), {})
        skipped = measured.get(SKIPPED, 0) + row.get(SKIPPED, 0)
        measured |= {name: value for name, value in row.items() if name != "step"}
        if SKIPPED in measured:
            measured[SKIPPED] = skipped
    return steps


def _finite(row: dict[str, float]) -> dict[str, float]:
    """Return `row` without its NaN and infinite values; `not_finite` counts them where there are
    any."""
    finite = {name: value for name, value in row.items() if math.isfinite(value)}
    missing = len(row) - len(finite)
    return finite | {NOT_FINITE: missing} if missing else row


def _of_stage(history: list[dict[str, float]]) -> dict[str, float]:
    """Return each metric over all steps that have it: their sum, maximum or mean, by its name."""
    names = sorted({name for row in history for name in row} - {"step"})
    values = {name: [row[name] for row in history if name in row] for name in names}
    return {name: _combined(name, values[name]) for name in names}


def _combined(name: str, values: list[float]) -> float:
    if name in (SKIPPED, NOT_FINITE):
        return sum(values)
    return max(values) if is_maximum(name) else float(np.mean(values))


def _save(loop: TrainLoop, history: list[dict[str, float]], folder: Path) -> None:
    if loop.ranks.is_first or loop.policy.sharded:  # all ranks hand in their shards
        loop.state.save(loop.policy, folder)
    if loop.ranks.is_first:
        _write_history(history, folder)


def _checkpoint(loop: TrainLoop, history: list[dict[str, float]], inner: Path) -> None:
    name = f"step-{len(history):08d}"
    partial = inner / f"writing-{name}"
    if loop.ranks.is_first:
        shutil.rmtree(partial, ignore_errors=True)
    _save(loop, history, partial)
    if not loop.ranks.is_first:
        return
    for path in (*partial.iterdir(), partial):
        fsync_path(path)
    os.replace(partial, inner / name)
    fsync_path(inner)
    for older in inner.glob("step-*"):
        if older.name != name:
            shutil.rmtree(older)


def _write_history(history: list[dict[str, float]], folder: Path) -> None:
    lines = [json.dumps(row, allow_nan=False) + "\n" for row in history]
    (folder / STEP_METRICS_FILE).write_text("".join(lines))
