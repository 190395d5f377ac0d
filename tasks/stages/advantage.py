"""Stage `advantage`: compare each image with its group."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from calligrapher.errors import RewardError
from calligrapher.rl.advantage import (
    group_advantages,
    kept,
    solved,
    standardized_advantages,
    zero_spread,
)
from calligrapher.tables.parquet import read_table, write_advantages
from tasks.artifacts.artifact import Artifact
from tasks.params.run_params import RunParams
from tasks.resources.rewards import reward_parts

ADVANTAGES_FILE = "advantages.parquet"


def advantage(
    params: RunParams, round_index: int, out: Path, *, scores: Artifact
) -> dict[str, Any]:
    """Write one advantage per scored image; unscored ones, and groups they leave too small, are not
    kept.

    Files: `advantages.parquet`. Meta: zero_spread_share (of the groups with two scored images; None
    without one), kept_share, dropped_groups, with `drop_solved` also solved_groups. Raises
    RewardError when nothing is kept.
    """
    settings = params.advantage
    weights = params.reward.component_weights if settings.combine == "standardized" else {}
    names = ["sample_id", "reward", *(params.reward.needed if weights else ())]
    rows = [
        dict(zip(table, values, strict=True))
        for name in sorted(scores.files)
        for table in [read_table(scores.file(name), names)]
        for values in zip(*table.values(), strict=True)
    ]
    ids = [row["sample_id"] for row in rows]
    given = [row["reward"] for row in rows]

    def grouped(values: Sequence[float | None]) -> torch.Tensor:
        numbers = [0.0 if value is None else value for value in values]
        shape = (-1, params.rollout.num_images_per_prompt)
        return torch.tensor(numbers, dtype=torch.float64).reshape(shape)

    rewards = grouped(given)
    valid = torch.tensor([r is not None for r in given]).reshape(rewards.shape)
    keep = kept(rewards, valid, baseline=settings.baseline)
    if weights:
        # A row with a reward lacks no component and no factor, unless the reward is made up.
        parts = [{} if None in row.values() else reward_parts(params.reward, row) for row in rows]
        advantages = standardized_advantages(
            torch.stack([grouped([part.get(name) for part in parts]) for name in weights]),
            torch.tensor(list(weights.values())),
            global_std=settings.global_std,
            valid=valid,
        )
    else:
        advantages = group_advantages(
            rewards, valid=valid, global_std=settings.global_std, baseline=settings.baseline
        )
    if not keep.any():
        raise RewardError(
            f"A round must have a group with two scored images. It has none: {int((~valid).sum())}"
            f" of {valid.numel()} images are unscored (reward.max_unscored_share)."
        )
    highest = sum(params.reward.component_weights.values())
    is_solved = solved(rewards, highest, valid) if settings.drop_solved else torch.tensor(False)
    keep &= ~is_solved.reshape(-1, 1)
    counts = valid.sum(1, keepdim=True).clamp(min=1)
    mean = (rewards * valid).sum(1, keepdim=True) / counts
    std = (((rewards - mean) * valid) ** 2).sum(1, keepdim=True).div(counts).sqrt()
    scored_group = valid.any(1, keepdim=True).expand_as(valid)

    def column(values: torch.Tensor, where: torch.Tensor) -> list[float | None]:
        pairs = zip(
            values.expand_as(rewards).flatten().tolist(), where.flatten().tolist(), strict=True
        )
        return [v if w else None for v, w in pairs]

    write_advantages(
        out / ADVANTAGES_FILE,
        {
            "sample_id": ids,
            "reward": given,
            "group_mean": column(mean, scored_group),
            "group_std": column(std, scored_group),
            "advantage": column(advantages, keep),
            "kept": keep.flatten().tolist(),
        },
    )
    compared = zero_spread(rewards, valid)[valid.sum(1) >= 2]
    further = {"solved_groups": int(is_solved.sum())} if settings.drop_solved else {}
    return {
        "zero_spread_share": compared.double().mean().item() if len(compared) else None,
        "kept_share": keep.double().mean().item(),
        "dropped_groups": int((~keep.any(1)).sum()),
        **further,
    }
