"""Labelled pictures of text in scenes: which are scored as a person would, kind by kind.

A folder holds `cases.json`, a list of `{id, kind, verdict: right | wrong, target, ...}`, and for
each `ID.jpg` (or `.png`) and `ID.mask.png`, white where the text was to be painted.
"""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from reward_server.scorers.base import Item, Outcome
from reward_server.scorers.ocr.scorer import OCRScorer
from reward_server.text import Match, normalise

_GOOD = 0.9  # a right picture scores at least this much


def cases(folder: Path, threads: int, mode: str = "auto") -> dict[str, Any]:
    """Score a folder of labelled pictures; returns shares per kind and in all.

    `right_below_0.9` is a share of the right pictures that have a number, case and spaces aside;
    `wrong_at_1.0` of the wrong ones, case and spaces counted (`loose` beside it: not counted).
    `no_number`: how many were null. `likelihood_ordered`: of all pairs of a right and a wrong
    picture of one target, how many have the right one above. Raises ValueError for another layout.
    """
    labelled = load(folder)
    scorer = OCRScorer(num_threads=threads, mode=mode)
    items = [item_of(folder, case) for case in labelled]
    found = {
        match: _scored(scorer, [replace(item, match=match) for item in items], threads)
        for match in get_args(Match)
    }
    scorer.close()
    kinds = dict.fromkeys(case["kind"] for case in labelled)
    table = {}
    for kind in kinds:
        places = [place for place, case in enumerate(labelled) if case["kind"] == kind]
        table[kind] = _shares(labelled, found, places)
    return {
        "pictures": len(labelled),
        "all": _shares(labelled, found, range(len(labelled))),
        "likelihood_ordered": {match: _ordered(labelled, found[match]) for match in found},
        "kinds": table,
    }


def load(folder: Path) -> list[dict[str, Any]]:
    """Return the cases of a folder. Raises ValueError when it is none of labelled pictures."""
    listing = folder / "cases.json"
    if not listing.is_file():
        raise ValueError(f"the folder must hold cases.json. Got {folder}, which does not.")
    labelled = json.loads(listing.read_text(encoding="utf-8"))
    for case in labelled:
        if not {"id", "kind", "verdict", "target"} <= set(case) or case["verdict"] not in (
            "right",
            "wrong",
        ):
            raise ValueError(
                "a case must have id, kind, target and a verdict right or wrong. Got"
                f" {json.dumps(case, ensure_ascii=False)[:200]}."
            )
    return labelled


def item_of(folder: Path, case: Mapping[str, Any]) -> Item:
    """Return one case as scorers see it."""
    pictures = [folder / f"{case['id']}{ending}" for ending in (".jpg", ".png")]
    image = np.asarray(Image.open(next(p for p in pictures if p.is_file())).convert("RGB"))
    mask = np.asarray(Image.open(folder / f"{case['id']}.mask.png").convert("L")) >= 128
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    crop = image[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    return Item(image=image, crop=crop, text=case["target"], mask=mask)


def _scored(scorer: OCRScorer, items: Sequence[Item], threads: int) -> list[Outcome]:
    with ThreadPoolExecutor(threads) as pool:
        return list(pool.map(lambda item: scorer.score_items([item])[0], items))


def _shares(
    labelled: Sequence[Mapping], found: Mapping[str, list[Outcome]], places: Sequence[int]
) -> dict[str, Any]:
    def accuracies(verdict: str, match: str) -> list[float]:
        return [
            found[match][place].values["ocr_accuracy"]
            for place in places
            if labelled[place]["verdict"] == verdict
            and "ocr_accuracy" in found[match][place].values
        ]

    shares: dict[str, Any] = {}
    right, wrong = accuracies("right", "loose"), accuracies("wrong", "exact")
    if right:
        shares |= {
            "right": len(right),
            "right_below_0.9": float(np.mean([one < _GOOD for one in right])),
            "mean_right": float(np.mean(right)),
        }
    if wrong:
        loose = accuracies("wrong", "loose")
        shares |= {
            "wrong": len(wrong),
            "wrong_at_1.0": float(np.mean([one == 1 for one in wrong])),
            "wrong_at_1.0_loose": float(np.mean([one == 1 for one in loose])),
        }
    return shares | {"no_number": len(places) - len(right) - len(wrong)}


def _ordered(labelled: Sequence[Mapping], outcomes: Sequence[Outcome]) -> dict[str, float | int]:
    """Of pairs of one target: how many have the right picture's likelihood above the other's."""
    by_target: dict[str, dict[str, list[float]]] = {}
    for case, outcome in zip(labelled, outcomes, strict=True):
        if "ocr_likelihood" in outcome.values:
            of_target = by_target.setdefault(normalise(case["target"]), {"right": [], "wrong": []})
            of_target[case["verdict"]].append(outcome.values["ocr_likelihood"])
    pairs = [
        right > wrong
        for found in by_target.values()
        for right in found["right"]
        for wrong in found["wrong"]
    ]
    return {"pairs": len(pairs), "share": float(np.mean(pairs)) if pairs else float("nan")}
