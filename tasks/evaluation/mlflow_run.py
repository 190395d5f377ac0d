"""An evaluation in MLflow: a run below the training's, attached to the checkpoint's LoggedModel."""

import time
from collections.abc import Sequence
from pathlib import Path

from tasks.artifacts.layout import round_number
from tasks.evaluation.verdict import Verdict
from tasks.tracking.models import TrackedRun

ALARM_TAG = "reward_hacking"


def track_evaluation(run: Path, checkpoint: Path, verdict: Verdict, files: Sequence[Path]) -> str:
    """Show a verdict in the MLflow store of the training; returns the MLflow run id.

    Doing it again adds nothing. Raises what MLflow raises; CalligrapherError when the training is
    in no MLflow store.
    """
    training = TrackedRun(run)
    client, name, digest = training.client, verdict.checkpoint, verdict.digest
    step = round_number(name) + 1  # rounds done, as in the training's own evaluations
    model_id = training.logged_model(f"round-{step:04d}", digest, checkpoint)
    tags = {
        "kind": "evaluation",
        "checkpoint": name,
        "digest": digest,
        "mlflow.parentRunId": training.run_id,
    }
    wanted = f"tags.kind = 'evaluation' AND tags.digest = '{digest}'"
    wanted += f" AND tags.`mlflow.parentRunId` = '{training.run_id}'"
    found = client.search_runs([training.experiment_id], wanted)
    if found:
        run_id = found[0].info.run_id
    else:
        made = client.create_run(
            training.experiment_id, tags=tags, run_name=f"{run.name} {name} evaluation"
        )
        run_id = made.info.run_id
        training.attach(run_id, model_id)
        now = round(time.time() * 1000)
        for key, value in _flat(verdict):
            client.log_metric(run_id, key, value, now, step, model_id=model_id)
        for file in files:
            client.log_artifact(run_id, str(file), "evaluation")
        client.set_terminated(run_id)
    if verdict.champion:
        training.mark_champion(model_id)
    if verdict.reward_hacking:
        said = f"{name}: " + ", ".join(verdict.reward_hacking)
        for tagged in (training.run_id, run_id):
            client.set_tag(tagged, ALARM_TAG, said)
    return run_id


def _flat(verdict: Verdict) -> list[tuple[str, float]]:
    """`held_out/NAME` and `held_out/NAME_minus_OTHER` of a verdict's metrics and differences."""
    found = [(f"held_out/{name}", float(value)) for name, value in verdict.metrics.items()]
    for other, by in verdict.minus.items():
        kind = "best" if other.startswith("round-") else other
        found += [(f"held_out/{name}_minus_{kind}", value) for name, value in by.items()]
    return found
