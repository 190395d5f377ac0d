"""An evaluation for people: the table of a verdict in Markdown, and pictures before and after."""

from pathlib import Path

from calligrapher.durable import atomic_path
from tasks.artifacts.artifact import Artifact
from tasks.evaluation.evaluation import BASE, Evaluation
from tasks.evaluation.measures import MEASURED
from tasks.evaluation.verdict import Verdict
from tasks.reports.round_pictures import before_and_after

_UNITS = {
    "background_error": "background error, grey levels",
    "background_psnr": "background PSNR, dB",
    "spread": "spread within a case",
}


def verdict_report(verdict: Verdict, sheet: Path) -> str:
    """Each metric with its 95 % interval, and the differences to the earlier checkpoints."""
    others = list(verdict.minus)
    lines = [f"## {verdict.run}, {verdict.checkpoint}", ""]
    if verdict.reward_hacking:
        fallen = ", ".join(verdict.reward_hacking)
        lines += [
            f"**The reward rises while these fall, for certain: {fallen}.** Look at the pictures.",
            "",
        ]
    if verdict.champion:
        lines += ["The best checkpoint of this run so far (`champion`).", ""]
    lines.append(
        "| metric | mean [95 % interval] |" + "".join(f" minus {name} |" for name in others)
    )
    lines.append("|---|---|" + "---|" * len(others))
    further = [n for n in verdict.metrics if f"{n}_low" in verdict.metrics and n not in MEASURED]
    for name in (*MEASURED, *further):
        cells = [
            _interval(verdict.metrics, name),
            *(_interval(verdict.minus[o], name) for o in others),
        ]
        lines.append(f"| {_UNITS.get(name, name.replace('_', ' '))} | " + " | ".join(cells) + " |")
    counts = f"{verdict.metrics['images']} images, {verdict.metrics['unscored']} unscored."
    return "\n".join(
        [*lines, "", f"{counts} Pictures: [{sheet.name}]({sheet.absolute().as_uri()})", ""]
    )


def picture(
    this: Evaluation, verdict: Verdict, measured: Artifact, others: dict[str, Artifact]
) -> Path:
    """Draw the first cases under the base and under this checkpoint; return the file."""
    settings = this.resources.params.evaluate
    cases = this.resources.cases.evaluation[: settings.grid_cases]
    sheet = before_and_after(
        cases, others[BASE], measured, images_per_case=settings.num_images_per_case
    )
    path = this.folder.path / "verdicts" / f"{verdict.checkpoint}.png"
    with atomic_path(path) as temporary:
        sheet.save(temporary, "PNG")
    return path


def _interval(found: dict[str, float], name: str) -> str:
    if name not in found:
        return (
            "untouched"
            if found.get("background_error_high") == 0 and "psnr" in name
            else "not measured"
        )
    return f"{found[name]:.3f} [{found[f'{name}_low']:.3f}, {found[f'{name}_high']:.3f}]"
