"""A run's event files for TensorBoard, in `runs/NAME/tensorboard`: scalars, pictures, histograms.

What the files hold already is read from them, so a start after a kill adds what is missing in a
file of its own: `tensorboard --logdir runs`.
"""

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from tasks.params.sections import TrackingParams
from tasks.tracking.journal import Entry, Journal
from tasks.tracking.mirror import Failed, Mirror

if TYPE_CHECKING:
    from tensorboard.summary.writer.event_file_writer import EventFileWriter

FOLDER = "tensorboard"


class Backend(Mirror):
    """The event files of one run."""

    title, package = "TensorBoard", "tensorboard"

    def __init__(self, run_dir: Path, journals: tuple[Journal, Journal], failed: Failed) -> None:
        super().__init__(run_dir, journals, failed)
        self._folder = run_dir / FOLDER
        self._shown = set(_shown(self._folder))
        self._told = 0  # params: a resumed run may have others
        self._writer: EventFileWriter | None = None  # its file is made with the first value

    @classmethod
    def prepare(cls, run_dir: Path, tracking: TrackingParams, *, again: bool = False) -> str:
        return f"TensorBoard in {run_dir / FOLDER}"

    def where(self) -> str:
        return f"TensorBoard (`tensorboard --logdir {self._folder}`)"

    def catch_up(self) -> None:
        super().catch_up()
        if self._writer is not None:
            self._writer.flush()

    def end(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def take_metrics(self, records: list[Entry]) -> None:
        for record in records:
            for name, value in record["metrics"].items():
                if value is not None:
                    self._show(name, record, simple_value=value)

    def take_params(self, record: Entry) -> None:
        from tensorboard.compat.proto.summary_pb2 import SummaryMetadata
        from tensorboard.compat.proto.tensor_pb2 import TensorProto

        shown = {key: value.replace("|", "\\|") for key, value in record["params"].items()}
        rows = [f"| `{key}` | {value} |" for key, value in shown.items()]
        text = "\n".join(["| key | value |", "|---|---|", *rows])
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name="text"))
        tensor = TensorProto(dtype="DT_STRING", string_val=[text.encode()])
        self._show("params", record | {"step": self._told}, tensor=tensor, metadata=metadata)
        self._told += 1

    def take_image(self, record: Entry) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        data = (self._run_dir / record["path"]).read_bytes()  # the very file, not compressed anew
        with Image.open(self._run_dir / record["path"]) as image:
            width, height = image.size
        shown = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=data)
        self._show(record["key"], record, image=shown)

    def take_histogram(self, record: Entry) -> None:
        from tensorboard.compat.proto.summary_pb2 import HistogramProto

        edges, counts = record["edges"], record["counts"]
        middles = [(a + b) / 2 for a, b in itertools.pairwise(edges)]
        shown = HistogramProto(
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(n * x for n, x in zip(counts, middles, strict=True)),
            sum_squares=sum(n * x * x for n, x in zip(counts, middles, strict=True)),
            bucket_limit=edges[1:],
            bucket=counts,
        )
        self._show(record["key"], record, histo=shown)

    def _show(self, tag: str, record: Entry, **value: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        step = record["step"]
        if (tag, step) in self._shown:
            return
        if self._writer is None:
            self._writer = EventFileWriter(str(self._folder))
        summary = Summary(value=[Summary.Value(tag=tag, **value)])
        self._writer.add_event(Event(wall_time=record["time"], step=step, summary=summary))
        self._shown.add((tag, step))


def _shown(folder: Path) -> Iterator[tuple[str, int]]:
    """Yield (tag, step) of each whole value in the event files of a folder."""
    from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader

    for path in sorted(folder.glob("events.out.tfevents.*")):
        for event in LegacyEventFileLoader(str(path)).Load():
            for value in event.summary.value:
                yield value.tag, event.step
