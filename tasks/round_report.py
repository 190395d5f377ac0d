"""A round in Markdown: its rewards, held-out result, worst samples, and where to look next."""

import json
import os
from pathlib import Path
from typing import Any

from calligrapher.rollout_table import read_shard, read_table
from tasks.artifacts import Artifact
from tasks.names import evaluation_name, round_name
from tasks.tracker import METRICS, REPORT, read_pointer

WORST = 5
_SHOWN = {
    "score": ("reward_mean", "reward_std", "reward_p10", "reward_p50", "reward_p90", "ocr_accuracy_mean",
              "exact_match", "unscored"),
    "advantage": ("zero_spread_share", "kept_share"),
    "update": ("loss", "kl", "approx_kl", "clip_fraction", "old_distance", "grad_norm"),
    "evaluate": ("ocr_accuracy", "ocr_accuracy_low", "ocr_accuracy_high", "exact_match"),
}  # fmt: skip


def round_report(run: Path, round: int) -> str:
    """The report of a finished round of the run in the folder `run`, pictures and pages as links."""
    metrics = _metrics(run, round)
    folder = run.absolute() / round_name(round)
    parts = [f"## Round {round} of {run.name}", _table(metrics), "### Worst samples", _worst(folder)]
    parts += ["### Where to look", _links(run.absolute(), folder, round)]
    return "\n\n".join(parts) + "\n"


def mlflow_page(run: Path) -> str | None:
    """The address of the run's page in MLflow's UI, where one is known to be served."""
    pointer = read_pointer(run)
    uri = pointer.get("uri") or ""
    server = uri if uri.startswith("http") else os.environ.get("CALLIGRAPHER_MLFLOW_URL")
    if not server or not pointer.get("run_id") or not pointer.get("experiment_id"):
        return None
    return f"{server.rstrip('/')}/#/experiments/{pointer['experiment_id']}/runs/{pointer['run_id']}"


def _metrics(run: Path, round: int) -> dict[str, float]:
    """Of the round's stages, the last value of each metric, by `stage/name`."""
    stages = {f"{round_name(round)}/{stage}" for stage in ("score", "advantage", "update")}
    stages.add(evaluation_name(round + 1))
    found: dict[str, float] = {}
    for line in (run / METRICS).read_text().splitlines():
        record = json.loads(line)
        if record["stage"] in stages:
            found |= {key: value for key, value in record["metrics"].items() if value is not None}
    return found


def _table(metrics: dict[str, float]) -> str:
    names = [f"{stage}/{name}" for stage, names in _SHOWN.items() for name in names]
    rows = [f"| `{name}` | {metrics[name]:.4g} |" for name in names if name in metrics]
    return "\n".join(["| metric | value |", "|---|---|", *rows])


def _worst(folder: Path) -> str:
    rollout, scores = Artifact.load(folder / "rollout"), Artifact.load(folder / "score")
    rows: dict[str, list[Any]] = {"sample_id": [], "text": [], "ocr_text": [], "reward": []}
    for name in sorted(scores.files):
        table = read_table(scores.file(name), ["sample_id", "ocr_text", "reward"])
        table |= read_shard(rollout.file(name.replace("scores-", "shard-")), ["text"])
        for key in rows:
            rows[key] += table[key]
    scored = [i for i, reward in enumerate(rows["reward"]) if reward is not None]
    worst = sorted(scored, key=lambda i: rows["reward"][i])[:WORST]
    lines = ["| sample | should read | reads | reward |", "|---|---|---|---|"]
    for i in worst:
        read = _cell(rows["ocr_text"][i] or "")
        lines.append(
            f"| {rows['sample_id'][i]} | {_cell(rows['text'][i])} | {read} | {rows['reward'][i]:.3f} |"
        )
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text in a table's cell as it is: what a model painted must not become markup."""
    return "`" + text.replace("`", "'").replace("|", "¦").replace("\n", " ") + "`" if text else "(nothing)"


def _links(run: Path, folder: Path, round: int) -> str:
    grid = run / REPORT / "grid" / f"{round + 1:06d}.png"
    pictures = {"The fixed cases after this round": grid}
    pictures["Best and worst samples"] = run / REPORT / "best_and_worst" / f"{round:06d}.png"
    lines = [f"- {title}: [{path.name}]({path.as_uri()})" for title, path in pictures.items()]
    page = mlflow_page(run)
    lines.append(f"- MLflow: [run]({page}), [pictures]({page}/artifacts)" if page else "- MLflow: no server")
    lines.append(f"- Artifacts: [{folder}]({folder.as_uri()})")
    return "\n".join(lines)
