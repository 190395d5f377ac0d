"""Imports point down: flows -> tasks -> {calligrapher, reward_server.client}; each tool has its place."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("calligrapher", "flows", "reward_server", "tasks")
FILES = sorted(path.relative_to(ROOT) for name in OURS for path in (ROOT / name).rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from reward_server import client` imports `reward_server.client`.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def allowed(path, name):
    package, top = path.parts[0], name.split(".")[0]
    if top in OURS and top != package:
        return {
            "calligrapher": False,
            "reward_server": False,
            "tasks": top == "calligrapher" or f"{name}.".startswith("reward_server.client."),
            "flows": True,
        }[package]
    homes = {
        "prefect": package == "flows" or path == Path("tasks/stages.py"),
        "mlflow": path == Path("tasks/tracking.py"),
        "fastapi": package == "reward_server",
        "gradio": package == "flows" and path.stem.startswith("demo"),
    }
    return homes.get(top, True)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_what_lies_below_it(path):
    assert [name for name in imports(path) if not allowed(path, name)] == []


def test_the_drawing_forbids_something():
    assert not allowed(Path("calligrapher/model.py"), "tasks.run.Run")
    assert not allowed(Path("tasks/run.py"), "reward_server.launch.main")
    assert not allowed(Path("tasks/run.py"), "prefect.task")
    assert not allowed(Path("flows/cli_demo.py"), "gradio")
    assert allowed(Path("tasks/scoring.py"), "reward_server.client.RewardClient")
