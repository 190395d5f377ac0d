"""What a run has done, is doing and has still to do: from its folder alone, while it runs or
afterwards."""

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict

from calligrapher.errors import ArtifactError
from calligrapher.rl.train_state import STATE
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import PARAMS, PARTIAL_SUFFIX, SUMMARY
from tasks.artifacts.lock import lock_holder
from tasks.artifacts.run_dir import RunDir
from tasks.params.run_params import RunParams, load_params
from tasks.pipeline import planned, round_of, stage_of
from tasks.reports.words import size

State = Literal["done", "running", "unfinished", "missing", "damaged"]


class StageStatus(BaseModel):
    """One artifact. `bytes`: on disk now. `reward`: the mean; `ocr_accuracy`: held-out."""

    model_config = ConfigDict(frozen=True)
    name: str
    state: State
    bytes: int = 0
    seconds: float | None = None
    reward: float | None = None
    ocr_accuracy: float | None = None
    digest: str | None = None
    created: str | None = None
    shared: bool = False
    pruned: bool = False
    problem: str | None = None


class RunStatus(BaseModel):
    """A run and its artifacts, in the order in which they are made.

    state: what becomes of it now. ended_by: what `evaluate.stop_on_alarm` ended it for.
    """

    model_config = ConfigDict(frozen=True)
    run: str
    path: str
    state: Literal["running", "finished", "stopped"]
    holder: str | None
    algorithm: str
    rounds: int
    rounds_done: int
    bytes: int
    fork: str | None
    ended_by: str | None = None
    stages: list[StageStatus]

    def text(self) -> str:
        """The tree for a terminal."""
        who = self.holder or "nobody works on it"
        done = f"{self.rounds_done} of {self.rounds} rounds"
        lines = [f"{self.path}: {self.algorithm}, {done}, {self.state} ({who}), {size(self.bytes)}"]
        lines += [self.fork] if self.fork else []
        if self.ended_by:
            lines.append(
                f"ended by evaluate.stop_on_alarm: the reward may be gamed ({self.ended_by})"
            )
        folder = None
        for stage in self.stages:
            round, _, last = stage.name.rpartition("/")
            if round and round != folder:
                lines.append(round)
            folder = round
            lines.append(("  " if round else "") + _line(stage, last, 18 if round else 20))
        return "\n".join(lines)


def run_params(run_folder: Path) -> RunParams:
    """The params that the run in `run_folder` is made with. Raises ArtifactError when it is no
    run."""
    if not (run_folder / PARAMS).is_file():
        raise ArtifactError(f"{run_folder} must be the folder of a run. It holds no {PARAMS}.")
    return load_params(run_folder / PARAMS)


def status(run_folder: Path) -> RunStatus:
    """The state of each artifact of a run; no bytes are read but manifests. Raises
    ArtifactError."""
    params, run_dir = run_params(run_folder), RunDir(run_folder)
    holder = lock_holder(run_folder)
    names = planned(params, _rounds(run_folder, params))
    stages = [_stage(run_dir, name, running=holder is not None) for name in names]
    done = {s.name for s in stages if s.state == "done"}
    finished = len(done) == len(stages)
    fork = run_dir.fork
    rounds_done = sum(stage_of(name) == "refresh" for name in done)
    return RunStatus(
        run=run_folder.resolve().name,
        path=str(run_folder),
        state="finished" if finished else "running" if holder else "stopped",
        holder=holder,
        algorithm=params.algorithm,
        rounds=params.rounds,
        rounds_done=rounds_done,
        bytes=sum(s.bytes for s in stages),
        fork=fork and fork.described(),
        ended_by=ended_by(run_folder, params, rounds_done) if holder is None else None,
        stages=stages,
    )


def _rounds(run_folder: Path, params: RunParams) -> int:
    """How many rounds the run has when it is finished: `update.max_train_steps` may end it
    early."""
    limit = params.update.max_train_steps
    for name in planned(params) if limit is not None else ():
        state = run_folder / name / STATE
        if (
            stage_of(name) == "update"
            and state.is_file()
            and json.loads(state.read_text())["step"] >= limit
        ):
            return (round_of(name) or 0) + 1
    return params.rounds


def ended_by(run_folder: Path, params: RunParams, rounds_done: int) -> str | None:
    """Return what the alarm ended the run for; None where it did not, or the run has gone on."""
    path = run_folder / SUMMARY
    if not params.evaluate.stop_on_alarm or not path.is_file():
        return None
    summary = json.loads(path.read_bytes())
    if summary["rounds"] != rounds_done:
        return None
    return ", ".join(summary.get("reward_hacking", [])) or None


def _stage(run_dir: RunDir, name: str, *, running: bool) -> StageStatus:
    path = run_dir.stage_path(name)
    if not path.exists():
        partial = path.with_name(path.name + PARTIAL_SUFFIX)
        if not partial.exists():
            return StageStatus(name=name, state="missing")
        return StageStatus(
            name=name, state="running" if running else "unfinished", bytes=_bytes(partial)
        )
    found: dict[str, Any] = {"name": name, "bytes": _bytes(path), "shared": name in run_dir.shared}
    try:
        artifact = Artifact.load(path)
    except ArtifactError as error:
        return StageStatus(state="damaged", problem=str(error), **found)
    meta, damage = artifact.meta, artifact.damage(read_bytes=False)
    return StageStatus(
        state="damaged" if damage else "done",
        problem="; ".join(damage) or None,
        seconds=artifact.manifest.seconds,
        reward=meta.get("reward_mean") if artifact.stage == "score" else None,
        ocr_accuracy=meta.get("ocr_accuracy") if artifact.stage == "evaluate" else None,
        digest=artifact.digest,
        created=artifact.manifest.created,
        pruned=bool(artifact.pruned()),
        **found,
    )


def _bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _line(stage: StageStatus, last: str, width: int) -> str:
    parts = [f"{last:<{width}}", f"{stage.state:<10}"]
    if stage.state != "missing":
        parts.append(f"{size(stage.bytes):>9}")
    if stage.seconds is not None:
        parts.append(f"{stage.seconds:>9.1f} s")
    if stage.reward is not None:
        parts.append(f"  reward {stage.reward:.3f}")
    if stage.ocr_accuracy is not None:
        parts.append(f"  accuracy {stage.ocr_accuracy:.3f}")
    notes = [
        word
        for word, holds in (("shared", stage.shared), ("weights deleted", stage.pruned))
        if holds
    ]
    return " ".join([*parts, *(f" {note}" for note in notes), stage.problem or ""]).rstrip()
