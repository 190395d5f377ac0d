"""Stage `update`: move the trained weights by a round's images and advantages, and `ema` after
them."""

from pathlib import Path
from typing import Any

import torch

from calligrapher.rl.rows import TrainRows
from calligrapher.rl.train_loop import BatchSchedule, TrainLoop
from calligrapher.rl.train_state import TRAINED, TrainState, new_state
from calligrapher.sampling.exploration import Window
from calligrapher.tables.parquet import read_shard, read_table
from tasks.artifacts.artifact import Artifact
from tasks.resources.resources import Resources
from tasks.stages.advantage import ADVANTAGES_FILE
from tasks.stages.checkpointed_loop import run_with_checkpoints
from tasks.stages.refresh import old_weights


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
    warm-up. old: the policy that sampled. start: the warm-up, whose weights are the reference.
    Neither is in memory where the loss does not ask for it: GRPO has no use for `old`, and
    `kl_coef` 0 none for the reference. Files as in `warmup`. Meta: means.
    """
    params = resources.params
    policy = resources.model.policy
    rl = params.rl
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
    rows = training_rows(resources, rollout, advantages)
    old_policy = resources.weights(old_file) if rl.needs_old else None
    reference = resources.weights(start_file) if runs_reference else None
    num_steps = params.rollout.num_inference_steps

    def objective(batch: TrainRows, generator: torch.Generator):
        return rl.losses(
            policy, batch, generator, num_steps=num_steps, old=old_policy, reference=reference
        )

    settings = params.update
    schedule = BatchSchedule(
        len(rows),
        settings.batch_size,
        settings.gradient_accumulation_steps,
        settings.num_inner_epochs,
        f"{params.seed}/update/{round_index}",
    )
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
        return run_with_checkpoints(
            loop,
            rows.pick,
            schedule,
            out,
            every=settings.checkpointing_steps,
            bar=bar,
            limit=settings.max_train_steps,
        )


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
    )
    if not first:
        state.load(policy, previous.path)
    return state


def training_rows(resources: Resources, rollout: Artifact, advantages: Artifact) -> TrainRows:
    """Return the kept images of a round as training rows, in the order of the rollout."""
    table = read_table(advantages.file(ADVANTAGES_FILE), ["sample_id", "advantage", "kept"])
    names = ["sample_id", "case_id", "group_id", "x0"]
    explores = resources.params.rl.exploration
    if explores is not None:
        names += ["trajectory", "log_prob", "window_sigmas"]
        if explores.guard:
            names.append("mean_old")
    shards = [read_shard(rollout.file(name), names) for name in sorted(rollout.files)]
    ids = [i for shard in shards for i in shard["sample_id"]]
    assert ids == table["sample_id"], (
        "rollout and advantages must hold the same images in the same order"
    )
    keep = [i for i, k in enumerate(table["kept"]) if k]
    device = resources.model.device

    def tensor(name: str) -> torch.Tensor:
        return torch.cat([shard[name] for shard in shards])[keep].to(device)

    cases = {case.case_id: case for case in resources.cases.train}
    case_ids = [i for shard in shards for i in shard["case_id"]]
    group_ids = [i for shard in shards for i in shard["group_id"]]
    window = None
    if explores is not None:
        trajectory = tensor("trajectory")
        mean = tensor("mean_old") if explores.guard else trajectory[:, 1:]
        window = Window(trajectory, tensor("log_prob"), mean, tensor("window_sigmas"))
    return TrainRows(
        x0=tensor("x0"),
        conditioning=resources.conditioning.batch([cases[case_ids[i]] for i in keep]),
        advantages=torch.tensor([table["advantage"][i] for i in keep], device=device),
        groups=torch.tensor([group_ids[i] for i in keep]),
        window=window,
    )
