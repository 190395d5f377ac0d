"""The stages as Prefect tasks: visibility and logs are Prefect's, resuming is our artifacts'."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows.prefect_ui import PREFECT_UI, announce_checkpoint, send_report
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import PREVIEW
from tasks.pipeline import name_of
from tasks.runs.run import Run


@task(cache_policy=NO_CACHE, task_run_name="warm-up")
def warmup(run: Run) -> Artifact:
    return run.make("warmup")


@task(cache_policy=NO_CACHE, task_run_name="round {round_index} rollout")
def rollout(run: Run, round_index: int, *, old: Artifact) -> Artifact:
    return run.make(name_of("rollout", round_index), old=old)


@task(cache_policy=NO_CACHE, task_run_name="round {round_index} score")
def score(run: Run, round_index: int, *, rollout: Artifact) -> Artifact:
    return run.make(name_of("score", round_index), rollout=rollout)


@task(cache_policy=NO_CACHE, task_run_name="round {round_index} advantage")
def advantage(run: Run, round_index: int, *, scores: Artifact) -> Artifact:
    return run.make(name_of("advantage", round_index), scores=scores)


@task(cache_policy=NO_CACHE, task_run_name="round {round_index} update")
def update(
    run: Run,
    round_index: int,
    *,
    previous: Artifact,
    start: Artifact,
    old: Artifact,
    rollout: Artifact,
    advantages: Artifact,
) -> Artifact:
    return run.make(
        name_of("update", round_index),
        previous=previous,
        start=start,
        old=old,
        rollout=rollout,
        advantages=advantages,
    )


@task(cache_policy=NO_CACHE, task_run_name="round {round_index} refresh")
def refresh(run: Run, round_index: int, *, old: Artifact, updated: Artifact) -> Artifact:
    return run.make(name_of("refresh", round_index), old=old, updated=updated)


@task(cache_policy=NO_CACHE, task_run_name="evaluate after {rounds_done} rounds")
def evaluate(run: Run, rounds_done: int, *, checkpoint: Artifact) -> Artifact | None:
    name = run.due_evaluation(rounds_done, checkpoint)
    evaluation = None if name is None else run.make(name, checkpoint=checkpoint)
    if name_of("update", rounds_done - 1) in run.built and rounds_done:
        PREFECT_UI.send(lambda: send_report(run.folder.path, rounds_done - 1))
        if name is not None and not name.endswith(PREVIEW):
            PREFECT_UI.send(lambda: announce_checkpoint(run.folder.path, checkpoint))
    return evaluation
