"""docs/metrics.md and docs/artifacts.md name what the code logs and writes."""

import json
import re
from pathlib import Path

import torch

from calligrapher.rl.grpo import GRPOParams, grpo_loss
from calligrapher.rl.nft import NFTParams, nft_loss
from tasks.artifacts.artifact import Manifest

DOCS = Path(__file__).parents[2] / "docs"


def documented_metrics():
    return set(re.findall(r"`([a-z]+/[a-z0-9_]+)`", (DOCS / "metrics.md").read_text()))


def test_every_metric_of_the_losses_is_documented():
    row, sigma = torch.randn(2, 3, 5), torch.tensor([0.5, 0.7])
    _, nft = nft_loss(
        row, sigma, NFTParams(), velocity_old=row + 1, velocity_ref=row, x0=row, x=row, sigma=sigma
    )
    _, grpo = grpo_loss(
        sigma,
        sigma,
        sigma,
        GRPOParams(),
        mean=row,
        mean_ref=row,
        mean_old=row,
        std=sigma,
        dt=-sigma,
    )
    logged = {f"update/{name}" for name in (*nft, *grpo, "loss", "grad_norm", "learning_rate")}
    assert logged - documented_metrics() == set()


def test_every_metric_of_a_run_is_documented(train):
    folder, _ = train("one", rounds=1)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    logged = {re.sub("_(std|p10|p50|p90)$", "_mean", key) for row in rows for key in row["metrics"]}
    logged = {
        re.sub("^time/[a-z]+_(images_per_second|gpu_peak_gib)$", r"time/update_\1", k)
        for k in logged
    }
    assert "score/reward_mean" in logged
    assert logged - documented_metrics() == set()


def test_every_metric_that_a_stage_returns_is_documented():
    literal = re.compile(r'"([a-z0-9_]+)":')
    for stage in ("advantage", "refresh"):
        source = (Path(__file__).parents[2] / "tasks" / "stages" / f"{stage}.py").read_text()
        returned = literal.findall(source[source.rindex("return {") :])
        assert returned, stage
        assert {f"{stage}/{name}" for name in returned} - documented_metrics() == set()


def test_every_key_of_the_manifest_is_documented():
    text = (DOCS / "artifacts.md").read_text()
    for name in Manifest.model_fields:
        assert f"`{name}`" in text, name
