"""Every key of a params file: its default, what it may be, what it means.

```
find_keys("nft.nft_beta")     # one key
find_keys("reward")           # a section
find_keys()                   # all
list(changed(params))         # [("rounds", 50, None), ("nft.nft_beta", 1.0, "0.5"), ...]
```
"""

from collections.abc import Iterator
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from calligrapher.errors import ParamsError
from tasks.params.errors import nearest, section_of, valid_keys
from tasks.params.run_params import RunParams

_KINDS = {int: "whole number", float: "number", bool: "true or false", str: "text"}


@dataclass(frozen=True)
class Key:
    """One key.

    Example: `Key("nft.nft_beta", "0.5", "number, more than 0, at most 1", "Mixing of ...")`.
    default: as it is written in a params file; None where a value must be given.
    """

    name: str
    default: str | None
    values: str
    meaning: str

    def text(self) -> str:
        """Two lines for a terminal."""
        default = "must be given" if self.default is None else f"default {self.default}"
        return f"{self.name}  ({self.values}; {default})\n    {self.meaning}"


def find_keys(name: str = "", root: type[BaseModel] = RunParams) -> list[Key]:
    """Return the key `name`, or all below the section `name`; without a name every key.

    Raises ParamsError, with the nearest keys, where there is neither.
    """
    keys = [_key(dotted, root) for dotted, section in valid_keys(root).items() if section is None]
    found = [key for key in keys if not name or f"{key.name}.".startswith(f"{name}.")]
    if not found:
        hint = " or ".join(nearest(name, root))
        raise ParamsError(
            f"{name!r} must be a key or a section of the params."
            + (f" Nearest: {hint}." if hint else "")
        )
    return found


def changed(section: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any, str | None]]:
    """Yield (key, value, default as it is written) of what differs from its default.

    The default is None where there is none: a value must be given then.
    """
    for name, field in type(section).model_fields.items():
        value = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from changed(value, f"{prefix}{name}.")
        elif field.is_required() or value != field.get_default(call_default_factory=True):
            yield prefix + name, value, _default(field)


def _key(dotted: str, root: type[BaseModel]) -> Key:
    *sections, name = dotted.split(".")
    section: type[BaseModel] = root
    for part in sections:
        inner = section_of(section.model_fields[part].annotation)
        assert inner is not None
        section = inner
    field = section.model_fields[name]
    return Key(dotted, _default(field), _values(field), field.description or "")


def _default(field: FieldInfo) -> str | None:
    if field.is_required():
        return None
    value = field.get_default(call_default_factory=True)
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return str(list(value)) if isinstance(value, tuple) else str(value) or "''"


def _values(field: FieldInfo) -> str:
    kind, bounds = _described(field.annotation)
    bounds = [text for text in (*bounds, *map(_bound, field.metadata)) if text]
    return ", ".join([kind, *bounds])


def _described(annotation: Any) -> tuple[str, list[str]]:
    """Return what values of a type are called, and their bounds."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        kind, bounds = _described(inner[0])
        given = [m for n in inner[1:] for m in (*getattr(n, "metadata", ()), n)]
        return kind, [*bounds, *filter(None, map(_bound, given))]
    if origin is Literal:
        return " | ".join(map(str, inner)), []
    if origin in (Union, UnionType):
        parts = [_described(choice) for choice in inner if choice is not NoneType]
        names = [kind for kind, _ in parts] + ["null"] * (NoneType in inner)
        return " or ".join(names), [bound for _, bounds in parts for bound in bounds]
    if origin in (list, tuple):
        kind, bounds = _described(inner[0])
        return f"list of {', '.join([kind, *bounds])}", []
    if origin is dict:
        return f"mapping of {_described(inner[0])[0]} to {_described(inner[1])[0]}", []
    return _KINDS.get(annotation, getattr(annotation, "__name__", str(annotation))), []


def _bound(given: Any) -> str | None:
    match given:
        case Ge(ge=least):
            return f"at least {least}"
        case Gt(gt=less):
            return f"more than {less}"
        case Le(le=most):
            return f"at most {most}"
        case Lt(lt=more) if more != 2**63:
            return f"less than {more}"
    return None
