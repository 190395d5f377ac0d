"""Stage `rollout`: sample the round's images and write them to Parquet, shard by shard."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from calligrapher.data.case import Case
from calligrapher.data.images import load_mask, mask_box, mask_to_tensor, to_image
from calligrapher.model.loading import pictures
from calligrapher.model.policy import Weights
from calligrapher.sampling.sampler import Sampled, sample, sample_seed, windows_of
from calligrapher.tables.parquet import sample_id, write_shard
from tasks.resources.resources import Bench

VERSION = 1


def rollout(
    bench: Bench,
    round: int,
    weights: Weights,
    policy_digest: str,
    out: Path,
    on_shard: Callable[[Path], None],
) -> dict[str, Any]:
    """Sample `num_images_per_prompt` images of each of the round's cases under `weights`.

    Rows are prompt-major. `on_shard` gets every finished shard, those of an earlier attempt
    included. Files: `shard-0000.parquet`, ... Meta: images.
    """
    params = bench.params
    group = params.rollout.num_images_per_prompt
    rows = [(g, case, m) for g, case in enumerate(bench.cases_of(round)) for m in range(group)]
    size = params.rollout.shard_size
    with bench.progress(f"round {round} rollout", total=len(rows), unit="img") as bar:
        for number, start in enumerate(range(0, len(rows), size)):
            path = out / f"shard-{number:04d}.parquet"
            chunk = rows[start : start + size]
            if not path.exists():
                _write(bench, round, chunk, weights, policy_digest, path)
            on_shard(path)
            bar.advance(len(chunk))
    return {"images": len(rows)}


def _write(
    bench: Bench,
    round: int,
    rows: list[tuple[int, Case, int]],
    weights: Weights,
    policy_digest: str,
    path: Path,
) -> None:
    params = bench.params
    cases = [case for _, case, _ in rows]
    seeds = [sample_seed(params.seed, round, case.case_id, member) for _, case, member in rows]
    windows = starts_from = None
    if params.grpo is not None:
        ids = [case.case_id for case in cases]
        windows = windows_of(
            ids, params.seed, round, params.rollout.num_inference_steps, params.grpo
        )
        if params.grpo.noise == "group":
            starts_from = [sample_seed(params.seed, round, case_id, "all") for case_id in ids]
    sampled = sample_batches(bench, cases, seeds, weights, windows, starts_from)
    tensors = {"x0": torch.cat([s.x0 for s in sampled])}
    if params.grpo is not None:
        explored = [s.window for s in sampled]
        tensors |= {
            "trajectory": torch.cat([w.trajectory for w in explored]),
            "log_prob": torch.cat([w.log_prob for w in explored]),
            "window_sigmas": torch.cat([w.sigmas for w in explored]),
        }
        if params.grpo.guard:
            tensors["mean_old"] = torch.cat([w.mean for w in explored])
    images = [p for s in sampled for p in pictures(bench.model, s.x0, bench.conditioning.canvas)]
    columns = table_columns(bench, round, rows, seeds, policy_digest)
    write_shard(path, columns, images, {name: t.cpu() for name, t in tensors.items()})


def sample_batches(
    bench: Bench,
    cases: list[Case],
    seeds: list[int],
    weights: Weights,
    window_starts: list[int] | None = None,
    starts_from: list[int] | None = None,
) -> list[Sampled]:
    """Sample one image per case under `weights`, `rollout.batch_size` at a time; see `sample`."""
    params, sampled = bench.params, []
    size = params.rollout.batch_size
    with bench.model.policy.use(weights):
        for at in range(0, len(cases), size):
            part = slice(at, at + size)
            sampled.append(
                sample(
                    bench.model.policy,
                    bench.conditioning.batch(cases[part]),
                    seeds[part],
                    params.rollout.num_inference_steps,
                    starts_from=starts_from[part] if starts_from else None,
                    window_starts=window_starts[part] if window_starts else None,
                    grpo=params.grpo if window_starts else None,
                )
            )
    return sampled


def table_columns(
    bench: Bench,
    round: int,
    rows: list[tuple[int, Case, int]],
    seeds: list[int],
    policy_digest: str,
) -> dict[str, list[Any]]:
    """The rollout table's columns, without pictures and tensors, for (group, case, member) rows."""
    canvas = bench.conditioning.canvas
    boxes = {
        case.case_id: mask_box(
            to_image(
                mask_to_tensor(load_mask(case.mask), canvas.width, canvas.height).expand(3, -1, -1)
                * 2
                - 1
            ).convert("L")
        )
        for _, case, _ in rows
    }
    return {
        "sample_id": [sample_id(round, g, m) for g, _, m in rows],
        "round": [round] * len(rows),
        "case_id": [c.case_id for _, c, _ in rows],
        "group_id": [g for g, _, _ in rows],
        "member": [m for _, _, m in rows],
        "prompt": [c.prompt for _, c, _ in rows],
        "text": [c.text for _, c, _ in rows],
        "seed": seeds,
        "policy_digest": [policy_digest] * len(rows),
        "num_steps": [bench.params.rollout.num_inference_steps] * len(rows),
        "guidance_scale": [bench.params.model.guidance_scale] * len(rows),
        "mask_box": [list(boxes[c.case_id]) for _, c, _ in rows],
    }
