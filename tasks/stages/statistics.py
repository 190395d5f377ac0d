"""Means with bootstrap intervals."""

from collections.abc import Mapping, Sequence

import numpy as np


def means_with_intervals(columns: Mapping[str, Sequence[float | None]]) -> dict[str, float]:
    """Return NAME, NAME_low and NAME_high of each column: its mean, and a 95 % interval around it.

    None = not measured: left out. A column without a number is absent, never 0.
    """
    statistics: dict[str, float] = {}
    for name, values in columns.items():
        measured = np.array([value for value in values if value is not None])
        if len(measured):
            low, high = bootstrap_interval(measured)
            statistics |= {name: float(measured.mean()), f"{name}_low": low, f"{name}_high": high}
    return statistics


def group_means(values: Sequence[float | None], group: int) -> list[float | None]:
    """Return the mean of each `group` values in a row; None where none of them was measured."""
    groups = [values[i : i + group] for i in range(0, len(values), group)]
    measured = [[value for value in members if value is not None] for members in groups]
    return [float(np.mean(members)) if members else None for members in measured]


def bootstrap_interval(values: np.ndarray, *, resamples: int = 2000) -> tuple[float, float]:
    """Return the 95 % percentile interval of the mean, by resampling with a fixed seed."""
    index = np.random.default_rng(0).integers(0, len(values), (resamples, len(values)))
    low, high = np.percentile(values[index].mean(1), [2.5, 97.5])
    return float(low), float(high)
