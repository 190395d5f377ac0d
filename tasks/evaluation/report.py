"""An evaluation for people: the table of a verdict in Markdown, and pictures before and after."""

from pathlib import Path
from typing import Any

from calligrapher.data.images import load_rgb
from calligrapher.durable import atomic_path
from calligrapher.tables.parquet import decode_png, read_shard, read_table
from tasks.artifacts.artifact import Artifact
from tasks.evaluation.evaluation import BASE, Evaluation
from tasks.evaluation.measures import METRICS
from tasks.pictures import grids as report
from tasks.stages.evaluate import IMAGES, SCORES

_UNITS = {
    "background_error": "background error, grey levels",
    "background_psnr": "background PSNR, dB",
    "spread": "spread within a case",
}


def verdict_report(verdict: dict[str, Any], sheet: Path) -> str:
    """Each metric with its 95 % interval, and the differences to the earlier checkpoints."""
    others = list(verdict["minus"])
    lines = [f"## {verdict['run']}, {verdict['checkpoint']}", ""]
    if verdict["reward_hacking"]:
        fallen = ", ".join(verdict["reward_hacking"])
        lines += [
            f"**The reward rises while these fall, for certain: {fallen}.** Look at the pictures.",
            "",
        ]
    if verdict["champion"]:
        lines += ["The best checkpoint of this run so far (`champion`).", ""]
    lines.append(
        "| metric | mean [95 % interval] |" + "".join(f" minus {name} |" for name in others)
    )
    lines.append("|---|---|" + "---|" * len(others))
    for name in METRICS:
        cells = [
            _interval(verdict["metrics"], name),
            *(_interval(verdict["minus"][o], name) for o in others),
        ]
        lines.append(f"| {_UNITS.get(name, name.replace('_', ' '))} | " + " | ".join(cells) + " |")
    counts = f"{verdict['metrics']['images']} images, {verdict['metrics']['unscored']} unscored."
    return "\n".join(
        [*lines, "", f"{counts} Pictures: [{sheet.name}]({sheet.absolute().as_uri()})", ""]
    )


def picture(
    this: Evaluation, verdict: dict[str, Any], made: Artifact, others: dict[str, Artifact]
) -> Path:
    """The first cases under the base and under this checkpoint, each with what was read."""
    settings = this.bench.params.evaluate
    cases = this.resources.cases.evaluation[: settings.grid_cases]
    sources = [load_rgb(case.source) for case in cases]
    references = [load_rgb(case.reference) for case in cases]
    step = settings.num_images_per_case
    sides = [_samples(artifact, len(cases), step) for artifact in (others[BASE], made)]
    path = this.folder.path / "verdicts" / f"{verdict['checkpoint']}.png"
    with atomic_path(path) as temporary:
        report.before_after(sources, references, *sides).save(temporary, "PNG")
    return path


def _samples(made: Artifact, count: int, step: int) -> list[report.CaptionedImage]:
    rows = read_shard(made.file(IMAGES), ["image", "text"])
    rows |= read_table(made.file(SCORES), ["ocr_text", "reward"])
    return [
        report.CaptionedImage(
            decode_png(rows["image"][i]), rows["text"][i], rows["ocr_text"][i], rows["reward"][i]
        )
        for i in range(0, count * step, step)
    ]


def _interval(found: dict[str, float], name: str) -> str:
    if name not in found:
        return (
            "untouched"
            if found.get("background_error_high") == 0 and "psnr" in name
            else "not measured"
        )
    return f"{found[name]:.3f} [{found[f'{name}_low']:.3f}, {found[f'{name}_high']:.3f}]"
