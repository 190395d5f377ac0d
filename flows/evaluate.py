"""The flow `evaluate`: a checkpoint on held-out cases, compared with what came before it."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from prefect import flow, task
from prefect.artifacts import create_markdown_artifact
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed
from pydantic import Field

from calligrapher.errors import ArtifactError, CalligrapherError
from flows.contexts import lazy_scorer, our_logs
from flows.prefect_ui import announce_alarm
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import PARAMS, RunsDir
from tasks.evaluation.evaluation import (
    Evaluation,
    load_evaluation_params,
    newest_checkpoint,
    open_evaluation,
    params_of,
)
from tasks.evaluation.measures import CASES, MEASURES
from tasks.evaluation.mlflow_run import track_evaluation
from tasks.evaluation.report import picture, verdict_report
from tasks.evaluation.verdict import Verdict
from tasks.params.files import find_params_file
from tasks.params.names import check_run_name
from tasks.params.run_params import RunParams
from tasks.runs.run import resources_of

logger = logging.getLogger(__name__)


@flow(name="evaluate", flow_run_name="evaluate {run} {checkpoint}")
def evaluate(
    run: Annotated[str | None, Field(examples=["tiny-nft"])] = None,
    checkpoint: Annotated[str | None, Field(examples=["round-0003"])] = None,
    runs_dir: str = "runs",
    params: Annotated[str, Field(examples=["params/evaluate.yaml"])] = "evaluate",
) -> Any:
    """Evaluate checkpoints; what was evaluated before is found again.

    Args:
        run: Name of the run. Default: every run that has a checkpoint.
        checkpoint: Its round, as `round-0003`. Default: the newest.
        runs_dir: Folder of all runs.
        params: Path of the file that says how; `evaluate` is the shipped one.

    Returns one verdict a run (tasks/evaluation/verdict.py). A run that cannot be evaluated does not
    keep the others from it: the state's message names it. The flow fails when a run that was asked
    for by name cannot be evaluated, or none can.
    """
    our_logs()

    def evaluate_one(folder: Path) -> dict[str, Any]:
        return asdict(_evaluate(folder, checkpoint, params))

    if run is not None:
        return [evaluate_one(Path(runs_dir) / check_run_name(run))]

    def evaluate_newest(folder: Path) -> dict[str, Any] | None:
        return evaluate_one(folder) if newest_checkpoint(folder) else None

    runs = sorted(path.parent for path in Path(runs_dir).glob(f"*/{PARAMS}"))
    verdicts, failures = each(runs, evaluate_newest)
    if failures and not verdicts:
        raise CalligrapherError("No run could be evaluated: " + "; ".join(failures))
    if failures:
        return Completed(name="SomeFailed", message="; ".join(failures), data=verdicts)
    return verdicts


def each(
    folders: Iterable[Path], work: Callable[[Path], dict[str, Any] | None]
) -> tuple[list[dict[str, Any]], list[str]]:
    """Return what `work` gives for the folders, and a line for each for which it fails.

    What it gives None for, a run that has no checkpoint yet, is left out.
    """
    results, failures = [], []
    for folder in folders:
        try:
            result = work(folder)
        except Exception as error:  # whatever is wrong with one run, the others are evaluated
            logger.exception("%s cannot be evaluated", folder)
            failures.append(f"{folder.name}: {error}")
        else:
            if result is not None:
                results.append(result)
    return results, failures


def _evaluate(folder: Path, checkpoint: str | None, params: str) -> Verdict:
    with evaluation(folder, params) as this:
        verdict, measured, others = _judge(this, checkpoint, measure)
        show(this, verdict, measured, others)
        return verdict


def evaluate_here(folder: Path, checkpoint: str | None, params: str) -> tuple[Verdict, str]:
    """Evaluate one checkpoint of the run in `folder` without Prefect; also return the report.

    Raises ArtifactError where the run has no such checkpoint, and none at all.
    """
    with evaluation(folder, params) as this:
        verdict, measured, others = _judge(this, checkpoint, Evaluation.measure)
        sheet = picture(this, verdict, measured, others)
        _track(this, verdict, measured, sheet)
        return verdict, verdict_report(verdict, sheet)


def _judge(
    this: Evaluation, checkpoint: str | None, measure: Callable[[Evaluation, str], Artifact]
) -> tuple[Verdict, Artifact, dict[str, Artifact]]:
    """Return the verdict, what was measured of the checkpoint, and of those before it."""
    name = (checkpoint or newest_checkpoint(this.run) or "").split("/")[0]
    if not name:
        raise ArtifactError(f"{this.run} must hold a checkpoint to evaluate. It has none yet.")
    others = {other: measure(this, other) for other in this.earlier(name)}
    measured = measure(this, name)
    return this.compare(name, measured, others), measured, others


@task(cache_policy=NO_CACHE, task_run_name="measure {name}")
def measure(this: Evaluation, name: str) -> Artifact:
    return this.measure(name)


@task(cache_policy=NO_CACHE, task_run_name="show")
def show(this: Evaluation, verdict: Verdict, made: Artifact, others: dict[str, Artifact]) -> None:
    """Picture, Prefect's UI, MLflow, alarm. An MLflow that is down costs only its own page."""
    sheet = picture(this, verdict, made, others)
    report = verdict_report(verdict, sheet)
    key = "".join(c if c.isalnum() else "-" for c in f"{verdict.run}-evaluation".lower())
    create_markdown_artifact(report, key=key, description=f"{verdict.run} {verdict.checkpoint}")
    if verdict.reward_hacking:
        announce_alarm(verdict.run, verdict.checkpoint, verdict.reward_hacking)
    _track(this, verdict, made, sheet)


def _track(this: Evaluation, verdict: Verdict, made: Artifact, sheet: Path) -> None:
    if "mlflow" not in this.resources.params.tracking.used:
        return
    checkpoint = this.checkpoint(verdict.checkpoint).path
    try:
        track_evaluation(
            this.run, checkpoint, verdict, [made.file(MEASURES), made.file(CASES), sheet]
        )
    except Exception as error:
        logger.warning("MLflow does not show this evaluation: %s: %s", type(error).__name__, error)


@contextmanager
def evaluation(run: Path, params_file: str) -> Iterator[Evaluation]:
    """Everything that the flow needs for one run, taken apart in every case of exit."""
    settings = load_evaluation_params(find_params_file(params_file))
    params = with_servers_beside_a_training(params_of(run, settings))
    runs = RunsDir(run.parent)
    with (
        lazy_scorer(params, runs.evaluations(run.name), runs.data) as scorer,
        open_evaluation(run, settings, resources_of(params, runs, scorer)) as this,
    ):
        yield this


def with_servers_beside_a_training(params: RunParams) -> RunParams:
    """Return `params` that start no server on `launch.reward_gpu_ids`.

    Their GPUs and ports may be in use by the run itself, which goes on training. An evaluation
    starts one server of its own instead, on the CPU and a free port.
    """
    if not params.launch.reward_gpu_ids:
        return params
    launch = params.launch.model_copy(update={"gpu_ids": [], "reward_gpu_ids": []})
    reward = params.reward.model_copy(update={"server_host": None, "server_port": None})
    return params.model_copy(update={"launch": launch, "reward": reward})
