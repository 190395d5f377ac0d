"""The flow `rl-train`: what the pipeline does, from the first stage to the last."""

from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows import stages
from flows.contexts import training_run
from flows.prefect_ui import announce_alarm
from tasks.artifacts.layout import round_name
from tasks.reports.summary import Summary


@flow(name="rl-train", flow_run_name="{run}")
def rl_train(
    params: Annotated[str, Field(examples=["params/nft.yaml"])] = "tiny-nft",
    overrides: Annotated[
        list[str] | None, Field(examples=[["rounds=20", "nft.nft_beta=0.1"]])
    ] = None,
    run: Annotated[str | None, Field(examples=["beta-01"])] = None,
    runs_dir: str = "runs",
) -> Summary:
    """Train with reinforcement learning; the same call again goes on where the last one ended.

    Args:
        params: Path of a params file, or the name of a shipped one: one YAML file is one
            experiment.
        overrides: Changes to it by dotted key, each as `section.key=value`.
        run: Name of the run's folder; the name of a run goes on with it.
            Default: that of the params file.
        runs_dir: Folder of all runs.

    Returns the summary that is also written to `summary.json`.
    """
    with training_run(params, overrides or [], run, Path(runs_dir)) as training:
        start = checkpoint = stages.warmup(training)
        policies = [start] * (1 + training.params.rollout.staleness)  # the first of them samples
        stages.evaluate(training, 0, checkpoint=checkpoint)
        for round_index in range(training.params.rounds):
            rollout = stages.rollout(training, round_index, old=policies[0])
            scores = stages.score(training, round_index, rollout=rollout)
            advantages = stages.advantage(training, round_index, scores=scores)
            training.begin_rollout(round_index + 1)  # where ranks are set apart for it
            checkpoint = stages.update(
                training,
                round_index,
                previous=checkpoint,
                start=start,
                old=policies[0],
                rollout=rollout,
                advantages=advantages,
            )
            old = stages.refresh(training, round_index, old=policies[-1], updated=checkpoint)
            policies = [*policies[1:], old]
            stages.evaluate(training, round_index + 1, checkpoint=checkpoint)
            if training.over(round_index + 1, checkpoint):
                break
        summary = training.summarise(checkpoint)
        if summary.reward_hacking:
            announce_alarm(summary.run, round_name(summary.rounds - 1), summary.reward_hacking)
        return summary
