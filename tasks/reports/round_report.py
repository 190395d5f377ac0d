"""A round in Markdown: rewards, held-out result, the fixed cases, worst samples, and where to look
next."""

import base64
import io
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from calligrapher.tables.parquet import read_shard, read_table
from calligrapher.tables.schema import SCORE_COLUMNS
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import evaluation_name, round_name
from tasks.tracking.journal import METRICS_FILE, REPORT, whole_lines
from tasks.tracking.pointer import read_pointer

WORST = 5
_WIDTH = 768  # of the picture in the report, in pixels
_FIXED = {*SCORE_COLUMNS.names}
_SHOWN = {
    "score": (
        "reward_mean",
        "reward_std",
        "reward_p10",
        "reward_p50",
        "reward_p90",
        "ocr_accuracy_mean",
        "exact_match",
        "unscored",
    ),
    "advantage": ("zero_spread_share", "kept_share"),
    "update": ("loss", "kl", "approx_kl", "clip_fraction", "old_distance", "grad_norm"),
    "evaluate": ("ocr_accuracy", "ocr_accuracy_low", "ocr_accuracy_high", "exact_match"),
}


def round_report(run: Path, round: int) -> str:
    """The report of a finished round of the run in the folder `run`.

    Prefect serves it over HTTP, and no browser follows a link from there to a file. So the picture
    of the fixed cases is part of the text, MLflow's pages are links, and files are named by their
    paths.
    """
    run = run.absolute()
    folder, report = run / round_name(round), run / REPORT
    grid = report / "grid" / f"{round + 1:06d}.png"
    parts = [f"## Round {round} of {run.name}", _table(_metrics(run, round))]
    if grid.is_file():
        parts += ["### The fixed cases after this round", _picture(grid)]
    parts += ["### Worst samples", _worst(folder), "### Where to look"]
    paths = {
        "Fixed cases": grid,
        "Best and worst samples": report / "best_and_worst" / f"{round:06d}.png",
        "Artifacts": folder,
    }
    parts.append(
        _links(mlflow_page(run), {title: path for title, path in paths.items() if path.exists()})
    )
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
    for record in whole_lines(run / METRICS_FILE):
        if record["stage"] in stages:
            found |= {key: value for key, value in record["metrics"].items() if value is not None}
    return found


def _table(metrics: dict[str, float]) -> str:
    names = [f"{stage}/{name}" for stage, names in _SHOWN.items() for name in names]
    # Of the components that a run's own scorers measure, the means.
    further = [n for n in metrics if n.startswith("score/") and n.endswith("_mean")]
    names += [name for name in further if name.removesuffix("_mean")[6:] not in _FIXED]
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
            f"| {rows['sample_id'][i]} | {_cell(rows['text'][i])} | {read} |"
            f" {rows['reward'][i]:.3f} |"
        )
    return "\n".join(lines)


def _cell(text: str) -> str:
    """Text in a table's cell as it is: what a model painted must not become markup."""
    return (
        "`" + text.replace("`", "'").replace("|", "¦").replace("\n", " ") + "`"
        if text
        else "(nothing)"
    )


def _picture(path: Path) -> str:
    """The picture itself, small enough for a report of every round (30 KB for the tiny model)."""
    small = io.BytesIO()
    with Image.open(path) as image:
        image.thumbnail((_WIDTH, _WIDTH))
        image.convert("RGB").save(small, "JPEG", quality=85)
    return f"![{path.stem}](data:image/jpeg;base64,{base64.b64encode(small.getvalue()).decode()})"


def _links(page: str | None, paths: Mapping[str, Path]) -> str:
    shown = {
        "run": page,
        "charts, pictures by round": f"{page}/model-metrics",
        "files": f"{page}/artifacts",
    }
    links = ", ".join(f"[{name}]({address})" for name, address in shown.items())
    lines = [f"- MLflow: {links if page else 'no server'}"]
    return "\n".join(lines + [f"- {title}: `{path}`" for title, path in paths.items()])
