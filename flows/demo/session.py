"""Paints with every variant what the page asks for, and scores it."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from flows.demo.results import Column, results_html
from flows.demo.scores import PictureScorer
from flows.demo.sketch import DemoInput, write_case
from tasks.inference.painter import Painter


@dataclass(frozen=True)
class DemoSession:
    """A painter, those of its variants that are shown, a scorer, a work folder."""

    painter: Painter
    variants: Sequence[str]
    scorer: PictureScorer
    folder: Path

    def results(
        self, given: DemoInput, seeds: Sequence[int], *, num_steps: int, scale: float
    ) -> Iterator[str]:
        """Yield the results as HTML, again and again: each time more is painted and scored.

        Raises DataError, before anything is painted, when what is given cannot be used.
        """
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            case = write_case(given, Path(folder))
            columns = {variant: Column() for variant in self.variants}
            for variant, column in columns.items():
                yield results_html(columns, seeds)
                column.pictures = self.painter.paint(
                    variant, case, seeds=seeds, num_steps=num_steps, scale=scale
                )
                yield results_html(columns, seeds)
                column.readings = self.scorer.score(column.pictures, case)
            yield results_html(columns, seeds)
