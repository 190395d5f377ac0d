"""What the page does when pictures are wanted: every variant paints them, the reward server reads
them."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.demo.results import Column, results_html
from flows.demo.scores import Reader
from flows.demo.sketch import Sketch, write_case
from tasks.inference.painter import Painter


@dataclass(frozen=True)
class Studio:
    """A painter, those of its variants that are shown, somebody who reads what it paints, a work
    folder."""

    painter: Painter
    variants: Sequence[str]
    reader: Reader
    folder: Path

    def results(
        self, sketch: Sketch, seeds: Sequence[int], *, num_steps: int, scale: float
    ) -> Iterator[str]:
        """The results as HTML, again and again: with every step that is done there is more in them.

        Raises DataError, before anything is painted, when the sketch or its text cannot be used.
        """
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            case = write_case(sketch, Path(folder))
            columns = {variant: Column() for variant in self.variants}
            for variant, column in columns.items():
                yield results_html(columns, seeds)
                column.pictures = self.painter.paint(
                    variant, case, seeds, num_steps=num_steps, scale=scale
                )
                yield results_html(columns, seeds)
                column.readings = self.reader.read(column.pictures, case)
            yield results_html(columns, seeds)
