"""Runs a scorer so that nothing it does is fatal, and nothing it gives is a number by mistake."""

import logging
from collections.abc import Sequence

from reward_server.scorers.base import (
    Item,
    Outcome,
    Scorer,
    ScorerUnavailableError,
    failed,
    probe_item,
)
from reward_server.service.schema import lowest

log = logging.getLogger(__name__)


def score_safely(scorer: Scorer, items: Sequence[Item]) -> list[Outcome]:
    """Outcomes of a batch; when it raises, each item is tried alone, so one bad item fails only
    itself."""
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
    """The outcome with each number that lies outside its field's range (NaN does) turned into an
    error."""
    bad = {
        field: f"the scorer gave {value}, which is no number in {lowest(field):g}..1"
        for field, value in outcome.values.items()
        if not isinstance(value, str) and not lowest(field) <= value <= 1
    }
    if not bad:
        return outcome
    values = {field: value for field, value in outcome.values.items() if field not in bad}
    return Outcome(values, {**outcome.errors, **bad}, "no_number")


def probe(scorer: Scorer) -> Outcome:
    """The outcome of a picture that every scorer can score; an error in it means that the scorer
    cannot."""
    return score_safely(scorer, [probe_item()])[0]
