"""Stage `advantage`: compare each image with its group."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Compared:
    """The images of a round, each compared with its group."""

    ids: list[str]
    given: list[float | None]  # the rewards as they stand in the tables
    rewards: torch.Tensor  # [P, G] float64, 0 where there is none
    valid: torch.Tensor  # [P, G] bool, has a reward
    keep: torch.Tensor  # [P, G] bool, may be trained on
    advantages: torch.Tensor  # [P, G] float64
    solved: torch.Tensor  # [P] bool, left out by `drop_solved`

    @property
    def teaching_groups(self) -> int:
        """How many groups have an image to train on whose advantage differs from 0."""
        return int((self.keep & (self.advantages != 0)).any(1).sum())


def compare(params: RunParams, tables: Sequence[Mapping[str, Sequence[Any]]]) -> Compared:
    """Compare the images of score tables, whole groups in order. tables: as `read_scores` reads."""
    settings = params.advantage
    weights = params.reward.component_weights if settings.combine == "standardized" else {}
    rows = [
        dict(zip(table, values, strict=True))
        for table in tables
        for values in zip(*table.values(), strict=True)
    ]
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
    is_solved = torch.zeros(len(rewards), dtype=torch.bool)
    if settings.drop_solved:
        is_solved = solved(rewards, sum(params.reward.component_weights.values()), valid)
    return Compared(
        ids=[row["sample_id"] for row in rows],
        given=given,
        rewards=rewards,
        valid=valid,
        keep=keep & ~is_solved[:, None],
        advantages=advantages,
        solved=is_solved,
    )


def read_scores(params: RunParams, path: Path) -> dict[str, list[Any]]:
    """Read the columns of a score table that advantages are made of."""
    weighs = params.advantage.combine == "standardized" and params.reward.component_weights
    return read_table(path, ["sample_id", "reward", *(params.reward.needed if weighs else ())])


def advantage(
    params: RunParams, round_index: int, out: Path, *, scores: Artifact
) -> dict[str, Any]:
    """Write one advantage per scored image; unscored ones, and groups they leave too small, are not
    kept.

    Files: `advantages.parquet`. Meta: zero_spread_share (of the groups with two scored images; None
    without one), kept_share, dropped_groups, with `drop_solved` also solved_groups. Raises
    RewardError when nothing can be compared.
    """
    settings = params.advantage
    found = compare(params, [read_scores(params, scores.file(n)) for n in sorted(scores.files)])
    rewards, valid, keep = found.rewards, found.valid, found.keep
    if not kept(rewards, valid, baseline=settings.baseline).any():
        raise RewardError(
            f"A round must have a group with two scored images. It has none: {int((~valid).sum())}"
            f" of {valid.numel()} images are unscored (reward.max_unscored_share)."
        )
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
            "sample_id": found.ids,
            "reward": found.given,
            "group_mean": column(mean, scored_group),
            "group_std": column(std, scored_group),
            "advantage": column(found.advantages, keep),
            "kept": keep.flatten().tolist(),
        },
    )
    compared = zero_spread(rewards, valid)[valid.sum(1) >= 2]
    further = {"solved_groups": int(found.solved.sum())} if settings.drop_solved else {}
    return {
        "zero_spread_share": compared.double().mean().item() if len(compared) else None,
        "kept_share": keep.double().mean().item(),
        "dropped_groups": int((~keep.any(1)).sum()),
        **further,
    }
