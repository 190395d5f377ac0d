"""A stage call as data, so that it can be sent to another process.

```
StageCall("round-0003/rollout", {"old": Path("runs/nft/round-0002/refresh")},
          ahead=Path("runs/nft/round-0003/score-ahead-3fa1.partial")).to_json()
```
"""

import json
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class StageCall:
    """Which artifact is to be made, and from what.

    inputs: argument of the stage function -> folder of the artifact. ahead: where scores wait that
    were made while sampling went on (`rollout`, `score`). earlier: scores of another run that hold
    all that is weighed now (`score`). num_cases: held-out cases to show, and images_per_case: so
    many images of each (`evaluate`).
    """

    name: str
    inputs: dict[str, Path]
    ahead: Path | None = None
    earlier: Path | None = None
    num_cases: int | None = None
    images_per_case: int | None = None

    @property
    def options(self) -> dict[str, Any]:
        """What the stage function gets besides its inputs: the fields that are set."""
        given = {f.name: getattr(self, f.name) for f in fields(self)[2:]}
        return {name: value for name, value in given.items() if value is not None}

    def to_json(self) -> str:
        """Return the call as JSON."""
        plain = {"name": self.name, "inputs": self.inputs, **self.options}
        return json.dumps(plain, default=str)

    @classmethod
    def from_json(cls, text: str) -> "StageCall":
        """Return what `to_json` wrote."""
        plain = json.loads(text)
        plain["inputs"] = {key: Path(path) for key, path in plain["inputs"].items()}
        for key in ("ahead", "earlier"):
            if key in plain:
                plain[key] = Path(plain[key])
        return cls(**plain)


@dataclass(frozen=True)
class StageAnswer:
    """What became of a call: the artifact's meta, and what making it took (`gpu_peak_gib`)."""

    meta: dict[str, Any]
    cost: dict[str, float] = field(default_factory=dict)


class Launcher(Protocol):
    """Has the processes that do the stages of a run.

    samplers: how many of them do rollouts and scores alone, beside the others; 0: all do all.
    """

    samplers: int

    def run(self, call: StageCall, out: Path) -> StageAnswer:
        """Do `call`: write the artifact's files into the work folder `out`."""

    def begin(self, call: StageCall, out: Path) -> None:
        """Begin with `call` in processes that are idle, for `run` to wait for.

        Only where there are samplers.
        """

    def committed(self, path: Path) -> None:
        """Take note that the files of the last call are the artifact in the folder `path` now."""
