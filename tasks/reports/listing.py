"""All runs of a folder, one line each: what they are, how far they are, what they reached."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict

from calligrapher.errors import CalligrapherError
from tasks.artifacts.layout import PARAMS
from tasks.reports.status import RunStatus, status


class RunLine(BaseModel):
    """A run in the list. accuracies: held-out, of its evaluations in order; problem: why its folder
    cannot be read."""

    model_config = ConfigDict(frozen=True)
    run: str
    state: str | None = None
    algorithm: str | None = None
    rounds: int | None = None
    rounds_done: int | None = None
    bytes: int = 0
    reward: float | None = None
    ocr_accuracy_before: float | None = None
    ocr_accuracy: float | None = None
    fork: str | None = None
    problem: str | None = None


def list_runs(runs_dir: Path) -> list[RunLine]:
    """Return a line for each run below `runs_dir`, by name. One that is broken hides no other."""
    folders = sorted(path.parent for path in runs_dir.glob(f"*/{PARAMS}"))
    return [_line(folder) for folder in folders]


def as_table(lines: list[RunLine], runs_dir: Path) -> str:
    """Return the list for a terminal."""
    if not lines:
        return f"{runs_dir} holds no run."
    rows = [("run", "state", "algorithm", "rounds", "reward", "accuracy", "size")]
    for line in lines:
        if line.problem:
            rows.append((line.run, "damaged", line.problem, "", "", "", ""))
            continue
        first, last = line.ocr_accuracy_before, line.ocr_accuracy
        rows.append(
            (
                line.run,
                line.state or "",
                line.algorithm or "",
                f"{line.rounds_done} of {line.rounds}",
                "" if line.reward is None else f"{line.reward:.3f}",
                "" if first is None or last is None else f"{first:.3f} -> {last:.3f}",
                f"{line.bytes / 1e6:.1f} MB",
            )
        )
    sound = [row for row in rows if row[1] != "damaged"]
    widths = [max(len(row[column]) for row in sound) for column in range(len(rows[0]))]
    widths[0] = max(len(row[0]) for row in rows)
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)


def _line(folder: Path) -> RunLine:
    try:
        found = status(folder)
    except (CalligrapherError, OSError, ValueError) as error:
        return RunLine(run=folder.name, problem=" ".join(str(error).split()))
    accuracies = [s.ocr_accuracy for s in found.stages if s.ocr_accuracy is not None]
    return RunLine(
        **found.model_dump(include={"run", "state", "algorithm", "rounds", "rounds_done", "fork"}),
        bytes=found.bytes,
        reward=_last_reward(found),
        ocr_accuracy_before=accuracies[0] if accuracies else None,
        ocr_accuracy=accuracies[-1] if accuracies else None,
    )


def _last_reward(found: RunStatus) -> float | None:
    rewards = [stage.reward for stage in found.stages if stage.reward is not None]
    return rewards[-1] if rewards else None
