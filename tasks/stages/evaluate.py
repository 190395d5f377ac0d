"""Stage `evaluate`: fixed held-out cases, fixed noise, EMA weights; pictures, scores, intervals."""

import json
from pathlib import Path
from typing import Any

from calligrapher.data.dataset import Case
from calligrapher.model.loading import pictures
from calligrapher.model.policy import Weights
from calligrapher.sampling.sampler import sample_seed
from calligrapher.tables.parquet import encode_png, write_scores, write_shard
from tasks.pictures.grids import image_grid
from tasks.resources.resources import Bench
from tasks.stages.rollout import sample_batches, table_columns
from tasks.stages.statistics import group_means, means_with_intervals

VERSION = 1
GRID, IMAGES, SCORES, METRICS = "grid.png", "images.parquet", "scores.parquet", "metrics.json"


def evaluate(
    bench: Bench, round: int, weights: Weights, policy_digest: str, num_cases: int, out: Path
) -> dict[str, Any]:
    """Sample and score the first `num_cases` held-out cases.

    The noise depends on `evaluate.seed`, the case and the member alone, so rounds and runs compare
    picture by picture. Files: `images.parquet`, `scores.parquet`, `grid.png` (the first
    `grid_cases`), `metrics.json`. Meta: the metrics; a mean without a scored image is absent, never
    0.
    """
    settings = bench.params.evaluate
    group = settings.num_images_per_case
    cases = bench.evaluation_cases[:num_cases]
    rows = [(g, case, m) for g, case in enumerate(cases) for m in range(group)]
    seeds = [sample_seed(settings.seed, 0, case.case_id, member) for _, case, member in rows]
    drawn = [case for _, case, _ in rows]
    with bench.progress("evaluate", total=len(rows), unit="img") as bar:
        sampled = sample_batches(bench, drawn, seeds, weights)
        images = [
            p for s in sampled for p in pictures(bench.model, s.x0, bench.conditioning.canvas)
        ]
        pngs = [encode_png(image) for image in images]
        scored = bench.scorer.score(pngs, drawn)
        bar.advance(len(rows))
    columns = table_columns(bench, round, rows, seeds, policy_digest)
    write_shard(out / IMAGES, columns, pngs, {})
    write_scores(
        out / SCORES,
        {"sample_id": columns["sample_id"]} | {k: [row[k] for row in scored] for k in scored[0]},
    )
    firsts = range(0, settings.grid_cases * group, group)
    grid = image_grid(
        [images[i] for i in firsts], [caption(drawn[i], scored[i]) for i in firsts], columns=4
    )
    grid.save(out / GRID)
    metrics = summarise(scored, group)
    (out / METRICS).write_text(json.dumps(metrics, indent=1) + "\n")
    return metrics


def caption(case: Case, row: dict[str, Any]) -> str:
    """What was asked for, what was read, and the reward."""
    read = "?" if row["ocr_text"] is None else row["ocr_text"] or "(nothing)"
    reward = "unscored" if row["reward"] is None else f"{row['reward']:.2f}"
    return f"{case.text} · {read} · {reward}"


def summarise(scored: list[dict[str, Any]], group: int) -> dict[str, Any]:
    """Means over cases (a case's images are averaged first) with bootstrap 95 % intervals over
    cases."""
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
    columns["exact_match"] = exact
    return found | means_with_intervals(
        {name: group_means(values, group) for name, values in columns.items()}
    )
