"""The part of a report that shows pictures: before and after, the grid over the rounds, best and
worst samples; and which groups taught nothing."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from calligrapher.data.case import Case
from calligrapher.data.images import load_rgb
from calligrapher.errors import CalligrapherError
from calligrapher.rl.advantage import zero_spread
from calligrapher.tables.parquet import decode_png, read_shard, read_table
from tasks.artifacts.artifact import Artifact
from tasks.pictures.grids import CaptionedImage, open_picture, reward_label
from tasks.pictures.sheets import GOOD, MUTED
from tasks.reports.page.charts import histogram
from tasks.reports.page.elements import Html, el, frames, joined, picture, table
from tasks.reports.page.facts import RunFacts
from tasks.resources.cases import Cases
from tasks.stages import evaluate
from tasks.tracking.journal import REPORT

CASES, SAMPLES, FRAMES, HISTOGRAMS, GROUPS = 8, 6, 24, 24, 12
_SIDE, _GRID_SIDE = 320, 960  # pixels of a picture in the file, at most


def evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` of `items`; the first and the last are among them."""
    if len(items) <= most:
        return list(items)
    return [items[round(i * (len(items) - 1) / (most - 1))] for i in range(most)]


def case_samples(facts: RunFacts, shown: Artifact) -> dict[str, CaptionedImage]:
    """Return case id -> the first image of each of the first cases of an evaluation."""
    rows = read_shard(shown.file(evaluate.IMAGES), ["case_id", "image", "text"])
    rows |= read_table(shown.file(evaluate.SCORES), ["ocr_text", "reward"])
    firsts: dict[str, int] = {}
    for i, case_id in enumerate(rows["case_id"]):
        firsts.setdefault(case_id, i)
    return {
        case_id: CaptionedImage(
            decode_png(rows["image"][i]), rows["text"][i], rows["ocr_text"][i], rows["reward"][i]
        )
        for case_id, i in islice(firsts.items(), CASES)
    }


def held_out_cases(facts: RunFacts) -> dict[str, Case]:
    """Return the held-out cases by their ids; {} where their files are not on this machine."""
    try:
        cases = Cases(facts.params, facts.folder.resolve().parent / "data").evaluation
    except (CalligrapherError, OSError):
        return {}
    return {case.case_id: case for case in cases}


def side_by_side(
    cases: Mapping[str, Case], columns: Mapping[str, Mapping[str, CaptionedImage]]
) -> Html:
    """Return a row for each case: its reference, source and target, then what each column made of
    it; a column is title -> its samples by case id."""
    ids = [
        i for i in next(iter(columns.values())) if all(i in column for column in columns.values())
    ]
    rows = []
    for case_id in ids:
        case = cases.get(case_id)
        given = {}
        if case is not None:
            given = {"style reference": case.reference, "source": case.source}
            given |= {"target": case.target} if case.target else {}
        cells = [_figure(title, _loaded(path)) for title, path in given.items()]
        for title, samples in columns.items():
            sample = samples[case_id]
            cells.append(_figure(title, sample.image, reading(sample)))
        text = next(iter(columns.values()))[case_id].text
        rows.append(el("section", el("h4", text), el("div", *cells, class_="row"), class_="case"))
    return joined(rows)


def before_and_after(facts: RunFacts) -> Html:
    """Return the fixed cases before the first round and after the last that shows them."""
    shown = facts.shown_cases
    if not shown:
        return _none("The run has not evaluated yet, or never does (evaluate.every is 0).")
    first, last = min(shown), max(shown)
    columns = {_after(n): case_samples(facts, shown[n]) for n in sorted({first, last})}
    cases = held_out_cases(facts)
    note = None if cases else _none("The cases' own pictures are not on this machine.")
    return joined([note, side_by_side(cases, columns)])


def grids(facts: RunFacts) -> Html:
    """Return the grid of the fixed cases after each round, with a slider."""
    paths = sorted((facts.folder / REPORT / "grid").glob("*.png"))
    if not paths:
        return _none("There is no grid yet.")
    return frames(
        "grid",
        [
            (_after(int(path.stem)), picture(open_picture(path), "", _GRID_SIDE))
            for path in evenly(paths, FRAMES)
        ],
    )


