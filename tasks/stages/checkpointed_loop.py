"""What `warmup` and `update` share: a loop that saves itself every few steps and goes on from
there."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np

from calligrapher.durable import fsync_path
from calligrapher.rl.train_loop import BatchSchedule, TrainLoop
from tasks.artifacts.layout import INNER
from tasks.progress import Progress

STEP_METRICS_FILE = "metrics.jsonl"


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

    Goes on from the newest inner checkpoint of an earlier attempt. Returns the means of the
    metrics, the number of steps, and that of the images trained on (each pass counts).
    """
    history: list[dict[str, float]] = []
    inner = out / INNER
    saved = sorted(inner.glob("step-*")) if inner.exists() else []
    if saved:
        loop.state.load(loop.policy, saved[-1])
        history = [
            json.loads(line) for line in (saved[-1] / STEP_METRICS_FILE).read_text().splitlines()
        ]
        bar.advance(len(history))

    def on_step(metrics: dict[str, float]) -> None:
        history.append({"step": loop.state.step, **metrics})
        bar.advance(loss=metrics["loss"])
        if len(history) % every == 0:
            _save(loop, history, inner)

    loop.run(rows, schedule, done=len(history), limit=limit, on_step=on_step)
    loop.state.save(loop.policy, out)
    _write_history(history, out)
    names = sorted({name for row in history for name in row} - {"step"})
    means = {name: float(np.mean([row[name] for row in history if name in row])) for name in names}
    images = sum(len(batch.index) for step in schedule.steps()[: len(history)] for batch in step)
    return {"optimizer_steps": len(history), "images": images, **means}


def _save(loop: TrainLoop, history: list[dict[str, float]], inner: Path) -> None:
    name = f"step-{len(history):08d}"
    partial = inner / f"writing-{name}"
    shutil.rmtree(partial, ignore_errors=True)
    loop.state.save(loop.policy, partial)
    _write_history(history, partial)
    for path in (*partial.iterdir(), partial):
        fsync_path(path)
    os.replace(partial, inner / name)
    fsync_path(inner)
    for older in inner.glob("step-*"):
        if older.name != name:
            shutil.rmtree(older)


def _write_history(history: list[dict[str, float]], folder: Path) -> None:
    (folder / STEP_METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in history))
