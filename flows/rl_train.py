"""The flow `rl-train`: what the pipeline does, from the first stage to the last."""

from pathlib import Path
from typing import Annotated

from prefect import flow
from pydantic import Field

from flows import stages
from flows.contexts import training_run
from tasks.reports.summary import Summary


@flow(name="rl-train", flow_run_name="{run}")
def rl_train(
    params: Annotated[str, Field(examples=["params/nft.yaml"])] = "params/tiny-nft.yaml",
    overrides: Annotated[
        list[str] | None, Field(examples=[["rounds=20", "nft.nft_beta=0.1"]])
    ] = None,
    run: Annotated[str | None, Field(examples=["beta-01"])] = None,
    runs_dir: str = "runs",
) -> Summary:
    """Train with reinforcement learning; the same call again goes on where the last one ended.

    Args:
        params: Path of a params file: one YAML file is one experiment.
        overrides: Changes to it by dotted key, each as `section.key=value`.
        run: Name of the run's folder; the name of a run goes on with it.
            Default: that of the params file.
        runs_dir: Folder of all runs.

    Returns the summary that is also written to `summary.json`.
    """
    with training_run(Path(params), overrides or [], run, Path(runs_dir)) as this:
        start = checkpoint = old = stages.warmup(this)
        stages.evaluate(this, 0, checkpoint)
        for round in range(this.params.rounds):
            images = stages.rollout(this, round, old)
            scores = stages.score(this, round, images)
            advantages = stages.advantage(this, round, scores)
            checkpoint = stages.update(this, round, checkpoint, start, old, images, advantages)
            old = stages.refresh(this, round, old, checkpoint)
            stages.evaluate(this, round + 1, checkpoint)
            if this.finished(checkpoint):
                break
        return this.summarise(checkpoint)
