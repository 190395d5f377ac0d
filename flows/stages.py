"""The stages as Prefect tasks: visibility and logs are Prefect's, resuming is our artifacts'."""

import logging

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.prefect_ui import PREFECT_UI, PrefectProgress, announce_checkpoint, send_report
from tasks.artifacts.layout import round_name
from tasks.artifacts.run_dir import Artifact
from tasks.runs.run import Run

logger = logging.getLogger(__name__)


@task(cache_policy=NO_CACHE, task_run_name="warm-up")
def warmup(run: Run) -> Artifact:
    return _shown(run).warmup()


@task(cache_policy=NO_CACHE, task_run_name="round {round} rollout")
def rollout(run: Run, round: int, old: Artifact) -> Artifact:
    return _shown(run).rollout(round, old)


@task(cache_policy=NO_CACHE, task_run_name="round {round} score")
def score(run: Run, round: int, images: Artifact) -> Artifact:
    made = _shown(run).score(round, images)
    logger.info("round %d: mean reward %.3f", round, made.meta["reward_mean"])
    return made


@task(cache_policy=NO_CACHE, task_run_name="round {round} advantage")
def advantage(run: Run, round: int, scores: Artifact) -> Artifact:
    return _shown(run).advantage(round, scores)


@task(cache_policy=NO_CACHE, task_run_name="round {round} update")
def update(
    run: Run,
    round: int,
    previous: Artifact,
    start: Artifact,
    old: Artifact,
    images: Artifact,
    advantages: Artifact,
) -> Artifact:
    return _shown(run).update(round, previous, start, old, images, advantages)


@task(cache_policy=NO_CACHE, task_run_name="round {round} refresh")
def refresh(run: Run, round: int, old: Artifact, updated: Artifact) -> Artifact:
    return _shown(run).refresh(round, old, updated)


@task(cache_policy=NO_CACHE, task_run_name="evaluate after {round} rounds")
def evaluate(run: Run, round: int, checkpoint: Artifact) -> Artifact | None:
    made = _shown(run).evaluate(round, checkpoint)
    if f"{round_name(round - 1)}/update" in run.built:
        PREFECT_UI.send(lambda: send_report(run.folder.path, round - 1))
        if (
            made is not None and made.path.name == "evaluate"
        ):  # the rounds that `evaluate.every` names
            PREFECT_UI.send(lambda: announce_checkpoint(run.folder.path, checkpoint))
    return made


def _shown(run: Run) -> Run:
    run.bench.progress = PrefectProgress
    return run
