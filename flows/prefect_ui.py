"""What Prefect's UI shows of a run: progress, round reports, checkpoints.

Nothing here can stop a run: what Prefect does not take within `_TIMEOUT_S` is dropped, and Prefect
is then left alone for `_PAUSE_S`.
"""

import functools
import logging
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.context import TaskRunContext
from prefect.events import emit_event
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_CLIENT_MAX_RETRIES,
    PREFECT_LOGGING_TO_API_ENABLED,
    temporary_settings,
)

from tasks.artifacts.artifact import Artifact
from tasks.progress import Progress
from tasks.reports.round_report import round_report

logger = logging.getLogger(__name__)

ALARM_EVENT = "calligrapher.reward-hacking"
CHECKPOINT_EVENT = "calligrapher.checkpoint"
_TIMEOUT_S, _PAUSE_S = 3.0, 300.0
_EVERY_S = 5.0  # between two updates of a progress bar


class PrefectProgress(Progress):
    """The terminal's progress line, and the same as a progress artifact of the task run."""

    def __init__(self, label: str, total: int, unit: str, *, done: int = 0):
        super().__init__(label, total, unit, done=done)
        self.label, self.total, self.done = label, total, done
        self._artifact: UUID | None = None
        self._sent = time.monotonic()

    def __enter__(self) -> Self:
        self._artifact = PREFECT_UI.send(
            lambda: create_artifact("progress", self.label, self.label, self._percent)
        )
        return self

    def advance(self, count: int = 1, **values: float) -> None:
        super().advance(count, **values)
        self.done += count
        if time.monotonic() - self._sent > _EVERY_S or self.done >= self.total:
            self._sent = time.monotonic()
            PREFECT_UI.send(self._update)

    @property
    def _percent(self) -> float:
        return min(100.0, round(100 * self.done / self.total, 1)) if self.total else 100.0

    def _update(self) -> None:
        if self._artifact is not None:
            changed = ArtifactUpdate(data=self._percent)  # type: ignore[call-arg]
            _client(PREFECT_API_URL.value()).update_artifact(self._artifact, changed)


class PrefectUI:
    """Prefect's API behind a short time-out. Sending never raises."""

    def __init__(self) -> None:
        self._paused_until = 0.0

    def send(self, call: Callable[[], Any]) -> Any:
        """What `call` returns; None when Prefect did not answer, or did not a moment ago.

        An API that ends with the run (flows/services/prefect_api.py) keeps no logs and is sent
        nothing.
        """
        if time.monotonic() < self._paused_until or not PREFECT_LOGGING_TO_API_ENABLED.value():
            return None
        try:
            with temporary_settings({PREFECT_CLIENT_MAX_RETRIES: 0}):
                return call()
        except Exception as error:
            self._paused_until = time.monotonic() + _PAUSE_S
            logger.warning(
                "Prefect's UI lags behind, training goes on: %s: %s", type(error).__name__, error
            )
            return None


PREFECT_UI = PrefectUI()


@functools.cache
def _client(url: str) -> Any:
    """A client of the API at `url`; connections are kept."""
    return get_client(sync_client=True, httpx_settings={"timeout": _TIMEOUT_S})


def create_artifact(kind: str, key: str, description: str, data: Any) -> UUID:
    """Create an artifact of the task run at hand; its key may hold small letters, digits and
    dashes."""
    context = TaskRunContext.get()
    here = context.task_run if context else None
    request = ArtifactCreate(
        key=re.sub(r"[^a-z0-9]+", "-", key.lower()).strip("-"),
        type=kind,
        description=description,
        data=data,
        task_run_id=here and here.id,
        flow_run_id=here and here.flow_run_id,
    )
    return _client(PREFECT_API_URL.value()).create_artifact(request).id


def send_report(run_folder: Path, round_index: int) -> None:
    """Show the report of a finished round."""
    create_artifact(
        "markdown",
        f"{run_folder.name}-report",
        f"Round {round_index} of {run_folder.name}",
        round_report(run_folder, round_index),
    )


def announce_checkpoint(run_folder: Path, checkpoint: Artifact) -> None:
    """Send the event that the deployment `evaluate/on-checkpoint` waits for."""
    payload = {
        "run": run_folder.name,
        "runs_dir": str(run_folder.parent.absolute()),
        "checkpoint": checkpoint.path.relative_to(run_folder).as_posix(),
        "digest": checkpoint.digest,
    }
    emit_event(
        CHECKPOINT_EVENT,
        {"prefect.resource.id": f"calligrapher.run.{run_folder.name}"},
        payload=payload,
    )


def announce_alarm(run: str, checkpoint: str, reward_hacking: list[str]) -> None:
    """Log that a run's reward may be gamed, and send the event that says so."""
    logger.warning("the reward of %s may be gamed: %s", run, ", ".join(reward_hacking))
    payload = {"run": run, "checkpoint": checkpoint, "reward_hacking": reward_hacking}
    emit_event(
        ALARM_EVENT,
        {"prefect.resource.id": f"calligrapher.run.{run}"},
        payload=payload,
    )
