"""What an evaluation means: is the checkpoint the best so far, and is the reward being gamed?"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calligrapher.durable import atomic_write

CHAMPION = "champion.json"
# What must not fall while the reward rises. The background's error counts the other way round.
HELD_OUT = ("ocr_accuracy", "second_ocr_accuracy", "style_match")
UNTOUCHED = "background_error"
_NOTICEABLE = 0.5  # grey levels of 255
_LEAST_FALL = 0.005  # of a share: less is certain now and then, and means nothing


@dataclass(frozen=True)
class Verdict:
    """What the evaluation of a checkpoint says; the contents of `verdicts/CHECKPOINT.json`.

    Example: `Verdict(run="first", checkpoint="round-0003", digest="5f0c...", champion=True,
    reward_hacking=[], metrics={"style_match": 0.71, "style_match_low": 0.68, ...},
    minus={"base": {"style_match": 0.02, "style_match_low": -0.01, ...}, "warmup": {...}})`
    """

    run: str
    checkpoint: str
    digest: str  # of the checkpoint
    champion: bool  # the best of the run so far
    reward_hacking: list[str]  # what falls while the reward rises, as `style_match since base`
    metrics: dict[str, float]  # each with its `_low` and `_high`
    minus: dict[str, dict[str, float]]  # by earlier checkpoint: this one minus it, as `metrics`

    def write(self, folder: Path) -> None:
        """Write `CHECKPOINT.json` to `folder`."""
        folder.mkdir(exist_ok=True)
        text = json.dumps(asdict(self), indent=1) + "\n"
        atomic_write(folder / f"{self.checkpoint}.json", text.encode())


def reward_hacking(
    differences: Mapping[str, Mapping[str, float]], training_rewards: Sequence[float]
) -> list[str]:
    """The held-out metrics that fall for certain while the reward rises; empty when all is well.

    differences: name of an earlier checkpoint -> this minus it (`measures.differences`). A metric
    falls when its whole 95 % interval lies below -0.005. training_rewards: mean reward of each
    round so far.
    """
    found = []
    for other, by in differences.items():
        if by.get("reward_low", 0) > 0 or rises(training_rewards):
            falls = [name for name in HELD_OUT if by.get(f"{name}_high", 0) < -_LEAST_FALL]
            falls += [UNTOUCHED] if by.get(f"{UNTOUCHED}_low", 0) > _NOTICEABLE else []
            found += [f"{name} since {other}" for name in falls]
    return found


def rises(rewards: Sequence[float]) -> bool:
    """Whether the last third lies above the first by more than two standard errors of their
    difference."""
    third = len(rewards) // 3
    if third < 2:
        return False
    first, last = np.array(rewards[:third]), np.array(rewards[-third:])
    error = np.sqrt((first.var(ddof=1) + last.var(ddof=1)) / third)
    return bool(last.mean() - first.mean() > 2 * error)


def champion(folder: Path) -> str | None:
    """The best checkpoint so far of the evaluations in `folder`."""
    path = folder / CHAMPION
    return json.loads(path.read_bytes())["checkpoint"] if path.is_file() else None


def mark_champion(
    folder: Path, checkpoint: str, metrics: Mapping[str, float], alarm: Sequence[str]
) -> bool:
    """Make `checkpoint` the champion if it reads best and raised no alarm; whether it is the
    champion now.

    Best: the highest mean of the OCR accuracies measured, so that pleasing one engine alone does
    not win.
    """
    names = [name for name in ("ocr_accuracy", "second_ocr_accuracy") if name in metrics]
    if alarm or not names:
        return False
    score = float(np.mean([metrics[name] for name in names]))
    path = folder / CHAMPION
    best: dict[str, Any] = json.loads(path.read_bytes()) if path.is_file() else {}
    if best and best["checkpoint"] != checkpoint and best["score"] >= score:
        return False
    atomic_write(path, json.dumps({"checkpoint": checkpoint, "score": score}).encode())
    return True
