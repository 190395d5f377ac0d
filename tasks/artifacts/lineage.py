"""Where a fork comes from: `fork.json`, and which artifacts it has from its parent."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from calligrapher.durable import atomic_write
from calligrapher.errors import ArtifactError
from tasks.artifacts.layout import FORK


class Fork(BaseModel):
    """The contents of `fork.json`, written once, before the fork exists under its name.

    `parent`: the parent's folder, relative to the fork's. `stage`: the artifact that was to be made
    anew; null in a replay. `shared`: name -> digest of what is the parent's; it counts as made by
    the fork's params, whatever they are.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: Literal["rerun", "replay"]
    parent: str
    stage: str | None
    overrides: list[str]
    shared: dict[str, str]
    created: str

    def described(self) -> str:
        """In words: `rerun of round-0003/update of first with nft.nft_beta=0.1`."""
        what = (
            f"{self.kind} of "
            + (f"{self.stage} of " if self.stage else "")
            + Path(self.parent).name
        )
        return what + (f" with {' '.join(self.overrides)}" if self.overrides else "")


def read_fork(run_folder: Path) -> Fork | None:
    """Return what the run in `run_folder` is a fork of; None for a run of its own.

    Raises ArtifactError.
    """
    path = run_folder / FORK
    if not path.is_file():
        return None
    try:
        return Fork.model_validate(json.loads(path.read_bytes()))
    except (ValueError, ValidationError) as error:
        raise ArtifactError(
            f"{path} must say where the fork comes from. It cannot be read: {error}"
        ) from error


def write_fork(run_folder: Path, fork: Fork) -> None:
    """Write `fork.json`."""
    atomic_write(run_folder / FORK, (json.dumps(fork.model_dump(), indent=1) + "\n").encode())
