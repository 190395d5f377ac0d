"""Which artifacts a run has, in which order, and which of them each is made from.

```
round_of("round-0003/update"), stage_of("round-0003/update")    # 3, "update"
parents("round-0003/score")                                     # {"rollout": "round-0003/rollout"}
```
"""

import re
from collections.abc import Iterable

from calligrapher.errors import ParamsError
from tasks.artifacts.layout import evaluation_name, round_name, round_number
from tasks.params.run_params import RunParams, Stage

WARMUP = "warmup"
PREVIEW = "preview"


def planned(params: RunParams, rounds: int | None = None) -> list[str]:
    """Names of all artifacts of a run, in the order in which they are made; `rounds` None = the
    params'."""
    rounds = params.rounds if rounds is None else rounds
    names = [WARMUP, *_evaluation(params, 0, rounds)]
    for round in range(rounds):
        names += [
            f"{round_name(round)}/{s}"
            for s in ("rollout", "score", "advantage", "update", "refresh")
        ]
        names += _evaluation(params, round + 1, rounds)
    return names


def _evaluation(params: RunParams, done: int, rounds: int) -> list[str]:
    every = params.evaluate.every
    if every == 0:
        return []
    return [evaluation_name(done, preview=done != rounds and done % every != 0)]


def stage_of(name: str) -> Stage:
    """The stage that makes the artifact `name`."""
    last = name.rpartition("/")[2]
    return "evaluate" if last == PREVIEW else last  # type: ignore[return-value]


def round_of(name: str) -> int | None:
    """The round of the artifact `name`, from 0; None for what is made before the first."""
    folder = name.rpartition("/")[0]
    return round_number(folder) if folder else None


def parents(name: str) -> dict[str, str]:
    """Input -> name of the artifact of the same run that it is; empty for the warm-up."""
    stage, round = stage_of(name), round_of(name)
    if round is None:
        return {} if stage == "warmup" else {"checkpoint": WARMUP}

    def of(stage: str, number: int = round) -> str:
        return f"{round_name(number)}/{stage}" if number >= 0 else WARMUP

    old = of("refresh", round - 1)
    match stage:
        case "rollout":
            return {"old": old}
        case "score":
            return {"rollout": of("rollout")}
        case "advantage":
            return {"scores": of("score")}
        case "update":
            made = {"rollout": of("rollout"), "advantages": of("advantage")}
            return {"previous": of("update", round - 1), "start": WARMUP, "old": old} | made
        case "refresh":
            return {"old": old, "updated": of("update")}
        case "evaluate":
            return {"checkpoint": of("update")}
    raise AssertionError(f"no artifact is called {name!r}")


def descendants(name: str, names: Iterable[str]) -> list[str]:
    """`name` and all of `names` (in the order of `planned`) that are made from it, however
    indirectly."""
    found = [name]
    for other in names:
        if other != name and not set(parents(other).values()).isdisjoint(found):
            found.append(other)
    return found


def artifact_name(text: str, names: Iterable[str]) -> str:
    """The one of `names` that a person means by `text`: `round-0003/update`, `round-3/update`,
    `3/update`.

    Raises ParamsError with the nearest names.
    """
    names = list(names)
    match = re.fullmatch(r"(?:round-)?(\d+)/(\w+)", text.strip("/"))
    name = f"{round_name(int(match[1]))}/{match[2]}" if match else text.strip("/")
    if name not in names:
        last = name.rpartition("/")[2]
        near = [n for n in names if n.rpartition("/")[2] == last] or names
        listing = ", ".join(near if len(near) < 5 else [*near[:2], "...", near[-1]])
        raise ParamsError(f"the stage must be one of the run's. Got {text!r}. Nearest: {listing}.")
    return name
