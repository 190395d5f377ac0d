"""The extra `[reward]` installs what the service imports, in the versions of the whole project."""

import ast
import re
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DISTRIBUTION = {
    "PIL": "pillow",
    "cv2": "opencv-python",
    "prometheus_client": "prometheus-client",
    "yaml": "pyyaml",
}
OF_ANOTHER = {"starlette": "fastapi"}  # module -> the requirement that brings it


def required() -> dict[str, str]:
    requirements = PROJECT["optional-dependencies"]["reward"]
    return {re.split(r"[<>=!]", one)[0]: one for one in requirements}


def test_every_module_that_the_service_imports_is_required_by_the_extra():
    imported = set()
    for path in (ROOT / "reward_server").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.split(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                imported.add((node.module or "").split(".")[0])
    foreign = imported - set(sys.stdlib_module_names) - {"reward_server"}
    needed = {OF_ANOTHER.get(name) or DISTRIBUTION.get(name, name) for name in foreign}
    assert needed - set(required()) == set()
    assert len(needed) > 8


def test_the_extra_asks_for_the_versions_of_the_whole_project():
    assert set(required().values()) <= set(PROJECT["dependencies"])
