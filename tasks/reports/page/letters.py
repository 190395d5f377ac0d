"""Which letters a run spells badly: how likely the OCR found each of them, at first and now."""

from collections import defaultdict
from collections.abc import Sequence

from calligrapher.tables.parquet import read_table
from calligrapher.tables.schema import LETTER_SCORES
from reward_server.text import normalise, normalise_exact, picture_order
from tasks.reports.page.elements import Html, el, joined, number, table
from tasks.reports.page.facts import RunFacts

ROUNDS, LETTERS = 5, 60  # at either end of the run, at most; in the table


def letters(facts: RunFacts) -> Html | None:
    """Return a table of the letters of the training texts, the unlikeliest first.

    None where letters were not asked about (`advantage.per_letter`).
    """
    rounds = sorted(facts.scored)
    count = min(ROUNDS, len(rounds) // 2)
    first, last = _found(facts, rounds[:count]), _found(facts, rounds[-max(count, 1) :])
    if not last:
        return None

    def mean(values: Sequence[float] | None) -> float | None:
        return sum(values) / len(values) if values else None

    rows = [
        (letter, number(mean(first.get(letter))), number(mean(values)), len(values))
        for letter, values in sorted(last.items(), key=lambda item: mean(item[1]))
    ]
    told = (
        "How likely the OCR found each letter of the training images in the first rounds and in"
        f" the last ({max(count, 1)} each), and in how many places of these; small letters stand"
        " for both where case does not count. rollout.letter_weights lets texts with some letters"
        " come more often."
    )
    if len(rows) > LETTERS:
        told += f" The {LETTERS} unlikeliest of {len(rows)}."
    head = ("letter", "at first", "now", "places")
    return joined([el("p", told, class_="quiet"), table(head, rows[:LETTERS], numbers=3)])


def _found(facts: RunFacts, rounds: Sequence[int]) -> dict[str, list[float]]:
    """Letter, as it counts -> its likelihoods in the images of `rounds`."""
    found: dict[str, list[float]] = defaultdict(list)
    for index in rounds:
        texts = {row["sample_id"]: row["text"] for row in facts.scored[index]}
        for path in facts.score_tables(index):
            scores = read_table(path)
            told = scores.get(LETTER_SCORES.name) or [None] * len(scores["sample_id"])
            for sample_id, own in zip(scores["sample_id"], told, strict=True):
                spelled = _spelled(facts, texts[sample_id], len(own or ()))
                for letter, one in zip(spelled, own or (), strict=False):
                    found[letter].append(one["likelihood"])
    return found


def _spelled(facts: RunFacts, text: str, count: int) -> str:
    """Return the `count` letters of a text that were asked about, in the order of the picture.

    Whether case and spaces counted is the run's word or the case's own: the number tells. "" where
    neither way has as many.
    """
    ways = [normalise, normalise_exact]
    if facts.params.reward.ocr_match == "exact":
        ways.reverse()
    spelled = [way(picture_order(text)) for way in ways]
    return next((letters for letters in spelled if len(letters) == count), "")
