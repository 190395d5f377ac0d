"""Names of runs: each becomes a folder beside what all runs share."""

import re

from calligrapher.errors import ParamsError

_PATTERN = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,99}")
# What stands in a folder of runs that is no run: shared data, evaluations, MLflow's files.
_RESERVED = re.compile(r"data|evaluations|mlartifacts|mlruns|mlflow\.db.*", re.IGNORECASE)


def check_run_name(name: str, given_as: str = "run") -> str:
    """Return `name`. Raises ParamsError, speaking of `given_as`, if it cannot be a run's folder."""
    if not _PATTERN.fullmatch(name) or _RESERVED.fullmatch(name):
        raise ParamsError(
            f"{given_as} must be a name of at most 100 letters, digits and `._-` that begins with a"
            " letter, a digit or `_`, and not data, evaluations, mlartifacts, mlruns or mlflow.db,"
            f" which all runs share. Got {name!r}."
        )
    return name
