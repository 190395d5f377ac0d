"""Every name of a file or folder below `runs/`.

```
runs/data/                                 shared by all runs: drawn cases, encodings
runs/mlflow.db                             MLflow's database
runs/evaluations/NAME/KEY/                 evaluations of the run NAME
runs/NAME/params.json, fork.json           what the run was told; what it shares with its parent
runs/NAME/summary.json                     what it reached, once it is over
runs/NAME/warmup/                          an artifact: its files and artifact.json
runs/NAME/round-0003/update.partial/       one being built; `inner/` holds checkpoints to go on from
runs/NAME/round-0003/evaluate/             the evaluation after round 3, counted from 0
```
"""

from dataclasses import dataclass
from pathlib import Path

# In an artifact's folder.
MANIFEST = "artifact.json"
PRUNED = "pruned.json"
PARTIAL = "partial.json"
PARTIAL_SUFFIX = ".partial"
INNER = "inner"

# In a run's folder.
PARAMS = "params.json"
FORK = "fork.json"
SUMMARY = "summary.json"
WARMUP = "warmup"
UPDATE = "update"
EVALUATE = "evaluate"
PREVIEW = "preview"
_ROUND = "round-"
ROUNDS = f"{_ROUND}*"  # a pattern for `glob`


@dataclass(frozen=True)
class RunsDir:
    """The folder of all runs: `RunsDir(Path("runs")).run("nft")` is `runs/nft`."""

    path: Path

    @property
    def data(self) -> Path:
        """What runs share: drawn cases, pictures out of tables, encodings."""
        return self.path / "data"

    @property
    def mlflow_database(self) -> Path:
        return self.path / "mlflow.db"

    def run(self, name: str) -> Path:
        return self.path / name

    def evaluations(self, run: str) -> Path:
        """The evaluations of `run`, one folder for each way of evaluating."""
        return self.path / "evaluations" / run


def round_name(round_index: int) -> str:
    """Return the folder of a round, counted from 0."""
    return f"{_ROUND}{round_index:04d}"


def round_number(name: str) -> int:
    """Return the inverse of `round_name`."""
    return int(name.removeprefix(_ROUND))


def evaluation_name(rounds_done: int, *, preview: bool = False) -> str:
    """Return the name of the evaluation after so many rounds.

    A preview shows the picture grid's cases alone.
    """
    kind = PREVIEW if preview else EVALUATE
    return f"{round_name(rounds_done - 1)}/{kind}" if rounds_done else kind


def newest_update(run_folder: Path) -> str | None:
    """Return the name of the last finished update, as `round-0003/update`; None before the first.

    By number: round-10000 is newer than round-9999.
    """
    made = run_folder.glob(f"{ROUNDS}/{UPDATE}/{MANIFEST}")
    rounds = [round_number(path.parent.parent.name) for path in made]
    return f"{round_name(max(rounds))}/{UPDATE}" if rounds else None
