"""Runs a stage of a finished run again, in a fork; and trains from the rollouts of another run."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calligrapher.errors import ArtifactError, ParamsError
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import PARAMS
from tasks.artifacts.provenance import differences
from tasks.artifacts.run_dir import RunDir
from tasks.params.run_params import RunParams, load_params
from tasks.pipeline import STAGES, artifact_name, descendants, parents, planned, reads, stage_of
from tasks.runs.fork import fork
from tasks.runs.overrides import refuse_idle
from tasks.runs.run import Run
from tasks.stages.reweigh import RecordedScorer, can_reweigh

# What a replayed rollout must share with the run that trains on it; noise and batching may differ.
_FREE_IN_REPLAY = ("seed", "rollout.batch_size", "rollout.shard_size", "refill_by")


@dataclass(frozen=True)
class Rerun:
    """A fork, and which of its artifacts are to be made, in order.

    `to_the_end`: it is then a whole run.
    """

    folder: RunDir
    params: RunParams
    names: list[str]
    to_the_end: bool

    @property
    def missing(self) -> list[str]:
        return [name for name in self.names if not self.folder.stage_path(name).exists()]

    def recorded_scorer(self) -> RecordedScorer | None:
        """Return a scorer that asks nobody, if all rewards follow from the parent's scores.

        None: servers must run. Servers that the overrides name are always asked who they are.
        """
        assert self.folder.fork is not None
        told = any(
            o.startswith(("reward.server_urls", "reward.vlm=", "reward.scorers"))
            for o in self.folder.fork.overrides
        )
        names = [n for n in self.missing if stage_of(n) in ("rollout", "score", "evaluate")]
        paths = [self.folder.path / self.folder.fork.parent / n for n in names]
        if told or any(stage_of(n) != "score" for n in names) or not all(p.is_dir() for p in paths):
            return None
        earlier = [Artifact.load(path) for path in paths]
        scored_by = [scores.manifest.extra["scored_by"] for scores in earlier]
        if any(s != scored_by[0] for s in scored_by):
            return None
        suffices = all(can_reweigh(scores, self.params) for scores in earlier)
        return RecordedScorer(scored_by[0] if scored_by else {}) if suffices else None


def prepare_rerun(
    parent: Path, stage: str, overrides: list[str], name: str, *, downstream: bool = False
) -> Rerun:
    """Fork `parent` so that `stage` is made anew with `overrides`.

    With `downstream`, all made from it is made anew too. All that is not made from `stage` is
    shared. Raises ParamsError for an unknown stage or overrides that nothing of what is made reads,
    ArtifactError when what `stage` is made from is not there.
    """
    then, params = _params(parent, []), _params(parent, overrides)
    stage = artifact_name(stage, planned(params))
    below = _below(stage, then, params)
    names = [n for n in planned(params) if n in below] if downstream else [stage]
    _must_matter(then, params, names)
    if not downstream and reads(then, stage_of(stage)) == reads(params, stage_of(stage)):
        refuse_idle(overrides, stage)
    for needed in parents(stage, params.rollout.staleness).values():
        artifact = RunDir(parent).load(needed)
        for gone in artifact.pruned():
            artifact.file(gone)
    shared = [n for n in planned(then) if n not in below and (parent / n).is_dir()]
    folder = fork(parent, name, params, overrides, shared, kind="rerun", stage=stage)
    params = _params(folder.path, [])  # of a fork that was there already: as it was made
    names = [n for n in planned(params) if n in below] if downstream else [stage]
    return Rerun(folder, params, names, downstream and stage_of(stage) != "evaluate")


def prepare_replay(parent: Path, overrides: list[str], name: str) -> Rerun:
    """Fork `parent` to train a policy anew, with `overrides`, on the images that it sampled.

    Rollouts are shared, and the warm-up and scores where the overrides leave them as they are. As
    many rounds as there are rollouts, unless `rounds` is overridden: those beyond sample their own.
    Raises ParamsError when the images do not fit the params.
    """
    then, params = _params(parent, []), _params(parent, overrides)
    there = [n for n in planned(then) if stage_of(n) == "rollout" and (parent / n).is_dir()]
    if not there:
        raise ArtifactError(f"{parent} must have rollouts to train from. It has none.")
    _must_fit(then, params)
    if not any(override.partition("=")[0].strip() == "rounds" for override in overrides):
        params = _params(parent, [*overrides, f"rounds={len(there)}"])
    shared = {"rollout"} | {s for s in ("warmup", "score") if reads(params, s) == reads(then, s)}
    names = [n for n in planned(then) if stage_of(n) in shared and (parent / n).is_dir()]
    folder = fork(parent, name, params, overrides, names, kind="replay")
    params = _params(folder.path, [])
    return Rerun(folder, params, [n for n in planned(params) if n not in folder.shared], True)


def carry_out(
    run: Run, rerun: Rerun, make: Callable[[Run, str], Artifact] | None = None
) -> dict[str, Any]:
    """Make what `rerun` names, each by `make`; return the run's summary, or the one artifact."""
    artifact = run.make_planned(rerun.names, make)
    if rerun.to_the_end:
        return asdict(run.summarise(run.newest_update()))
    return {"artifact": str(artifact.path), "digest": artifact.digest, "meta": artifact.meta}


def _below(stage: str, then: RunParams, now: RunParams) -> set[str]:
    """Return all that is made from `stage` in either run: they may differ in staleness."""
    names = dict.fromkeys([*planned(now), *planned(then)])
    ages = {params.rollout.staleness for params in (then, now)}
    return {name for staleness in ages for name in descendants(stage, names, staleness)}


def _params(run_folder: Path, overrides: list[str]) -> RunParams:
    return load_params(run_folder / PARAMS, overrides)


def _must_matter(then: RunParams, now: RunParams, names: list[str]) -> None:
    changed = {stage for stage in STAGES if reads(then, stage) != reads(now, stage)}
    made = {stage_of(name) for name in names}
    if changed and not changed & made:
        raise ParamsError(
            f"the overrides must change something that {', '.join(sorted(made))} reads. They change"
            f" only what {', '.join(sorted(changed))} reads. Rerun one of those stages, or add"
            " --downstream."
        )


def _must_fit(then: RunParams, now: RunParams) -> None:
    """Raise a ParamsError unless the images that `then` sampled can train a run with `now`."""
    free = _FREE_IN_REPLAY + (() if now.rl.exploration else ("algorithm", "grpo"))
    lines = [
        line
        for line in differences(reads(then, "rollout"), reads(now, "rollout"))
        if not line.startswith(free)
    ]
    if lines:
        listing = "".join(f"\n  {line}" for line in lines)
        raise ParamsError(
            f"a replay must train on images as the params would sample them. They differ:{listing}"
        )
