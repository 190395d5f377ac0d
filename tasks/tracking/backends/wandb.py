"""A run in Weights & Biases: scalars, pictures, histograms and params.

It is sent while it runs where `WANDB_API_KEY` or `WANDB_MODE=online` says so, else written to
`runs/NAME/wandb` for `wandb sync`. Every row has `stage` and `step`; what the files there hold
already is left out, also after a kill.
"""

import json
import os
import struct
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from calligrapher.durable import atomic_write
from tasks.params.sections import TrackingParams
from tasks.tracking.journal import Entry, Journal
from tasks.tracking.mirror import Failed, Mirror

NOTE = "wandb.json"  # in the run's folder: `id` and `project`
_EXIT = {"FINISHED": 0, "FAILED": 1, "KILLED": 137}
# The frame of a `.wandb` file, that of LevelDB's logs: blocks, in which records stand whole or in
# parts, each after its checksum, length and kind.
_FILE_HEADER, _BLOCK, _HEADER, _WHOLE_OR_LAST = 7, 32768, struct.Struct("<IHB"), (1, 4)


class Backend(Mirror):
    """One W&B run."""

    title, package = "W&B", "wandb"

    def __init__(self, run_dir: Path, journals: tuple[Journal, Journal], failed: Failed) -> None:
        super().__init__(run_dir, journals, failed)
        import wandb

        note = json.loads((run_dir / NOTE).read_bytes())
        self._shown = {
            (row["stage"], row["step"]) for row in rows(run_dir / "wandb") if "stage" in row
        }
        key_is_known = bool(os.environ.get("WANDB_API_KEY"))
        self._run = wandb.init(
            **note,
            name=run_dir.name,
            dir=run_dir,
            resume="allow",
            reinit="create_new",
            mode=os.environ.get("WANDB_MODE") or ("online" if key_is_known else "offline"),
            settings=wandb.Settings(console="off", silent=True, disable_code=True),
        )
        self._run.define_metric("*", step_metric="step")

    @classmethod
    def prepare(cls, run_dir: Path, tracking: TrackingParams, *, again: bool = False) -> str:
        path = run_dir / NOTE
        note = json.loads(path.read_bytes()) if path.is_file() else {"id": uuid.uuid4().hex[:12]}
        if not (again and "project" in note):
            note["project"] = tracking.experiment
        atomic_write(path, json.dumps(note).encode())
        return f"the W&B project {note['project']}"

    def where(self) -> str:
        sends = f"`wandb sync {self._run_dir}/wandb/offline-run-*` sends it"
        return f"W&B run {self._run.id} ({self._run.url or sends})"

    def take_metrics(self, records: list[Entry]) -> None:
        for record in records:
            found = {k: v for k, v in record["metrics"].items() if v is not None}
            if found:
                self._show(record["stage"], record["step"], found)

    def take_params(self, record: Entry) -> None:
        self._run.config.update(record["params"], allow_val_change=True)

    def take_tags(self, record: Entry) -> None:
        self._run.config.update({"tags": record["tags"]}, allow_val_change=True)

    def take_image(self, record: Entry) -> None:
        import wandb

        key = record["key"]
        picture = wandb.Image(str(self._run_dir / record["path"]))
        self._show(f"image/{key}", record["step"], {key: picture})

    def take_histogram(self, record: Entry) -> None:
        import wandb

        shown = wandb.Histogram(np_histogram=(record["counts"], record["edges"]))
        key = record["key"]
        self._show(f"histogram/{key}", record["step"], {f"{key}_histogram": shown})

    def end(self, status: str) -> None:
        self._run.finish(exit_code=_EXIT[status])

    def _show(self, stage: str, step: int, values: dict[str, Any]) -> None:
        if (stage, step) not in self._shown:
            self._run.log({"stage": stage, "step": step, **values})
            self._shown.add((stage, step))


def rows(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield each whole row that W&B's own files below `folder` hold, as key -> value."""
    from wandb.proto.wandb_internal_pb2 import Record

    for path in sorted(folder.glob("*run-*/*.wandb")):
        for data in _records(path.read_bytes()):
            items = Record.FromString(data).history.item
            if items:
                yield {
                    ".".join(item.nested_key) or item.key: json.loads(item.value_json)
                    for item in items
                }


def _records(data: bytes) -> Iterator[bytes]:
    at, parts = _FILE_HEADER, []
    while True:
        room = _BLOCK - at % _BLOCK
        at += room if room < _HEADER.size else 0
        if at + _HEADER.size > len(data):
            return
        _, length, kind = _HEADER.unpack_from(data, at)
        at += _HEADER.size
        if kind == 0 or at + length > len(data):  # not written yet, or never whole
            return
        parts.append(data[at : at + length])
        at += length
        if kind in _WHOLE_OR_LAST:
            yield b"".join(parts)
            parts = []
