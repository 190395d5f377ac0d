"""What `rollout` and `evaluate` share: images sampled in batches, and their rows of the table."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calligrapher.data.case import Case
from calligrapher.data.images import load_mask, mask_box, mask_to_tensor, to_image
from calligrapher.model.policy import Weights
from calligrapher.rl.train_loop import batches_of
from calligrapher.sampling.exploration import fresh_noise
from calligrapher.sampling.sampler import SampledBatch, sample
from calligrapher.sampling.step import Solver
from calligrapher.tables.parquet import sample_id
from tasks.resources.resources import Resources


@dataclass(frozen=True)
class Row:
    """One image to be: which case it shows, in which group, as which member of it.

    Rows are prompt-major, see `rows_of`.
    """

    group: int
    case: Case
    member: int


def rows_of(cases: list[Case], group_size: int, *, first: int = 0) -> list[Row]:
    """Return a row for each image of each case, prompt-major; first: the first case's group."""
    return [Row(g, case, m) for g, case in enumerate(cases, first) for m in range(group_size)]


def sample_batches(
    resources: Resources,
    cases: list[Case],
    *,
    seeds: list[int],
    weights: Weights,
    num_steps: int,
    window_starts: list[int] | None = None,
    starts_from: list[int] | None = None,
    at_least: int = 0,
    solver: Solver = "euler",
    shared_trunk: bool = False,
    noise_level: float = 0.0,
) -> list[tuple[list[int], SampledBatch]]:
    """Return one image per case, sampled under `weights`, at most `rollout.batch_size` at a time.

    A batch has cases of one length: it comes with their indices, see `in_order`. seeds,
    window_starts, starts_from: one a case, see `sample`; solver, shared_trunk: as there.
    noise_level: of pictures to look at, without window_starts, see `fresh_noise`. at_least: batches
    to sample; the last one is sampled again, for nothing, where there are fewer.
    """
    params, sampled = resources.params, []
    exploration = params.rl.exploration if window_starts else fresh_noise(noise_level, num_steps)
    batches = batches_of_cases(resources, cases)
    with resources.model.policy.use(weights):
        for index in batches + batches[-1:] * (at_least - len(batches)):

            def of_batch(values: list[Any], index: list[int] = index) -> list[Any]:
                return [values[i] for i in index]

            batch = sample(
                resources.model.policy,
                resources.conditioning.batch(of_batch(cases)),
                of_batch(seeds),
                num_steps,
                starts_from=of_batch(starts_from) if starts_from else None,
                window_starts=of_batch(window_starts) if window_starts else None,
                exploration=exploration,
                keep_window=window_starts is not None,
                solver=solver,
                shared_trunk=shared_trunk,
            )
            sampled.append((index, batch))
    return sampled[: len(batches)]


def batches_of_cases(resources: Resources, cases: Sequence[Case]) -> list[list[int]]:
    """Return the batches in which `cases` are sampled, as their indices: of one height each."""
    size = resources.params.rollout.batch_size
    return batches_of(range(len(cases)), size, heights(resources, cases))


def heights(resources: Resources, cases: Sequence[Case]) -> list[int] | None:
    """Return the height of each case on the canvas; None where all have one."""
    canvas = resources.conditioning.canvas
    of = {case: canvas.height_with(case) for case in dict.fromkeys(cases)}
    return [of[case] for case in cases] if len(set(of.values())) > 1 else None


def in_order(parts: Iterable[tuple[list[int], Iterable[Any]]]) -> list[Any]:
    """Return the rows of all `parts`, each given with the indices of its rows, by index."""
    rows = {i: row for index, values in parts for i, row in zip(index, values, strict=True)}
    return [rows[i] for i in range(len(rows))]


def stacked(rows: list[Tensor]) -> Tensor | list[Tensor]:
    """Return rows as one tensor on the CPU, or as a list where their shapes differ."""
    rows = [row.cpu() for row in rows]
    return torch.stack(rows) if len({row.shape for row in rows}) == 1 else rows


def table_columns(
    resources: Resources,
    rows: list[Row],
    *,
    round_index: int,
    seeds: list[int],
    policy_digest: str,
    num_steps: int,
) -> dict[str, list[Any]]:
    """Return the rollout table's columns, without pictures and tensors, for `rows`."""
    canvas = resources.conditioning.canvas
    boxes = {
        row.case.case_id: mask_box(
            to_image(
                mask_to_tensor(load_mask(row.case.mask), canvas.width, canvas.height).expand(
                    3, -1, -1
                )
                * 2
                - 1
            ).convert("L")
        )
        for row in rows
    }
    params = resources.params
    return {
        "sample_id": [sample_id(round_index, row.group, row.member) for row in rows],
        "round": [round_index] * len(rows),
        "case_id": [row.case.case_id for row in rows],
        "group_id": [row.group for row in rows],
        "member": [row.member for row in rows],
        "prompt": [row.case.prompt for row in rows],
        "text": [row.case.text for row in rows],
        "seed": seeds,
        "policy_digest": [policy_digest] * len(rows),
        "num_steps": [num_steps] * len(rows),
        "guidance_scale": [params.model.guidance_scale] * len(rows),
        "mask_box": [list(boxes[row.case.case_id]) for row in rows],
    }
