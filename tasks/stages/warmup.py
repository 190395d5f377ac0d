"""Stage `warmup`: supervised flow matching on reference-styled targets, before RL."""

import math
from pathlib import Path
from typing import Any

import torch

from calligrapher.rl.rows import TrainRows
from calligrapher.rl.seeds import seeded
from calligrapher.rl.supervised import supervised
from calligrapher.rl.train_loop import Batch, BatchSchedule, TrainLoop
from calligrapher.rl.train_state import new_state
from tasks.resources.resources import Resources
from tasks.stages.checkpointed_loop import run_with_checkpoints
from tasks.stages.sampling import heights


def warmup(resources: Resources, round_index: None, out: Path) -> dict[str, Any]:
    """Train `warmup.steps` steps on the cases' targets.

    0 steps leave the weights as they are given.

    Files: `trained.safetensors`, `ema.safetensors`, `optimizer.safetensors`, `state.json`,
    `metrics.jsonl`.
    """
    params = resources.params
    settings = params.warmup
    policy = resources.initial_model().policy
    state = new_state(
        policy, weight_decay=settings.weight_decay, use_8bit=settings.use_8bit_adam, ema=False
    )
    cases = resources.cases.train
    per_step = settings.batch_size * settings.gradient_accumulation_steps
    steps_per_pass = math.ceil(len(cases) / per_step)
    passes = math.ceil(settings.steps / steps_per_pass)
    order = torch.randperm(len(cases), generator=seeded(params.seed, "warmup-cases")).tolist()
    schedule = BatchSchedule(
        len(cases),
        settings.batch_size,
        settings.gradient_accumulation_steps,
        passes,
        f"{params.seed}/warmup",
        shuffle_rows=True,
        kinds=heights(resources, [cases[i] for i in order]),
    )

    def rows(index: list[int]) -> TrainRows:
        picked = [cases[order[i]] for i in index]
        x0 = resources.conditioning.targets(picked, reconstruct=params.data.reconstruct)
        return TrainRows(x0, resources.conditioning.batch(picked), torch.zeros(len(picked)))

    def objective(picked: TrainRows, batch: Batch):
        return supervised(policy, picked, seeded(batch.key), settings.style_dropout)

    loop = TrainLoop(
        policy,
        state,
        settings,
        objective,
        total_steps=settings.steps,
        ranks=resources.ranks,
    )
    with resources.progress("warmup", total=settings.steps, unit="step") as bar:
        return run_with_checkpoints(
            loop,
            rows,
            schedule,
            out,
            every=settings.checkpointing_steps,
            bar=bar,
            limit=settings.steps,
        )
