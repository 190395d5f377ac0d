"""Tries the newest version of each dependency, one at a time, and says what breaks.

```
python tests/scripts/newest.py                         # all, each with the tests below
python tests/scripts/newest.py diffusers peft          # some
python tests/scripts/newest.py --list                  # only say which newer versions there are
```

The newest version is laid over the installed ones (a folder at the front of PYTHONPATH), without
its own dependencies; what it wants of them otherwise is named. Nothing installed is changed. Exit
status 1 if anything breaks.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, PathDistribution, version
from itertools import chain
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
TESTS = ["tests/calligrapher", "tests/tasks/weights", "tests/tasks/stages/test_update.py"]
PIP = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("names", nargs="*", help="packages; default: all of pyproject.toml")
    parser.add_argument("--list", action="store_true", help="try nothing")
    parser.add_argument("--tests", nargs="+", default=TESTS, help="what pytest runs")
    chosen = parser.parse_args()
    broken = 0
    for requirement in wanted(chosen.names):
        try:
            installed, newest = version(requirement.name), newest_version(requirement.name)
        except (PackageNotFoundError, subprocess.CalledProcessError) as error:
            print(f"{requirement.name:<24} not known: {type(error).__name__}")
            continue
        told = f"{requirement.name:<24} {installed:>14} -> {newest:<14}"
        if newest == installed:
            print(f"{told} is the newest")
        elif chosen.list:
            print(told)
        else:
            problems = tried(requirement.name, newest, chosen.tests)
            broken += bool(problems)
            print(told, "works" if not problems else "\n    ".join(["breaks:", *problems]))
        sys.stdout.flush()
    return 1 if broken else 0


def wanted(names: list[str]) -> list[Requirement]:
    """Return the dependencies of all extras, each once, or those of these names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    texts = [*project["dependencies"], *chain(*project["optional-dependencies"].values())]
    found = {canonicalize_name(r.name): r for r in map(Requirement, texts)}
    found.pop("calligrapher", None)
    return [r for name, r in found.items() if not names or name in map(canonicalize_name, names)]


def newest_version(name: str) -> str:
    """Return the version that pip would install if nothing were pinned."""
    command = ["install", "--dry-run", "--no-deps", "--ignore-installed", "--report", "-", name]
    done = subprocess.run([*PIP, *command], check=True, capture_output=True, text=True)
    return json.loads(done.stdout)["install"][0]["metadata"]["version"]


def tried(name: str, newest: str, tests: list[str]) -> list[str]:
    """Return what breaks with the newest version: its demands, the first failing tests."""
    with tempfile.TemporaryDirectory() as overlay:
        command = ["install", "--no-deps", "--target", overlay, f"{name}=={newest}"]
        done = subprocess.run([*PIP, *command], capture_output=True, text=True)
        if done.returncode:
            return ["it does not install", *done.stderr.strip().splitlines()[-1:]]
        problems = unmet(Path(overlay))
        environment = os.environ | {"PYTHONPATH": f"{overlay}:{ROOT}", "OMP_NUM_THREADS": "1"}
        pytest = [sys.executable, "-m", "pytest", "-q", "--maxfail=3", "-m", "not slow", *tests]
        done = subprocess.run(pytest, cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            lines = done.stdout.splitlines() + done.stderr.splitlines()
            failed = [line for line in lines if line.startswith(("FAILED", "ERROR"))]
            problems += failed[:3] or lines[-1:]
        return problems


def unmet(overlay: Path) -> list[str]:
    """Return the demands of what lies in `overlay` that the installed packages do not meet."""
    problems = []
    for folder in overlay.glob("*.dist-info"):
        for requirement in map(Requirement, PathDistribution(folder).requires or ()):
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            try:
                found = version(requirement.name)
            except PackageNotFoundError:
                found = None
            if found is None or not requirement.specifier.contains(found, prereleases=True):
                problems.append(f"it wants {requirement}; installed is {found or 'none'}")
    return problems


if __name__ == "__main__":
    sys.exit(main())
