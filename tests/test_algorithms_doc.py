"""docs/algorithms.md names keys that exist, defaults that hold and functions that are there."""

import importlib
import re
from pathlib import Path

import pytest
import yaml
from pydantic_core import PydanticUndefined

from tasks.params.checks import algorithms
from tasks.params.run_params import RunParams

TEXT = (Path(__file__).parents[1] / "docs" / "algorithms.md").read_text()
SECTIONS = {name: field.annotation for name, field in RunParams.model_fields.items()}
SECTIONS |= algorithms(RunParams)
ROWS = [
    [cell.strip() for cell in line.strip("|").split("|")]
    for line in TEXT.split("## Old flags")[1].splitlines()
    if line.startswith("| `")
]


def declared(key):
    *section, name = key.split(".")
    return (SECTIONS[section[0]] if section else RunParams).model_fields[name]


@pytest.mark.parametrize("row", ROWS, ids=[row[0].strip("`") for row in ROWS])
def test_the_documented_default_is_the_declared_one(row):
    _, key, default, _ = row
    if not re.fullmatch(r"`[a-z_0-9.]+`", key):
        assert key in ("none", "the section `nft` or `grpo`")
        return
    found = declared(key.strip("`")).get_default()
    if default == "required":
        assert found is PydanticUndefined
    elif isinstance(found, str):
        assert default == found
    elif isinstance(found, float):
        assert float(default) == found
    else:
        assert yaml.safe_load(default) == found


NAMES = re.compile(
    rf"`((?:schedule|step|exploration|rows|forward_process|kl|{'|'.join(SECTIONS)})\.[a-z_0-9]+)"
)
MODULES = {"schedule": "sampling", "step": "sampling", "exploration": "sampling"}
MODULES |= dict.fromkeys(
    ("advantage", "awm", "forward_process", "grpo", "kl", "nft", "ema", "rows"), "rl"
)


@pytest.mark.parametrize("name", sorted(set(NAMES.findall(TEXT))))
def test_every_key_and_function_in_the_text_exists(name):
    module, attribute = name.split(".")
    if module in MODULES:
        found = importlib.import_module(f"calligrapher.{MODULES[module]}.{module}")
        if hasattr(found, attribute):
            return
    assert declared(name).description
