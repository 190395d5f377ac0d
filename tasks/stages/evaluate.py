"""Stage `evaluate`: fixed held-out cases, fixed noise, EMA weights; pictures, scores, intervals."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from calligrapher.data.case import Case
from calligrapher.model.loading import pictures
from calligrapher.model.policy import Weights
from calligrapher.rl.train_state import EMA, NO_TENSORS, TRAINED
from calligrapher.sampling.sampler import sample_seed
from calligrapher.tables.parquet import decode_png, encode_png, write_scores, write_shard
from tasks.artifacts.artifact import Artifact
from tasks.pictures.grids import image_grid, reward_label
from tasks.resources.resources import Resources
from tasks.resources.rewards import further_numbers
from tasks.stages.sampling import batches_of_cases, rows_of, sample_batches, table_columns
from tasks.stages.statistics import group_means, means_with_intervals
from tasks.stages.turns import turns

GRID, IMAGES, SCORES, EVALUATION_FILE = (
    "grid.png",
    "images.parquet",
    "scores.parquet",
    "metrics.json",
)


def evaluate(
    resources: Resources,
    round_index: int | None,
    out: Path,
    *,
    checkpoint: Artifact,
    num_cases: int,
    images_per_case: int,
) -> dict[str, Any]:
    """Sample and score the first `num_cases` held-out cases under a checkpoint.

    Its moving average counts where there is one, else the trained weights. Files and meta as in
    `evaluate_weights`.
    """
    weights = resources.weights(checkpoint.file(evaluated_file(checkpoint)))
    shown_round = 0 if round_index is None else round_index + 1
    return evaluate_weights(
        resources,
        weights,
        out,
        policy_digest=checkpoint.digest,
        round_index=shown_round,
        num_cases=num_cases,
        images_per_case=images_per_case,
    )


def evaluated_file(checkpoint: Artifact) -> str:
    """Return the file of a checkpoint that is evaluated: its moving average where it has one.

    What it was made with decides, not the params of the run that asks: a fork that switches the
    average on or off shares the checkpoints before.
    """
    return EMA if checkpoint.files[EMA].bytes > NO_TENSORS else TRAINED


def evaluate_weights(
    resources: Resources,
    weights: Weights,
    out: Path,
    *,
    policy_digest: str,
    round_index: int,
    num_cases: int,
    images_per_case: int,
) -> dict[str, Any]:
    """Sample and score the first `num_cases` held-out cases under `weights`.

    The noise depends on `evaluate.seed`, the case and the member alone, so rounds and runs compare
    picture by picture. Batch k is sampled and scored by rank k mod N; the first rank writes. Files:
    `images.parquet`, `scores.parquet`, `grid.png` (the first `grid_cases`), `metrics.json`. Meta:
    the metrics; a mean without a scored image is absent, never 0.
    """
    settings, num_steps = resources.params.evaluate, resources.params.evaluation_steps
    rows = rows_of(resources.cases.evaluation[:num_cases], images_per_case)
    seeds = [sample_seed(settings.seed, 0, row.case.case_id, row.member) for row in rows]
    cases = [row.case for row in rows]
    pngs, scored = _paint(resources, cases, seeds, weights)
    metrics = summarise(scored, images_per_case)
    if not resources.ranks.is_first:
        return metrics
    columns = table_columns(
        resources,
        rows,
        round_index=round_index,
        seeds=seeds,
        policy_digest=policy_digest,
        num_steps=num_steps,
    )
    write_pictures(out, columns, pngs, scored)
    firsts = range(0, settings.grid_cases * images_per_case, images_per_case)
    grid = image_grid(
        [decode_png(pngs[i]) for i in firsts],
        [caption(cases[i], scored[i]) for i in firsts],
        columns=4,
    )
    grid.save(out / GRID)
    (out / EVALUATION_FILE).write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def write_pictures(
    out: Path,
    columns: Mapping[str, Sequence[Any]],
    pngs: Sequence[bytes],
    scored: Sequence[Mapping[str, Any]],
) -> None:
    """Write `images.parquet` and `scores.parquet`; columns: as of `table_columns`."""
    write_shard(out / IMAGES, columns, pngs, {})
    write_scores(
        out / SCORES,
        {"sample_id": columns["sample_id"]}
        | {key: [row[key] for row in scored] for key in scored[0]},
    )


def _paint(
    resources: Resources, cases: list[Case], seeds: list[int], weights: Weights
) -> tuple[list[bytes], list[dict[str, Any]]]:
    """Return the picture of each case, as PNG, and its scores; on all ranks, who share the work."""
    ranks, canvas = resources.ranks, resources.conditioning.canvas
    batches = batches_of_cases(resources, cases)
    painted: dict[int, bytes] = {}
    images = sum(len(batch) for number, batch in enumerate(batches) if ranks.owns(number))
    with resources.progress("evaluate", total=images, unit="img") as bar:
        pieces = {n: [cases[i] for i in batch] for n, batch in enumerate(batches)}
        for turn in turns(resources, pieces):
            batch = batches[turn.number]
            ((_, sampled),) = sample_batches(
                resources,
                pieces[turn.number],
                seeds=[seeds[i] for i in batch],
                weights=weights,
                num_steps=resources.params.evaluation_steps,
                noise_level=resources.params.evaluate.noise_level,
            )
            if turn.own:
                shown = pictures(resources.model, sampled.x0, canvas)
                painted |= zip(batch, map(encode_png, shown), strict=True)
                bar.advance(len(batch))
        scored: list[dict[str, Any]] = []
        if painted:
            scored = resources.scorer.score(list(painted.values()), [cases[i] for i in painted])
    parts = ranks.gather(list(zip(painted.items(), scored, strict=True)))
    found = sorted((part for given in parts for part in given), key=lambda part: part[0][0])
    return [png for (_, png), _ in found], [row for _, row in found]


def caption(case: Case, row: dict[str, Any]) -> str:
    """What was asked for, what was read, and the reward."""
    read = "?" if row["ocr_text"] is None else row["ocr_text"] or "(nothing)"
    return f"{case.text} · {read} · {reward_label(row['reward'])}"


def summarise(scored: list[dict[str, Any]], group: int) -> dict[str, Any]:
    """Return means over cases, with bootstrap 95 % intervals over cases.

    A case's images are averaged first.
    """
    found: dict[str, Any] = {
        "images": len(scored),
        "unscored": sum(row["reward"] is None for row in scored),
    }
    exact = [
        None if row["ocr_accuracy"] is None else float(row["ocr_accuracy"] == 1) for row in scored
    ]
    columns = {
        name: [row[name] for row in scored]
        for name in ("ocr_accuracy", "ocr_likelihood", "style_score", "reward")
    }
    columns |= {name: [row[name] for row in scored] for name in further_numbers(scored[0])}
    columns["exact_match"] = exact
    return found | means_with_intervals(
        {name: group_means(values, group) for name, values in columns.items()}
    )
