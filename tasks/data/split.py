"""Splits a dataset into training and held-out cases by a hash: the same ones, whatever is added."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from calligrapher.data.case import Case
from calligrapher.durable import atomic_write
from calligrapher.errors import DataError
from tasks.artifacts.digests import file_sha256

By = Literal["text", "source", "case_id"]
TRAIN, EVALUATION = "train.jsonl", "evaluation.jsonl"
_KEYS: dict[str, Callable[[Case], str]] = {
    "text": lambda case: case.text,
    "source": lambda case: file_sha256(case.source),
    "case_id": lambda case: case.case_id,
}
WAYS = get_args(By)


@dataclass(frozen=True)
class Split:
    """The two lists that were written, and how many cases each has."""

    train: str
    evaluation: str
    train_cases: int
    evaluation_cases: int

    def text(self) -> str:
        return (
            f"{self.train_cases} cases to train on are in {self.train}, {self.evaluation_cases}"
            f" held out in {self.evaluation}."
        )


def is_held_out(key: str, share: float) -> bool:
    """Return whether what has this key is held out; `share` of all keys are, 0 to 1."""
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8]) < share * 2**64


def split_cases(cases: Sequence[Case], out: Path, *, share: float, by: By = "text") -> Split:
    """Write `train.jsonl` and `evaluation.jsonl` into `out`; they name the pictures where they lie.

    by: cases that share it (their text, the bytes of their source, their id) are on one side.
    Raises DataError where one side would be empty, or a list is there already.
    """
    sides: dict[str, list[Case]] = {TRAIN: [], EVALUATION: []}
    for case in cases:
        sides[EVALUATION if is_held_out(_KEYS[by](case), share) else TRAIN].append(case)
    if empty := [name for name, chosen in sides.items() if not chosen]:
        raise DataError(
            f"Both lists must have cases. {empty[0]} would have none of {len(cases)}: name another"
            f" --held-out than {share:g}, or another --by than {by}."
        )
    if there := [str(out / name) for name in sides if (out / name).exists()]:
        raise DataError(f"{', '.join(there)} must not be there yet. Name another folder.")
    out.mkdir(parents=True, exist_ok=True)
    for name, chosen in sides.items():
        lines = [json.dumps(_record(case, out), ensure_ascii=False) + "\n" for case in chosen]
        atomic_write(out / name, "".join(lines).encode())
    return Split(str(out / TRAIN), str(out / EVALUATION), len(sides[TRAIN]), len(sides[EVALUATION]))


def _record(case: Case, folder: Path) -> dict[str, str]:
    record = {"case_id": case.case_id, "text": case.text}
    for role in ("source", "mask", "reference", "target"):
        if (path := getattr(case, role)) is not None:
            record[role] = os.path.relpath(path, folder)
    return record | ({"ocr_match": case.ocr_match} if case.ocr_match else {})
