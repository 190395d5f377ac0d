"""Params files: finding one by name, and reading it and its overrides into plain values."""

from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel

from calligrapher.errors import ParamsError
from tasks.params.errors import nearest, valid_keys


class _StrictLoader(yaml.SafeLoader):
    """YAML without its silent choice of the last of two equal keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(key) for key in keys if keys.count(key) > 1})
        if twice:
            line = node.start_mark.line + 1
            raise yaml.YAMLError(
                f"{', '.join(twice)} must be given once. Found twice in the section at line {line}"
            )
        return super().construct_mapping(node, deep)


def shipped_params() -> Path:
    """Return the folder of the params files that come with the program."""
    installed = Path(__file__).with_name("shipped")  # where the wheel puts `params/`
    return installed if installed.is_dir() else Path(__file__).parents[2] / "params"


def find_params_file(name: str | Path) -> Path:
    """Return the file that `name` is the path of, or the shipped one that `tiny-nft` names.

    Raises ParamsError when it is neither.
    """
    path = Path(name)
    if path.is_file():
        return path
    shipped = {file.stem: file for file in shipped_params().glob("*.yaml")}
    if str(name) in shipped:
        return shipped[str(name)]
    raise ParamsError(
        f"{name} must be a readable params file, or the name of one that comes with the"
        f" program: {', '.join(sorted(shipped))}. There is no such file."
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in the YAML file `path`. Raises ParamsError naming the file."""
    try:
        values = yaml.load(path.read_text(), _StrictLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(f"{path} must be a readable params file: {error}") from None
    except yaml.YAMLError as error:
        raise ParamsError(f"{path} must be a YAML file: {error}") from None
    if not isinstance(values, dict):
        raise ParamsError(f"{path} must hold a mapping of sections. Got {type(values).__name__}.")
    return values


def apply_override(values: dict[str, Any], override: str, root: type[BaseModel]) -> None:
    """Set `section.key=value` (value in YAML) in `values`. Raises ParamsError naming the
    override."""
    key, equals, text = override.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ParamsError(f"an override must look like section.key=value. Got {override!r}.")
    if key not in valid_keys(root):
        hint = " or ".join(nearest(key, root))
        raise ParamsError(
            f"unknown key {key!r} in {override!r}." + (f" Nearest: {hint}." if hint else "")
        )
    try:
        value = yaml.load(text, _StrictLoader)
    except yaml.YAMLError as error:
        raise ParamsError(f"the value of {override!r} must be YAML: {error}") from None
    *sections, name = key.split(".")
    for section in sections:
        values[section] = dict(values[section] or {}) if section in values else {}
        values = values[section]
    values[name] = value
