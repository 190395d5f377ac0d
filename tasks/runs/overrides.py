"""Overrides that what is made could not heed."""

from collections.abc import Sequence

from calligrapher.errors import ParamsError

_OF_WHOLE_RUNS = ("rounds", "retention", "evaluate.every")


def refuse_idle(overrides: Sequence[str], stage: str) -> None:
    """Raise ParamsError if `overrides` are there, and all of what only a whole run heeds.

    Call it where `stage` alone is made and reads the same with them as without.
    """
    keys = [override.partition("=")[0].strip() for override in overrides]
    if keys and all(_is_of(key, _OF_WHOLE_RUNS) for key in keys):
        raise ParamsError(
            f"the overrides must change something that {stage} reads. No stage reads"
            f" {', '.join(keys)}: add --downstream, or leave it out."
        )


def refuse_others(overrides: Sequence[str], section: str) -> None:
    """Raise ParamsError unless all `overrides` are of `section`."""
    others = [o for o in overrides if not _is_of(o.partition("=")[0].strip(), (section,))]
    if others:
        raise ParamsError(
            f"a setting must be one of {section}, as nothing else is read. Got {', '.join(others)}."
        )


def _is_of(key: str, places: Sequence[str]) -> bool:
    """Whether a dotted key is one of `places` or below it."""
    return any(f"{key}.".startswith(f"{place}.") for place in places)
