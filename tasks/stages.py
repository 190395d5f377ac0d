"""The stages as Prefect tasks: visibility and logs are Prefect's, resuming is our artifacts'."""

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.artifacts import Artifact
from tasks.run import Run


@task(cache_policy=NO_CACHE, task_run_name="warm-up")
def warmup(run: Run) -> Artifact:
    return run.warmup()


@task(cache_policy=NO_CACHE, task_run_name="round {round} rollout")
def rollout(run: Run, round: int, old: Artifact) -> Artifact:
    return run.rollout(round, old)


@task(cache_policy=NO_CACHE, task_run_name="round {round} score")
def score(run: Run, round: int, images: Artifact) -> Artifact:
    return run.score(round, images)


@task(cache_policy=NO_CACHE, task_run_name="round {round} advantage")
def advantage(run: Run, round: int, scores: Artifact) -> Artifact:
    return run.advantage(round, scores)


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
    return run.update(round, previous, start, old, images, advantages)


@task(cache_policy=NO_CACHE, task_run_name="round {round} refresh")
def refresh(run: Run, round: int, old: Artifact, updated: Artifact) -> Artifact:
    return run.refresh(round, old, updated)


@task(cache_policy=NO_CACHE, task_run_name="evaluate after {round} rounds")
def evaluate(run: Run, round: int, checkpoint: Artifact) -> Artifact | None:
    return run.evaluate(round, checkpoint)
