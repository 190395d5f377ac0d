"""What the digest of a dataset stands for, kept by it, so that a difference can be told by name.

`RUNS_DIR/data/contents/DIGEST.json` holds name -> sha256 of each file or case. It explains digests
and decides nothing: it can be deleted at any time.
"""

import json
from collections.abc import Mapping
from pathlib import Path

from calligrapher.durable import atomic_write

FOLDER = "contents"
DATASETS = ("train_data", "evaluation_data")  # names of the inputs
_NAMED = 8  # names that are listed of each kind of change


def note(data_dir: Path, digest: str, contents: Mapping[str, str]) -> None:
    """Write down what `digest` stands for, once."""
    path = data_dir / FOLDER / f"{digest}.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(path, json.dumps(contents, indent=1).encode())


def changes(data_dir: Path, then: str, now: str) -> str | None:
    """Return which names differ between two digests, in words; None where one was not noted."""
    notes = [data_dir / FOLDER / f"{digest}.json" for digest in (then, now)]
    if not all(path.is_file() for path in notes):
        return None
    old, new = (json.loads(path.read_bytes()) for path in notes)
    kinds = {
        "changed": [name for name in old if name in new and old[name] != new[name]],
        "new": [name for name in new if name not in old],
        "gone": [name for name in old if name not in new],
    }
    told = [f"{kind}: {_listed(names)}" for kind, names in kinds.items() if names]
    return "; ".join(told) or "the same ones in another order"


def explain(below: Path, then: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Return a line for each dataset that differs between two manifests' inputs.

    below: a path in the runs folder whose notes are read.
    """
    data_dir = next((p / "data" for p in below.parents if (p / "data" / FOLDER).is_dir()), None)
    lines = []
    for name in DATASETS:
        if name in then and name in now and then[name] != now[name]:
            told = data_dir and changes(data_dir, then[name], now[name])
            lines.append(f"{name}: {told or 'which samples differ was not noted'}")
    return lines


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return ", ".join(names[:_NAMED]) + more
