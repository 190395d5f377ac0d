"""What every tracker has in common: it shows a run's journals, and `sync` completes it later.

A tracker is a file of `tasks/tracking/backends/` with a class `Backend(Mirror)`; its name is that
of the file.
"""

import importlib.util
import json
import pkgutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from calligrapher.errors import CalligrapherError, ParamsError
from tasks.artifacts.layout import PARAMS
from tasks.params.sections import TrackingParams
from tasks.tracking import backends
from tasks.tracking.journal import METRICS_FILE, Entry, Journal, run_journals

Failed = Callable[[str, Exception], None]


class Mirror:
    """Shows one run folder in a tracker. Its methods raise what the tracker raises.

    A backend takes what it can show and leaves out what the tracker has already: after a kill it is
    made anew, and given the journals from their beginning. The packages it needs are imported when
    it is made, not before.
    """

    title: ClassVar[str]
    package: ClassVar[str]  # that must be installed

    def __init__(self, run_dir: Path, journals: tuple[Journal, Journal], failed: Failed) -> None:
        self._run_dir, self._journals, self._failed = run_dir, journals, failed
        self._metrics_offset = self._events_offset = 0

    @classmethod
    def prepare(cls, run_dir: Path, tracking: TrackingParams, *, again: bool = False) -> str:
        """Note in the run's folder what must not be lost; return where the run will be shown.

        again: where it was shown before, if it was.
        """
        raise NotImplementedError

    def where(self) -> str:
        """Return what a person looks for in the tracker."""
        raise NotImplementedError

    def take_metrics(self, records: list[Entry]) -> None:
        """Show lines of `metrics.jsonl`: `stage`, `step`, `time` and `metrics`, of which a value
        may be None."""
        raise NotImplementedError

    def take_params(self, record: Entry) -> None:
        """Show all params, as texts by dotted key (`params`)."""

    def take_tags(self, record: Entry) -> None:
        """Show `tags`."""

    def take_image(self, record: Entry) -> None:
        """Show a picture: `key`, `step`, `path` in the run's folder; without `slider` the newest
        alone counts."""

    def take_histogram(self, record: Entry) -> None:
        """Show how many values lie where: `key`, `step`, `counts`, and one more of `edges`."""

    def take_dataset(self, record: Entry) -> None:
        """Show which data went in or came out: `name`, `digest`, `path`, `context`."""

    def take_checkpoint(self, record: Entry) -> None:
        """Show a checkpoint: `name`, `digest`, `path`, `step`, `metrics`."""

    def end(self, status: str) -> None:
        """Mark the run as ended: FINISHED, FAILED or KILLED."""

    def catch_up(self) -> None:
        """Show all lines that were written since the last call."""
        metrics, events = self._journals
        end = metrics.end
        self.take_metrics(metrics.read(self._metrics_offset, end))
        self._metrics_offset = end
        end = events.end
        records = events.read(self._events_offset, end)
        # A picture without a slider is drawn over: only the last entry of its path is sent.
        replaced = {r["path"]: i for i, r in enumerate(records) if r["kind"] == "image"}
        for i, record in enumerate(records):
            if record["kind"] == "image" and replaced[record["path"]] != i:
                continue
            try:
                getattr(self, f"take_{record['kind']}")(record)
            except Exception as error:
                self._failed(f"showing a {record['kind']} in {self.title}", error)
        self._events_offset = end


def backend_class(name: str) -> type[Mirror]:
    """Return the tracker `name`. Raises ParamsError where there is none, or its package is not."""
    known = sorted(module.name for module in pkgutil.iter_modules(backends.__path__))
    if name not in known:
        raise ParamsError(f"tracking.backends must be some of {', '.join(known)}. Got {name!r}.")
    found = importlib.import_module(f"{backends.__name__}.{name}").Backend
    if importlib.util.find_spec(found.package) is None:
        raise ParamsError(
            f"tracking.backends names {name}, which needs the package {found.package}. It is not"
            f" installed: `pip install 'calligrapher[{name}]'`."
        )
    return found


def sync(run_dir: str | Path, uri: str | None = None, to: Sequence[str] = ()) -> list[str]:
    """Show a run's files in the trackers `to`; default: those of its params. Adds nothing twice.

    uri: MLflow's store; default: where the run was tracked. Returns where the run is found now, one
    text each. Raises CalligrapherError when there is nothing to show or a tracker does not take it.
    """
    run_dir = Path(run_dir).absolute()
    if not (run_dir / METRICS_FILE).is_file():
        raise CalligrapherError(
            f"{run_dir} must be the folder of a run. It holds no {METRICS_FILE}."
        )
    params = run_dir / PARAMS
    stored = json.loads(params.read_bytes()).get("tracking", {}) if params.is_file() else {}
    tracking = TrackingParams.model_validate(stored | ({"uri": uri} if uri else {}))
    names = list(to or tracking.backends)
    if uri and "mlflow" not in names:
        raise CalligrapherError(
            f"--uri is MLflow's, which must be among the trackers. Got {', '.join(names)}."
        )
    return [_sync(backend_class(name), run_dir, tracking, again=uri is None) for name in names]


def _sync(backend: type[Mirror], run_dir: Path, tracking: TrackingParams, *, again: bool) -> str:
    place = backend.prepare(run_dir, tracking, again=again)
    problems: list[str] = []
    try:
        mirror = backend(
            run_dir, run_journals(run_dir), lambda what, e: problems.append(f"{what}: {e}")
        )
        mirror.catch_up()
        mirror.end("FINISHED")
    except Exception as error:
        raise CalligrapherError(f"{place} must take the run. It did not: {error}") from error
    if problems:
        raise CalligrapherError(f"{place} did not take everything: " + "; ".join(problems))
    return mirror.where()
