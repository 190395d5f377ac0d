"""The tracker: what a run logs goes to `metrics.jsonl`, the truth; threads show it in trackers.

```
with Tracker(run_dir, params) as tracker:
    tracker.log("round-0003/score", 3, {"score/reward_mean": 0.71})
    tracker.log_image("grid", lambda: picture, 3)
```

Every call writes a line to `metrics.jsonl` or `events.jsonl` and returns in a few milliseconds.
What a thread has not shown when the process ends, for whatever reason, the next start or
`mirror.sync` shows: both read the files from the beginning and leave out what the tracker has.
"""

import functools
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, Self

import numpy as np
from PIL import Image

from calligrapher.durable import atomic_path
from tasks.params.run_params import RunParams
from tasks.tracking.feed import Feed
from tasks.tracking.journal import METRICS_FILE, REPORT, Entry, Journal, run_journals
from tasks.tracking.mirror import backend_class

_BINS = 30  # of a histogram
_log = logging.getLogger(__name__)
P = ParamSpec("P")


def _never_raises(method: Callable[P, None]) -> Callable[P, None]:
    """A lost metric is a pity, a lost run a disaster: whatever goes wrong is counted and logged
    once."""

    @functools.wraps(method)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(*args, **kwargs)
        except Exception as error:
            args[0]._failed(method.__name__, error)  # type: ignore[attr-defined]

    return wrapper


