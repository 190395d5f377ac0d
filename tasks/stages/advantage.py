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
    letter_advantages,
    solved,
    standardized_advantages,
    zero_spread,
)
from calligrapher.tables.parquet import read_table, write_advantages
from reward_server.components import LETTERS
from tasks.artifacts.artifact import Artifact
from tasks.params.run_params import RewardParams, RunParams
from tasks.resources.rewards import lessening, reward_parts

ADVANTAGES_FILE = "advantages.parquet"
LETTERWISE = "ocr_likelihood"  # the component that each letter has for itself
SIDES = ("left", "top", "right", "bottom")


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
    # Of each image, a row of LETTER_ADVANTAGES for each letter; None where there is no such column.
    letters: list[list[dict[str, float]]] | None

    @property
    def teaching_groups(self) -> int:
        """How many groups have an image to train on whose advantage differs from 0."""
        teaches = self.advantages != 0
        if self.letters is not None:
            of_letters = [any(letter["advantage"] for letter in one) for one in self.letters]
            teaches |= torch.tensor(of_letters).reshape(teaches.shape)
        return int((self.keep & teaches).any(1).sum())


def compare(params: RunParams, tables: Sequence[Mapping[str, Sequence[Any]]]) -> Compared:
    """Compare the images of score tables, whole groups in order. tables: as `read_scores` reads."""
    settings = params.advantage
    weights = dict(params.reward.component_weights) if settings.combine == "standardized" else {}
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
    letters = None
    if weights:
        # A row with a reward lacks no component and no factor, unless the reward is made up.
        parts = [{} if None in row.values() else reward_parts(params.reward, row) for row in rows]
        of_letters = weights.pop(LETTERWISE) if params.compares_letters else None
        whole = [grouped([part.get(name) for part in parts]) for name in weights]
        components = torch.stack(whole) if whole else torch.empty(0, *valid.shape)
        shares = torch.tensor(list(weights.values()))
        if of_letters is None:
            advantages = standardized_advantages(
                components, shares, global_std=settings.global_std, valid=valid
            )
        else:
            spelled = letter_advantages(
                _letters(params.reward, rows, valid),
                of_letters,
                components,
                shares,
                global_std=settings.global_std,
                valid=valid,
            )
            advantages = torch.stack([one.mean(1) for one in spelled])
            letters = _placed(rows, [image for group in spelled for image in group.tolist()])
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
        letters=letters,
    )


def _letters(
    params: RewardParams, rows: Sequence[Mapping[str, Any]], valid: torch.Tensor
) -> list[torch.Tensor]:
    """Return how likely each letter is, as it counts, of each group [G, N]; 0 where not valid.

    Raises RewardError where images of one text have unlike numbers of letters, or none.
    """
    size = valid.shape[1]
    found = []
    for group, counts in enumerate(valid):
        members = rows[group * size : (group + 1) * size]
        spelled = {
            place: [lessening(params, row) * letter["likelihood"] for letter in row[LETTERS] or ()]
            for place, (row, is_valid) in enumerate(zip(members, counts, strict=True))
            if is_valid
        }
        lengths = {len(image) for image in spelled.values()}
        if len(lengths) > 1 or 0 in lengths:
            raise RewardError(
                "Each image of a group must have a letter for every one of its text. Got"
                f" {sorted(lengths)} letters for images of {members[0]['sample_id']} and its group."
            )
        values = torch.zeros(size, max(lengths, default=1), dtype=torch.float64)
        for place, image in spelled.items():
            values[place] = torch.tensor(image, dtype=torch.float64)
        found.append(values)
    return found


def _placed(
    rows: Sequence[Mapping[str, Any]], advantages: Sequence[Sequence[float]]
) -> list[list[dict[str, float]]]:
    """Return a row of LETTER_ADVANTAGES for each letter of each image, where it has any."""
    return [
        [
            {"advantage": advantage} | {side: letter[side] for side in SIDES}
            for letter, advantage in zip(row[LETTERS] or (), of_image, strict=False)
        ]
        for row, of_image in zip(rows, advantages, strict=True)
    ]


def read_scores(params: RunParams, path: Path) -> dict[str, list[Any]]:
    """Read the columns of a score table that advantages are made of.

    Raises RewardError where letters are to be compared that nobody asked about.
    """
    weighs = params.advantage.combine == "standardized" and params.reward.component_weights
    names = [*params.reward.needed] if weighs else []
    table = read_table(path)
    if params.compares_letters and LETTERS not in table:
        raise RewardError(
            f"{path} must have the column {LETTERS} where advantage.per_letter is true. It was"
            " scored without. Rerun from the score of that round on (`calligrapher rerun RUN"
            " ROUND/score advantage.per_letter=true --downstream`)."
        )
    names += [LETTERS] if params.compares_letters else []
    return {name: table[name] for name in ("sample_id", "reward", *names)}


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
        }
        | ({} if found.letters is None else {"letters": found.letters}),
    )
    compared = zero_spread(rewards, valid)[valid.sum(1) >= 2]
    further = {"solved_groups": int(found.solved.sum())} if settings.drop_solved else {}
    return {
        "zero_spread_share": compared.double().mean().item() if len(compared) else None,
        "kept_share": keep.double().mean().item(),
        "dropped_groups": int((~keep.any(1)).sum()),
        **further,
    }
