"""Scores a round again with other reward weights, from the components in its score table."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from calligrapher.errors import RewardError
from calligrapher.tables.parquet import read_table, write_scores
from reward_server.components import LETTERS
from tasks.artifacts.artifact import Artifact
from tasks.params.run_params import RewardParams, RunParams
from tasks.resources.rewards import measured_numbers, reward_of


class RecordedScorer:
    """Stands for the scorer of earlier scores: says who it was, and asks nobody."""

    def __init__(self, scored_by: dict[str, Any]) -> None:
        self._scored_by = scored_by

    def identity(self) -> dict[str, Any]:
        return self._scored_by

    def score(
        self, images: Sequence[bytes], cases: Sequence[Any], letters: bool = False
    ) -> list[dict[str, Any]]:
        raise RewardError("The recorded scores must suffice here. No reward server was started.")


def can_reweigh(scores: Artifact, params: RunParams) -> bool:
    """Return whether `scores` has each component that `params` weighs, or the reason why not.

    And the letters, where they are compared.
    """
    reward = params.reward
    if reward.disable_reward_model or scores.params["reward"]["disable_reward_model"]:
        return False
    tables = _tables(scores).values()
    if params.compares_letters and not all(LETTERS in table for table in tables):
        return False
    return all(_row_suffices(row, reward) for table in tables for row in _rows(table))


def reweigh(scores: Artifact, params: RewardParams, out: Path) -> list[dict[str, list[Any]]]:
    """Write and return the score tables of `scores`, with rewards by the weights of `params`."""
    tables = []
    for name, table in _tables(scores).items():
        rewards = [reward_of(params, row, _errors(row)) for row in _rows(table)]
        table |= {key: [reward[key] for reward in rewards] for key in ("reward", "reason")}
        write_scores(out / name, table)
        tables.append(table)
    return tables


def _tables(scores: Artifact) -> dict[str, dict[str, list[Any]]]:
    return {name: read_table(scores.file(name)) for name in sorted(scores.files)}


def _rows(table: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(table, values, strict=True)) for values in zip(*table.values(), strict=True)]


def _row_suffices(row: dict[str, Any], params: RewardParams) -> bool:
    # A component that was measured by nobody yet when the table was written has no column.
    return all(row.get(c) is not None or c in _errors(row) for c in params.needed)


def _errors(row: dict[str, Any]) -> dict[str, str]:
    """Component -> why it is missing, from the row's `reason`."""
    return dict(_reasons(tuple(measured_numbers(row))).findall(row["reason"] or ""))


@functools.cache
def _reasons(components: tuple[str, ...]) -> re.Pattern[str]:
    """Return what finds (component, why it is missing) in a `reason`."""
    names = "|".join(components)
    return re.compile(rf"(?:^|; )({names}): (.*?)(?=; (?:{names}): |$)")
