"""Stage `update`: move the trained weights by a round's images and advantages, and `ema` after
them."""

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from calligrapher.rl.rows import TrainRows
from calligrapher.rl.train_loop import Batch, BatchSchedule, TrainLoop
from calligrapher.rl.train_state import TRAINED, TrainState, new_state
from tasks.artifacts.artifact import Artifact
from tasks.resources.resources import Resources
from tasks.stages.checkpointed_loop import STEP_METRICS_FILE, run_with_checkpoints
from tasks.stages.refresh import old_weights
from tasks.stages.training_rows import training_rows

IDLE = ("left_out", "untaken_steps")  # counts of a round, beside what is measured at each step


def update(
    resources: Resources,
    round_index: int,
    out: Path,
    *,
    previous: Artifact,
    start: Artifact,
    old: Artifact,
    rollout: Artifact,
    advantages: Artifact,
) -> dict[str, Any]:
    """Optimise for `num_inner_epochs` passes over the kept images.

    previous: the last update, or the warm-up in round 0; the optimizer starts anew after the
    warm-up. old: the policy that sampled; a loss whose old policy is the trained one has that of
    `previous` in its place. start: the warm-up, whose weights are the reference. Neither is in
    memory where the loss does not ask for it: GRPO has no use for `old` unless it reckons anew, and
    `kl_coef` 0 none for the reference. No step is taken in which no advantage differs from 0.
    Files as in `warmup`, also where no step is taken at all. Meta: means; left_out (kept images of
    groups without spread, which teach nothing), untaken_steps. Where the weight of the KL follows a
    target, the round's is in `state.json`.
    """
    params = resources.params
    policy = resources.model.policy
    rl = params.rl
    if rl.old_is_trained:
        old = previous
    old_file, start_file = old_weights(old), start.file(TRAINED)
    # The same bytes are the same policy: one forward then serves as old and as reference.
    moved = old.files[old_file.name].sha256 != start.files[TRAINED].sha256
    if not moved:
        old_file = start_file
    runs_reference = rl.needs_reference and (moved or not rl.needs_old)
    needed = [old_file] if rl.needs_old else []
    if runs_reference:
        needed.append(start_file)
    resources.evict_weights(but=needed)
    state = _state(resources, previous, first=previous.digest == start.digest)
    state.kl_coef = rl.kl_coef_of_round(state.kl_coef, _measured_kl(previous))
    if state.kl_coef is not None:
        rl = rl.model_copy(update={"kl_coef": state.kl_coef})
    rows = training_rows(resources, rollout, advantages)
    old_policy = resources.weights(old_file) if rl.needs_old else None
    reference = resources.weights(start_file) if runs_reference else None
    num_steps = params.rollout.num_inference_steps

    def objective(picked: TrainRows, batch: Batch):
        return rl.losses(
            policy, picked, batch.pass_key, num_steps=num_steps, old=old_policy, reference=reference
        )

    settings = params.update
    schedule = BatchSchedule(
        len(rows),
        settings.batch_size,
        settings.gradient_accumulation_steps,
        settings.num_inner_epochs,
        f"{params.seed}/update/{round_index}",
        teaches=rows.teaches,
        kinds=rows.kinds,
    )
    untaken = len(replace(schedule, teaches=None).steps()) - len(schedule.steps())
    loop = TrainLoop(
        policy,
        state,
        settings,
        objective,
        total_steps=params.total_updates,
        ema_max_decay=params.ema_decay,
        ema_interval=params.ema.update_interval,
        ranks=resources.ranks,
    )
    with resources.progress(
        f"round {round_index} update", total=len(schedule.steps()), unit="step"
    ) as bar:
        meta = run_with_checkpoints(
            loop,
            rows.pick,
            schedule,
            out,
            every=settings.checkpointing_steps,
            bar=bar,
            limit=settings.max_train_steps,
        )
    return meta | {"left_out": rows.left_out, "untaken_steps": untaken}


def _measured_kl(previous: Artifact) -> float | None:
    """Return the mean KL over the steps of an update; None where none was measured."""
    lines = previous.file(STEP_METRICS_FILE).read_text().splitlines()
    found = [row["kl"] for row in map(json.loads, lines) if "kl" in row]
    return fmean(found) if found else None


def _state(resources: Resources, previous: Artifact, *, first: bool) -> TrainState:
    settings = resources.params.update
    policy = resources.model.policy
    resources.load_trained(previous)
    # One average is enough where every rank has all weights; they are as large as the adapter.
    keeps_average = resources.ranks.is_first or policy.sharded
    state = new_state(
        policy,
        betas=settings.betas,
        epsilon=settings.adam_epsilon,
        weight_decay=settings.weight_decay,
        use_8bit=settings.use_8bit_adam,
        ema=resources.params.ema.use_ema and keeps_average,
        adapter_rate=(settings.adapter_learning_rate or settings.learning_rate)
        / settings.learning_rate,
    )
    if not first:
        state.load(policy, previous.path)
    return state
