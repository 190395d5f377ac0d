"""The flow `rerun-stage`, and the same without Prefect: stages of a run made anew in a fork."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from pydantic import Field

from calligrapher.errors import ParamsError
from flows.contexts import opened_run, our_logs
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import RunsDir
from tasks.pipeline import STAGES, stage_of
from tasks.runs.preflight import preflight
from tasks.runs.rerun import Rerun, carry_out, prepare_replay, prepare_rerun
from tasks.runs.run import Run
from tasks.tracking.locate import locate


@flow(name="rerun-stage", flow_run_name="{fork}")
def rerun_stage(
    run: Annotated[str, Field(examples=["nft"])],
    fork: Annotated[str, Field(examples=["nft-beta-05"])],
    stage: Annotated[str | None, Field(examples=["round-0003/update"])] = None,
    overrides: Annotated[list[str] | None, Field(examples=[["nft.nft_beta=0.5"]])] = None,
    downstream: bool = False,
    runs_dir: str = "runs",
) -> dict[str, Any]:
    """Make one stage of a run anew, in a fork that shares all that the stage does not change.

    Args:
        run: The run: its name, folder, or the URI of an artifact of it that MLflow shows.
        fork: Name of the new run; the same call again goes on with it.
        stage: As `round-0003/update`. Not needed where `run` names an artifact.
        overrides: Changes to the run's params by dotted key, each as `section.key=value`.
        downstream: Also make anew all that is made from the stage, to the end of the run.
        runs_dir: Folder of all runs.
    """
    return rerun(run, stage, overrides or [], fork, downstream, Path(runs_dir), build=_build)


@task(cache_policy=NO_CACHE, task_run_name="{name}")
def _build(run: Run, name: str) -> Artifact:
    return run.make(name)


def rerun(
    run: str,
    stage: str | None,
    overrides: list[str],
    fork: str,
    downstream: bool = False,
    runs_dir: Path = Path("runs"),
    build: Callable[[Run, str], Artifact] | None = None,
) -> dict[str, Any]:
    """What the flow does, without Prefect. Returns the summary, or the artifact of the one
    stage."""
    parent, named = locate(run, runs_dir)
    stage = stage or named
    if stage is None:
        raise ParamsError(f"a rerun needs a stage, as round-0003/update. Got the run {run} alone.")
    return _carry_out(prepare_rerun(parent, stage, overrides, fork, downstream=downstream), build)


def replay(
    run: str, overrides: list[str], fork: str, runs_dir: Path = Path("runs")
) -> dict[str, Any]:
    """Train a policy anew, in a fork, on the images that `run` sampled. Returns the summary."""
    parent, _ = locate(run, runs_dir)
    return _carry_out(prepare_replay(parent, overrides, fork))


def _carry_out(todo: Rerun, build: Callable[[Run, str], Artifact] | None = None) -> dict[str, Any]:
    with _opened(todo) as this:
        return carry_out(this, todo, build)


@contextmanager
def _opened(todo: Rerun) -> Iterator[Run]:
    """The fork, locked; reward servers run only where something must be scored by them."""
    our_logs()
    folder = todo.folder.path
    if any("model" in STAGES[stage_of(name)].outside for name in todo.missing):
        preflight(todo.params, RunsDir(folder.parent).data, run=folder)
    with opened_run(todo.params, folder, scorer=todo.recorded_scorer()) as run:
        yield run
