"""What `rollout` and `evaluate` share: images sampled in batches, and their rows of the table."""

import math
from dataclasses import dataclass
from typing import Any

from calligrapher.data.case import Case
from calligrapher.data.images import load_mask, mask_box, mask_to_tensor, to_image
from calligrapher.model.policy import Weights
from calligrapher.sampling.sampler import SampledBatch, sample
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


def rows_of(cases: list[Case], group_size: int) -> list[Row]:
    """Return a row for each image of each case, prompt-major."""
    return [Row(g, case, m) for g, case in enumerate(cases) for m in range(group_size)]


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
) -> list[SampledBatch]:
    """Return one image per case, sampled under `weights`, `rollout.batch_size` at a time.

    seeds, window_starts, starts_from: one a case, see `sample`. at_least: batches to sample; the
    last one is sampled again, for nothing, where there are fewer.
    """
    params, sampled = resources.params, []
    size = params.rollout.batch_size
    batches = num_batches(resources, len(cases))
    with resources.model.policy.use(weights):
        for number in range(max(batches, at_least)):
            at = min(number, batches - 1) * size
            part = slice(at, at + size)
            sampled.append(
                sample(
                    resources.model.policy,
                    resources.conditioning.batch(cases[part]),
                    seeds[part],
                    num_steps,
                    starts_from=starts_from[part] if starts_from else None,
                    window_starts=window_starts[part] if window_starts else None,
                    exploration=params.rl.exploration if window_starts else None,
                )
            )
    return sampled[:batches]


def num_batches(resources: Resources, count: int) -> int:
    """Return in how many batches `count` images are sampled."""
    return math.ceil(count / resources.params.rollout.batch_size)


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