def best_and_worst(facts: RunFacts) -> Html:
    """Return the images of the newest scored round with the highest and the lowest rewards."""
    if not facts.scored:
        return _none("No round was scored yet.")
    round_index = max(facts.scored)
    rows = facts.scored[round_index]
    ranked = sorted((r for r in rows if r["reward"] is not None), key=lambda r: r["reward"])
    unscored = [row for row in rows if row["reward"] is None]
    parts = {
        "Highest rewards": ranked[: -SAMPLES - 1 : -1],
        "Lowest rewards": ranked[:SAMPLES],
        "Without a reward": unscored[:SAMPLES],
    }
    return joined(
        joined(
            [
                el("h4", f"{title}, round {round_index}"),
                el("div", *map(_sampled, part), class_="row"),
            ]
        )
        for title, part in parts.items()
        if part
    )


def histograms(facts: RunFacts) -> Html:
    """Return the rewards of the rounds, all on one scale."""
    rewards = {
        i: [row["reward"] for row in rows if row["reward"] is not None]
        for i, rows in facts.scored.items()
    }
    every = [reward for values in rewards.values() for reward in values]
    if not every:
        return _none("No image has a reward yet.")
    low, high = min(0.0, *every), max(facts.highest_reward, *every)
    shown = evenly(sorted(rewards), HISTOGRAMS)
    return el(
        "div",
        *(histogram(f"round {i}", rewards[i], low, high) for i in shown),
        class_="charts small",
    )


def groups_without_spread(facts: RunFacts) -> Html:
    """Return which texts' groups had equal rewards, in how many rounds, and what the rewards were.

    Such a group teaches nothing: nobody did better than the others.
    """
    found: dict[str, list[tuple[int, float]]] = defaultdict(list)
    groups: Counter[int] = Counter()
    for round_index, rows in facts.scored.items():
        members = defaultdict(list)
        for row in rows:
            if row["reward"] is not None:
                members[row["sample_id"].rpartition("-")[0]].append(row)
        for group in members.values():
            rewards = [row["reward"] for row in group]
            if len(rewards) > 1:
                groups[round_index] += 1
                if zero_spread(torch.tensor([rewards], dtype=torch.float64)):
                    found[group[0]["text"]].append((round_index, rewards[0]))
    if not found:
        return _none("None: in every group some image did better than another.")
    stuck = sorted(found.items(), key=lambda item: (-len(item[1]), item[0]))
    total = sum(len(where) for where in found.values())
    rows = [
        (
            text,
            ", ".join(f"{reward:.3g}" for reward in dict.fromkeys(r for _, r in where)),
            ", ".join(str(i) for i, _ in where[-8:]),
            len(where),
        )
        for text, where in stuck[:GROUPS]
    ]
    more = f" The {GROUPS} most frequent texts:" if len(stuck) > GROUPS else ""
    said = f"{total} of {groups.total()} groups had equal rewards and so taught nothing.{more}"
    head = ("text", "reward of all its images", "newest rounds", "times")
    return joined([el("p", said), table(head, rows, numbers=1)])


def reading(sample: CaptionedImage) -> Html:
    """Return what was read, marked right or wrong as the reward compares, and the reward."""
    (span,) = sample.reading()
    kind = {GOOD: "right", MUTED: "quiet"}.get(span.colour, "wrong")
    return joined([el("b", span.text, class_=kind), " ", el("small", reward_label(sample.reward))])


def _sampled(row: Mapping[str, Any]) -> Html:
    png = read_shard(row["file"], ["image"])["image"][row["row"]]
    sample = CaptionedImage(decode_png(png), row["text"], row["ocr_text"], row["reward"])
    reason = el("small", row["reason"]) if row["reason"] else None
    return _figure(sample.text, sample.image, joined([reading(sample), reason]))


def _figure(title: str, image: Image.Image | None, below: Html | None = None) -> Html:
    shown = (
        el("p", "not on this machine", class_="quiet")
        if image is None
        else picture(image, title, _SIDE)
    )
    return el("figure", el("figcaption", title), shown, below)


def _loaded(path: Path) -> Image.Image | None:
    try:
        return load_rgb(path)
    except (CalligrapherError, OSError):
        return None


def _after(rounds: int) -> str:
    words = {0: "before training", 1: "after 1 round"}
    return words.get(rounds, f"after {rounds} rounds")


def _none(text: str) -> Html:
    return el("p", text, class_="quiet")
