"""What a command prints: a text for people or, with --json, the same for programs."""

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

from pydantic import BaseModel


def add_json(parser: argparse.ArgumentParser) -> None:
    """Add --json."""
    parser.add_argument("--json", action="store_true", help="for programs")


def show(found: Any, text: Callable[[], str], *, as_json: bool) -> None:
    """Print what was found: as JSON, or as `text()` says it."""
    print(as_text(found) if as_json else text())


def as_text(found: Any) -> str:
    """Return models, dataclasses and lists of them as JSON; a path is its text."""
    return json.dumps(_plain(found), indent=1, default=str)


def _plain(found: Any) -> Any:
    if isinstance(found, BaseModel):
        return found.model_dump(mode="json")
    if is_dataclass(found) and not isinstance(found, type):
        return {field.name: _plain(getattr(found, field.name)) for field in fields(found)}
    if isinstance(found, Mapping):  # a Counter among them, of which `asdict` makes pairs
        return {key: _plain(value) for key, value in found.items()}
    if isinstance(found, Sequence) and not isinstance(found, str):
        return [_plain(item) for item in found]
    return found
