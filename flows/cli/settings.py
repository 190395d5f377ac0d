"""The KEY=VALUE arguments of commands."""

from collections.abc import Sequence
from pathlib import Path

from calligrapher.errors import ParamsError


def split_settings(settings: Sequence[str]) -> tuple[str | None, Path, list[str]]:
    """`run=` and `runs_dir=` apart from the overrides of params."""
    run, runs_dir, overrides = None, Path("runs"), []
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise ParamsError(f"Every setting must be KEY=VALUE. Got {setting!r}.")
        if key == "run":
            run = value
        elif key == "runs_dir":
            runs_dir = Path(value)
        else:
            overrides.append(setting)
    return run, runs_dir, overrides
