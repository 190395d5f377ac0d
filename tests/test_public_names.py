"""docs/python.md lists the names to rely on: they are there, documented, and what examples use."""

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
NAMES = re.findall(r"^\| `([\w.]+)` \|", (ROOT / "docs/python.md").read_text(), re.MULTILINE)
NOTEBOOK = ROOT / "examples/look_at_a_run.ipynb"
OURS = ("calligrapher", "tasks", "reward_server", "flows")


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_is_there_and_has_a_docstring(name):
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    assert len(inspect.getdoc(found) or "") > 20


def test_the_notebook_uses_public_names_alone():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    used = {
        f"{node.module}.{alias.name}"
        for node in ast.walk(ast.parse(code))
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS
        for alias in node.names
    }
    assert len(used) > 8
    assert used - {"calligrapher.tiny.world.write_bench"} <= set(NAMES)


def test_the_notebook_is_kept_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