class Tracker:
    """Tracks one training run; as a context manager it closes itself, marked failed after an
    exception.

    No method raises. `failures` counts what went wrong; the first failure is logged as a warning.
    """

    def __init__(
        self, run_dir: Path, params: RunParams, *, tags: Mapping[str, str] | None = None
    ) -> None:
        self.run_dir = Path(run_dir).absolute()
        self.failures = 0
        self._feeds: list[Feed] = []
        self._journals: tuple[Journal, Journal] | None = None
        self._open(params, tags or {})

    @_never_raises
    def _open(self, params: RunParams, tags: Mapping[str, str]) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._journals = run_journals(self.run_dir)
        self._event({"kind": "params", "params": dict(_flat(params.resolved()))})
        self._event({"kind": "tags", "tags": {"algorithm": params.algorithm, **tags}})
        for name in params.tracking.used:
            backend = backend_class(name)
            backend.prepare(self.run_dir, params.tracking)
            self._feeds.append(Feed(backend, self.run_dir, self._journals, self._failed))

    def log(self, stage_key: str, step: int, metrics: Mapping[str, float | None]) -> None:
        """Log one row. `stage_key` (`round-0003/score`) and `step` name it: a row logged before is
        left out.

        step: the round for `rollout/ score/ advantage/ evaluate/ refresh/`, the run's optimizer
        step for `update/` and `warmup/`. Keys begin with the stage. None and numbers that are not
        finite become null.
        """
        self.log_rows(stage_key, [(step, metrics)])

    @_never_raises
    def log_rows(
        self, stage_key: str, rows: Iterable[tuple[int, Mapping[str, float | None]]]
    ) -> None:
        """Log many rows of one stage at once, as `log` does."""
        now = round(time.time(), 3)
        records = [
            {
                "stage": stage_key,
                "step": int(step),
                "time": now,
                "metrics": {k: _finite(v) for k, v in metrics.items()},
            }
            for step, metrics in rows
        ]
        assert self._journals is not None
        if self._journals[0].append(records):
            self._wake()

    @_never_raises
    def log_image(
        self, key: str, draw: Callable[[], Image.Image | Any], step: int, *, slider: bool = True
    ) -> None:
        """Store the picture that `draw()` gives (PIL image or matplotlib figure) and show it in
        MLflow.

        slider: one picture per step (`report/KEY/000STEP.png`), with MLflow's slider over the
        steps; without, one picture that each step replaces (`report/KEY.png`).
        """
        name = f"{REPORT}/{key}/{step:06d}.png" if slider else f"{REPORT}/{key}.png"
        path = self.run_dir / name
        image = draw()
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            if hasattr(image, "savefig"):
                image.savefig(temporary, format="png", dpi=120)
            else:
                image.save(temporary, "PNG", compress_level=1)
        self._event(
            {"kind": "image", "key": key, "step": int(step), "path": name, "slider": slider}
        )

    @_never_raises
    def log_histogram(self, key: str, values: Sequence[float], step: int) -> None:
        """Say how many of `values` lie where, in equal bins from the least to the largest."""
        counts, edges = np.histogram(np.asarray(values, dtype=np.float64), _BINS)
        what = {"counts": counts.tolist(), "edges": edges.tolist()}
        self._event({"kind": "histogram", "key": key, "step": int(step), **what})

    def has_image(self, key: str, step: int) -> bool:
        """Whether the picture of this step is there already: a resumed run need not draw it
        again."""
        return (self.run_dir / REPORT / key / f"{step:06d}.png").is_file()

    @_never_raises
    def log_dataset(self, name: str, digest: str, path: Path, context: str) -> None:
        """Say which data went in or came out, as a dataset of the MLflow run."""
        place = os.path.relpath(path, self.run_dir)
        self._event(
            {"kind": "dataset", "name": name, "digest": digest, "path": place, "context": context}
        )

    @_never_raises
    def log_checkpoint(
        self, name: str, digest: str, path: Path, step: int, metrics: Mapping[str, float | None]
    ) -> None:
        """Make a checkpoint findable by its scores (`search_logged_models`); its files stay in
        place."""
        found = {key: value for key, value in metrics.items() if _finite(value) is not None}
        place = os.path.relpath(path, self.run_dir)
        what = {"name": name, "digest": digest, "path": place, "step": int(step), "metrics": found}
        self._event({"kind": "checkpoint", **what})

    def history(self, key: str) -> list[tuple[int, float]]:
        """All (step, value) of one metric so far, by step: from `metrics.jsonl`, not from
        MLflow."""
        try:
            records = self._journals[0].read() if self._journals else []
        except (OSError, ValueError) as error:
            self._failed("history", error)
            return []
        points = {
            r["step"]: r["metrics"][key] for r in records if r["metrics"].get(key) is not None
        }
        return sorted(points.items())

    def close(self, status: str = "FINISHED", timeout_s: float = 60.0) -> None:
        """Show what is left, for at most `timeout_s`, and end the run: FINISHED, FAILED or
        KILLED."""
        feeds, self._feeds = self._feeds, []
        if not feeds:
            return
        deadline = time.monotonic() + timeout_s
        for feed in feeds:
            feed.finish(status)
        late = [feed.title for feed in feeds if not feed.ended_by(deadline)]
        if late or self.failures:
            _log.warning(
                "tracking: %s is complete, %s may not be (%d failures). "
                "`calligrapher sync %s` sends the rest.",
                self.run_dir / METRICS_FILE, " and ".join(late or [feed.title for feed in feeds]),
                self.failures, self.run_dir,
            )  # fmt: skip

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        failed = "FAILED" if kind is not None and issubclass(kind, Exception) else "KILLED"
        # Who cancels a run waits for its end: what MLflow then lacks, the next start sends.
        self.close("FINISHED" if kind is None else failed, timeout_s=60.0 if kind is None else 3.0)

    def _event(self, record: Entry) -> None:
        assert self._journals is not None
        if self._journals[1].append([{**record, "time": round(time.time(), 3)}]):
            self._wake()

    def _wake(self) -> None:
        for feed in self._feeds:
            feed.wake()

    def _failed(self, what: str, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            _log.warning(
                "tracking: %s failed, training goes on: %s: %s", what, type(error).__name__, error
            )


def _finite(value: Any) -> float | None:
    number = None if value is None else float(value)
    return number if number is not None and math.isfinite(number) else None


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value if isinstance(value, str) else json.dumps(value)
