"""constraints.txt holds a version of every dependency that pyproject.toml allows."""

import re
import tomllib
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]


def test_every_dependency_has_a_version_that_pyproject_allows():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    exact = dict(re.fullmatch(r"([\w.-]+)==(\S+)", line).groups() for line in lines)
    exact = {canonicalize_name(name): version for name, version in exact.items()}
    wanted = [r for r in map(Requirement, texts) if r.name != "calligrapher"]
    assert len(wanted) > 40
    for requirement in wanted:
        version = exact[canonicalize_name(requirement.name)]
        assert requirement.specifier.contains(version, prereleases=True), requirement
