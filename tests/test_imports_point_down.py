"""Imports point down, by package and by folder; each tool has its place."""

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
            "tasks": top == "calligrapher"
            or f"{name}.".startswith(("reward_server.client.", "reward_server.text.")),
            "flows": True,
        }[package]
    homes = {
        "prefect": package == "flows",
        "mlflow": path.parent == Path("tasks/tracking"),
        "fastapi": path.parent in (Path("reward_server/service"), Path("reward_server/bench")),
        "gradio": path.parent == Path("flows/demo"),
    }
    return homes.get(top, True)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_what_lies_below_it(path):
    assert [name for name in imports(path) if not allowed(path, name)] == []


def test_the_drawing_forbids_something():
    assert not allowed(Path("calligrapher/model/loading.py"), "tasks.runs.run.Run")
    assert not allowed(Path("tasks/runs/run.py"), "reward_server.processes.launch.main")
    assert not allowed(Path("tasks/runs/run.py"), "prefect.task")
    assert not allowed(Path("flows/cli/demo.py"), "gradio")
    assert allowed(Path("tasks/resources/rewards.py"), "reward_server.client.RewardClient")
    assert allowed(Path("tasks/pictures/grids.py"), "reward_server.text.normalise")
    assert not allowed(Path("tasks/pictures/grids.py"), "reward_server.text_models.load")
