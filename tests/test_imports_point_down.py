"""Imports point down, by package and by folder, in no circle; each tool has its place."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
OURS = ("calligrapher", "flows", "reward_server", "tasks")
FILES = sorted(path.relative_to(ROOT) for name in OURS for path in (ROOT / name).rglob("*.py"))

# From the top: a folder or file imports from its own package only what stands below its line.
LAYERS = {
    "calligrapher": (
        {"tiny", "sizing"},
        {"rl"},
        {"sampling"},
        {"model"},
        {"tables"},
        {"data"},
        {"params", "ranks", "files", "threads", "durable", "errors"},
    ),
    "reward_server": (
        {"__main__", "bench"},
        {"processes"},
        {"service"},
        {"scorers", "client"},
        {"settings"},
        {"scorer_files"},
        {"alphabet"},
        {"components", "text", "style_scale", "surroundings"},
    ),
    "tasks": (
        {"doctor"},
        {"runs"},
        {"launch", "reports", "evaluation", "inference", "planning"},
        {"stages"},
        {"resources"},
        {"weights"},
        {"pipeline", "tracking", "data"},
        {"params", "artifacts", "pictures", "progress"},
    ),
    "flows": (
        {"cli", "bench", "bench_stages"},
        {"rl_train", "rerun", "evaluate", "demo"},
        {"contexts"},
        {"stages"},
        {"prefect_ui", "services"},
    ),
}
# Inside a layer, and inside a folder, files import each other; `no_circles` says in which way.


def imports(path):
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            # `from reward_server import client` imports `reward_server.client`.
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def layer(package, part):
    """Return the number of the layer, counted from the top; raise for what has none."""
    for number, parts in enumerate(LAYERS[package]):
        if part in parts:
            return number
    raise AssertionError(f"{package}/{part} must have a layer in LAYERS")


def allowed(path, name):
    package, top = path.parts[0], name.split(".")[0]
    if top in OURS and top != package:
        return {
            "calligrapher": False,
            "reward_server": False,
            "tasks": top == "calligrapher"
            or f"{name}.".startswith(
                (
                    "reward_server.alphabet.",
                    "reward_server.client.",
                    "reward_server.components.",
                    "reward_server.scorer_files.",
                    "reward_server.scorers.style.",  # an evaluation's style is the reward's
                    "reward_server.style_scale.",
                    "reward_server.text.",
                )
            ),
            "flows": True,
        }[package]
    if top == package and len(path.parts) > 1 and "." in name:
        mine, other = Path(path.parts[1]).stem, name.split(".")[1]
        known = any(other in parts for parts in LAYERS[package])
        return (
            mine in ("__init__", other)
            or not known
            or layer(package, mine) <= layer(package, other)
        )
    homes = {
        "prefect": package == "flows",
        "mlflow": Path("tasks/tracking") in path.parents,
        "tensorboard": path.parent == Path("tasks/tracking/backends"),
        "wandb": path.parent == Path("tasks/tracking/backends"),
        "fastapi": path.parent in (Path("reward_server/service"), Path("reward_server/bench")),
        "gradio": path.parent == Path("flows/demo"),
    }
    return homes.get(top, True)


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_only_what_lies_below_it(path):
    assert [name for name in imports(path) if not allowed(path, name)] == []


def test_every_file_and_folder_has_its_layer():
    for path in FILES:
        part = Path(path.parts[1]).stem
        assert part == "__init__" or layer(path.parts[0], part) >= 0


@cache
def graph():
    """Return module -> the modules of ours that it imports, by files, those of types included."""
    modules = {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in FILES
    }
    edges = {}
    for module, path in modules.items():
        names = set(imports(path))
        names |= {name.rpartition(".")[0] for name in names}
        targets = {name for name in names if name in modules} - {module}
        # A package is imported with each of its modules; only its own names count.
        edges[module] = {t for t in targets if not any(o.startswith(f"{t}.") for o in targets)}
    return edges


def test_no_two_files_import_each_other_in_a_circle():
    edges, done, circles = graph(), set(), []

    def visit(module, path):
        if module in path:
            circles.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for target in sorted(edges[module]):
                visit(target, [*path, module])
            done.add(module)

    for module in edges:
        visit(module, [])
    assert circles == []


def test_the_drawing_forbids_something():
    assert not allowed(Path("calligrapher/model/loading.py"), "tasks.runs.run.Run")
    assert not allowed(Path("tasks/runs/run.py"), "reward_server.processes.launch.main")
    assert not allowed(Path("tasks/runs/run.py"), "prefect.task")
    assert not allowed(Path("flows/cli/demo.py"), "gradio")
    assert not allowed(Path("tasks/stages/update.py"), "tasks.runs.run.Run")
    assert not allowed(Path("calligrapher/sampling/sampler.py"), "calligrapher.rl.grpo.GRPOParams")
    assert allowed(Path("tasks/runs/run.py"), "tasks.stages.score.AHEAD")
    assert allowed(Path("tasks/resources/rewards.py"), "reward_server.client.RewardClient")
    assert allowed(Path("tasks/pictures/grids.py"), "reward_server.text.normalise")
    assert not allowed(Path("tasks/pictures/grids.py"), "reward_server.text_models.load")
