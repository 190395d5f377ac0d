"""Params files: finding one by name, and reading it and its overrides into plain values."""

import re
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, Literal, Union, get_args, get_origin

import yaml
from pydantic import BaseModel

from calligrapher.errors import ParamsError
from calligrapher.params import Section
from tasks.params.errors import nearest, section_of, valid_keys

_TAG = "tag:yaml.org,2002:"
_NULL, _BOOL, _INT, _FLOAT, _STR = (_TAG + kind for kind in ("null", "bool", "int", "float", "str"))
_TAGS_OF = {type(None): {_NULL}, bool: {_BOOL}, int: {_INT, _FLOAT}, float: {_INT, _FLOAT}}
# Plain words of YAML 1.2 (core schema): what they are if they are not text.
_WORDS = {
    _NULL: r"~|null|Null|NULL|",
    _BOOL: r"true|True|TRUE|false|False|FALSE",
    _INT: r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+",
    _FLOAT: r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?"
    r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
    _TAG + "merge": "<<",
}


class _StrictLoader(yaml.SafeLoader):
    """YAML 1.2: `no`, `on`, `1:30` and dates are text, `1e5` is a number; no key stands twice."""

    yaml_implicit_resolvers: ClassVar[
        dict[str, Any]
    ] = {}  # none of the 1.1 ones that SafeLoader has

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(
                f"{', '.join(twice)} must be given once. Found twice in the section at line {line}"
            )
        return super().construct_mapping(node, deep)

    def construct_int(self, node: yaml.ScalarNode) -> int:
        base = {"0o": 8, "0x": 16}.get(node.value[:2], 10)
        return int(node.value, base)


for _tag, _pattern in _WORDS.items():
    _StrictLoader.add_implicit_resolver(_tag, re.compile(f"^(?:{_pattern})$"), None)
_StrictLoader.add_constructor(_INT, _StrictLoader.construct_int)


def _parse(text: str, annotation: Any) -> Any:
    """Return the value that `text` holds for a field with `annotation`. Raises YAMLError."""
    loader = _StrictLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None
        _keep_words(node, annotation)
        return loader.construct_document(node)
    except ValueError as error:  # a number of more digits than Python reads
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _sentence(error: yaml.YAMLError) -> str:
    """Return what is wrong, and in which line and column if that is known, without a drawing."""
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"{error.problem} (line {mark.line + 1}, column {mark.column + 1})"
    return " ".join(str(error).split())


def _keep_words(node: yaml.Node, annotation: Any) -> None:
    """Make text of each plain word that its field does not take as what YAML reads it as.

    `mixed_precision: no` and `experiment: 2024` are then what was written, and `rounds: true` is
    refused as a word in place of a number.
    """
    if annotation is Any:  # nothing is known of it; a list may hold itself by an alias
        return
    if isinstance(node, yaml.MappingNode):
        section = section_of(annotation)
        fields = section.model_fields if section else {}
        for key, value in node.value:
            if key.value in fields:
                _keep_words(value, fields[key.value].annotation)
    elif isinstance(node, yaml.SequenceNode):
        for entry in node.value:
            _keep_words(entry, _entries_of(annotation))
    elif node.value and node.tag in _WORDS and node.tag not in _tags_of(annotation):
        node.tag = _STR


def _tags_of(annotation: Any) -> set[str]:
    """Return what a field with `annotation` takes plain words as, besides text."""
    if get_origin(annotation) is Literal:
        return set().union(*(_tags_of(type(choice)) for choice in get_args(annotation)))
    if get_origin(annotation) is Annotated:
        return _tags_of(get_args(annotation)[0])
    if get_origin(annotation) in (Union, UnionType):
        return set().union(*map(_tags_of, get_args(annotation)))
    return set() if annotation is str else _TAGS_OF.get(annotation, set(_WORDS))


def _entries_of(annotation: Any) -> Any:
    """Return the annotation of the entries of a list or tuple; Any where it is none."""
    return get_args(annotation)[0] if get_origin(annotation) in (list, tuple) else Any


def shipped_params() -> Path:
    """Return the folder of the params files that come with the program."""
    installed = Path(__file__).with_name("shipped")  # where the wheel puts `params/`
    return installed if installed.is_dir() else Path(__file__).parents[2] / "params"


def find_params_file(name: str | Path) -> Path:
    """Return the file that `name` is the path of, or the shipped one that `tiny-nft` names.

    Raises ParamsError when it is neither.
    """
    path = Path(name)
    if path.exists() and not path.is_dir():
        return path
    shipped = {file.stem: file for file in shipped_params().glob("*.yaml")}
    if str(name) in shipped:
        return shipped[str(name)]
    raise ParamsError(
        f"{name} must be a readable params file, or the name of one that comes with the"
        f" program: {', '.join(sorted(shipped))}. There is no such file."
    )


def read_yaml(path: Path, root: type[BaseModel]) -> dict[str, Any]:
    """Return the mapping in the YAML file `path`, which a `root` is made of.

    Raises ParamsError naming the file.
    """
    try:
        values = _parse(path.read_text(), root)
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} must be a readable params file: {error}") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} must be a YAML file: {_sentence(error)}.") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{path} must hold a mapping of sections. Got {type(values).__name__}.")
    return values


def apply_override(values: dict[str, Any], override: str, root: type[BaseModel]) -> None:
    """Set `section.key=value` (value in YAML) in `values`; a mistake is a ParamsError naming it."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ParamsError(f"an override must look like section.key=value. Got {override!r}.")
    mapping, _, entry = key.rpartition(".")
    if key not in valid_keys(root) and not (entry and _is_mapping(mapping, root)):
        hint = " or ".join(nearest(key, root))
        raise ParamsError(
            f"unknown key {key!r} in {override!r}." + (f" Nearest: {hint}." if hint else "")
        )
    try:
        value = _parse(text, _annotation_of(key, root))
    except yaml.YAMLError as error:
        raise ParamsError(f"the value of {override!r} must be YAML: {_sentence(error)}.") from None
    *sections, name = key.split(".")
    for depth, section in enumerate(sections, 1):
        values[section] = dict(values[section] or {}) if section in values else {}
        values = values[section]
        declared = section_of(_annotation_of(".".join(sections[:depth]), root))
        if declared is not None and issubclass(declared, Section):
            declared.make_way(values, ".".join([*sections[depth:], name]))
    values[name] = value


def absolute_path(text: str) -> str:
    """Return `text` as an absolute path if it names what is there; as it is if it names no path.

    It may end in `#SPLIT`, as a dataset of the `datasets` library may.
    """
    path, mark, split = text.partition("#")
    for name, rest in ((text, ""), (path, mark + split)):
        place = Path(name).expanduser()
        if name and place.exists():
            return f"{place.absolute()}{rest}"
    return text


def _annotation_of(key: str, root: type[BaseModel]) -> Any:
    """Return the annotation of the field with the valid dotted `key` below `root`."""
    annotation: Any = root
    for name in key.split("."):
        section = section_of(annotation)
        if section is None:  # an entry of a mapping
            return get_args(annotation)[1]
        annotation = section.model_fields[name].annotation
    return annotation


def _is_mapping(key: str, root: type[BaseModel]) -> bool:
    """Whether `key` is a value that maps names of the user's choice to values."""
    return key in valid_keys(root) and get_origin(_annotation_of(key, root)) is dict
