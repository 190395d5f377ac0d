"""Stage `evaluate`: fixed held-out cases, fixed noise, EMA weights; pictures, scores, intervals."""

import json
from pathlib import Path
from typing import Any

from calligrapher.data.case import Case
from calligrapher.model.loading import pictures
from calligrapher.model.policy import Weights
from calligrapher.rl.train_state import EMA, NO_TENSORS, TRAINED
from calligrapher.sampling.sampler import sample_seed
from calligrapher.tables.parquet import encode_png, write_scores, write_shard
from tasks.artifacts.artifact import Artifact
from tasks.pictures.grids import image_grid, reward_label
from tasks.resources.resources import Resources
from tasks.resources.rewards import further_numbers
from tasks.stages.sampling import in_order, rows_of, sample_batches, table_columns
from tasks.stages.statistics import group_means, means_with_intervals

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
) -> dict[str, Any]:
    """Sample and score the first `num_cases` held-out cases under `weights`.

    The noise depends on `evaluate.seed`, the case and the member alone, so rounds and runs compare
    picture by picture. Files: `images.parquet`, `scores.parquet`, `grid.png` (the first
    `grid_cases`), `metrics.json`. Meta: the metrics; a mean without a scored image is absent,
    never 0.
    """
    settings, num_steps = resources.params.evaluate, resources.params.evaluation_steps
    group = settings.num_images_per_case
    rows = rows_of(resources.cases.evaluation[:num_cases], group)
    seeds = [sample_seed(settings.seed, 0, row.case.case_id, row.member) for row in rows]
    cases = [row.case for row in rows]
    canvas = resources.conditioning.canvas
    with resources.progress("evaluate", total=len(rows), unit="img") as bar:
        sampled = sample_batches(
            resources, cases, seeds=seeds, weights=weights, num_steps=num_steps
        )
        images = in_order(
            (index, pictures(resources.model, batch.x0, canvas)) for index, batch in sampled
        )
        pngs = [encode_png(image) for image in images]
        scored = resources.scorer.score(pngs, cases)
        bar.advance(len(rows))
    columns = table_columns(
        resources,
        rows,
        round_index=round_index,
        seeds=seeds,
        policy_digest=policy_digest,
        num_steps=num_steps,
    )
    write_shard(out / IMAGES, columns, pngs, {})
    write_scores(
        out / SCORES,
        {"sample_id": columns["sample_id"]}
        | {key: [row[key] for row in scored] for key in scored[0]},
    )
    firsts = range(0, settings.grid_cases * group, group)
    grid = image_grid(
        [images[i] for i in firsts], [caption(cases[i], scored[i]) for i in firsts], columns=4
    )
    grid.save(out / GRID)
    metrics = summarise(scored, group)
    (out / EVALUATION_FILE).write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


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
