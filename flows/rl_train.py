"""The flow `rl-train`: what the pipeline does, from the first stage to the last."""

from pathlib import Path
from typing import Any

from prefect import flow

from flows.setup import training_run
from tasks import stages
from tasks.summary import summarise


@flow(name="rl-train", flow_run_name="{run}", validate_parameters=False)
def rl_train(
    params: str = "params/tiny-nft.yaml",
    overrides: list[str] | None = None,
    run: str | None = None,
    runs_dir: str = "runs",
) -> dict[str, Any]:
    """Train with reinforcement learning; the same call again goes on where the last one ended.

    params: a YAML file. overrides: dotted keys, as in `nft.nft_beta=0.1`. run: the run's folder in
    `runs_dir`, by default the name of the params file. Returns the summary that is also written to
    `summary.json`.
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
        return summarise(this, checkpoint)
