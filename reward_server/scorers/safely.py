"""Runs a scorer so that nothing it does is fatal, and nothing it gives is a number by mistake."""

import logging
from collections.abc import Sequence
from dataclasses import replace

from reward_server.components import FACTORS, LOWEST
from reward_server.scorers.base import (
    Item,
    Outcome,
    Scorer,
    ScorerUnavailableError,
    failed,
    probe_item,
)

_LOWEST = LOWEST | dict.fromkeys(FACTORS, 0.0)
log = logging.getLogger(__name__)


def score_safely(scorer: Scorer, items: Sequence[Item]) -> list[Outcome]:
    """Return the outcomes of a batch, order kept.

    When the batch raises, each item is tried alone, so that one bad item fails only itself.
    """
    try:
        outcomes = scorer.score_items(items)
        assert len(outcomes) == len(items), (
            f"{scorer.name} gave {len(outcomes)} outcomes for {len(items)} items"
        )
        return [checked(outcome) for outcome in outcomes]
    except ScorerUnavailableError as error:
        return [
            failed(scorer.fields, f"{scorer.name} is unavailable: {error}", "unavailable")
        ] * len(items)
    except Exception as error:
        if len(items) > 1:
            return [score_safely(scorer, [item])[0] for item in items]
        log.exception("%s failed on an item", scorer.name)
        return [failed(scorer.fields, f"{type(error).__name__}: {error}", "exception")]


def checked(outcome: Outcome) -> Outcome:
    """Return the outcome with each number outside its range (NaN is) turned into an error."""
    bad = {
        field: f"the scorer gave {value}, which is no number in {_LOWEST[field]:g}..1"
        for field, value in outcome.values.items()
        if field in _LOWEST and not _LOWEST[field] <= value <= 1
    }
    if not bad:
        return outcome
    values = {field: value for field, value in outcome.values.items() if field not in bad}
    kinds = {**outcome.kinds, **dict.fromkeys(bad, "no_number")}
    errors = {**outcome.errors, **bad}
    return replace(outcome, values=values, errors=errors, kinds=kinds)


def probe(scorer: Scorer) -> Outcome:
    """Return the outcome of a picture that every working scorer can score."""
    return score_safely(scorer, [probe_item()])[0]
