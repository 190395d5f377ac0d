"""Which letters a run spells badly: how likely the OCR found each of them, at first and now."""

from collections import defaultdict
from collections.abc import Sequence

from calligrapher.tables.parquet import read_table
from calligrapher.tables.schema import LETTER_SCORES
from reward_server.text import normalise, normalise_exact, picture_order
from tasks.reports.page.elements import Html, el, joined, number, table
from tasks.reports.page.facts import RunFacts

ROUNDS = 5  # at either end of the run


def letters(facts: RunFacts) -> Html | None:
    """Return a table of the letters of the training texts, the unlikeliest first.

    None where letters were not asked about (`advantage.per_letter`).
    """
    rounds = sorted(facts.scored)
    first, last = (_found(facts, some) for some in (rounds[:ROUNDS], rounds[-ROUNDS:]))
    if not last:
        return None

    def mean(values: Sequence[float] | None) -> float | None:
        return sum(values) / len(values) if values else None

    rows = [
        (letter, len(values), number(mean(first.get(letter))), number(mean(values)))
        for letter, values in sorted(last.items(), key=lambda item: mean(item[1]))
    ]
    told = (
        f"How likely the OCR found each letter of the training images, over the first {ROUNDS} and"
        f" the last {ROUNDS} rounds; small where case does not count. rollout.letter_weights lets"
        " texts with some letters come more often."
    )
    head = ("letter", "seen", "at first", "now")
    return joined([el("p", told, class_="quiet"), table(head, rows, numbers=3)])


def _found(facts: RunFacts, rounds: Sequence[int]) -> dict[str, list[float]]:
    """Letter, as it counts -> its likelihoods in the images of `rounds`."""
    found: dict[str, list[float]] = defaultdict(list)
    exact = facts.params.reward.ocr_match == "exact"
    for index in rounds:
        rows = {row["sample_id"]: row for row in facts.scored[index]}
        for path in facts.score_tables(index):
            scores = read_table(path)
            for sample_id, own in zip(
                scores["sample_id"], scores.get(LETTER_SCORES.name, []), strict=False
            ):
                text = rows[sample_id]["text"]
                counted = picture_order((normalise_exact if exact else normalise)(text))
                if own and len(own) == len(counted):
                    for letter, one in zip(counted, own, strict=True):
                        found[letter].append(one["likelihood"])
    return found
