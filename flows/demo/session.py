"""Paints with every variant what the page asks for, and scores it."""

import tempfile
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event, Lock
from typing import Any

from calligrapher.data.case import Case, slug
from calligrapher.data.images import png_bytes
from calligrapher.tiny.world import beyond
from flows.demo.results import Column, Heading, results_html
from flows.demo.scores import PictureScorer
from flows.demo.sketch import DemoInput, write_case
from tasks.inference.painter import Painter


class StoppedError(Exception):
    """Nobody waits any more for what is being painted."""


@dataclass(frozen=True)
class Shown:
    """What the page shows now; `archive` holds all pictures, once there is nothing to wait for."""

    html: str
    archive: Path | None = None


@dataclass(frozen=True)
class DemoSession:
    """A painter, those of its variants that are shown, a scorer, a work folder."""

    painter: Painter
    variants: Sequence[str]
    scorer: PictureScorer
    folder: Path
    is_tiny: bool = False  # the model is the embedded one, or was trained from it
    _painting: Lock = field(default_factory=Lock, repr=False)

    def results(
        self, given: DemoInput, seeds: Sequence[int], *, num_steps: int, scale: float, stop: Event
    ) -> Iterator[Shown]:
        """Yield the results, again and again: each time more is painted and scored.

        Once `stop` is set nothing more is painted, and what there is stays. Raises DataError,
        before anything is painted, when what is given cannot be used.
        """
        with tempfile.TemporaryDirectory(dir=self.folder) as folder:
            case = write_case(given, Path(folder))
            strange = beyond(case.text, given.source.size) if self.is_tiny else []
            heading = Heading(case.text, seeds, num_steps, scale, self._unknown(case), strange)
            columns = {variant: Column() for variant in self.variants}
            try:
                for variant, column in columns.items():
                    yield Shown(results_html(heading, columns))
                    with self._stoppable(stop):
                        column.pictures = self.painter.paint(
                            variant, case, seeds=seeds, num_steps=num_steps, scale=scale
                        )
                    yield Shown(results_html(heading, columns))
                    column.readings = self.scorer.score(column.pictures, case)
            except StoppedError:
                for column in columns.values():
                    column.stopped = True
            yield Shown(results_html(heading, columns), self._archive(heading, columns))

    @contextmanager
    def _stoppable(self, stop: Event) -> Iterator[None]:
        """Let one thread paint at a time; once `stop` is set, its next step raises."""

        def check(*call: Any) -> None:
            if stop.is_set():
                raise StoppedError

        with self._painting:
            check()
            hook = self.painter.model.policy.model.register_forward_pre_hook(check)
            try:
                yield
            finally:
                hook.remove()

    def _unknown(self, case: Case) -> list[str]:
        """Return the characters of the text that T5 does not know."""
        tokenizer = self.painter.model.encoders.pipeline.tokenizer_2
        unknown = tokenizer.unk_token_id
        return [
            character
            for character in dict.fromkeys(case.text)
            if not character.isspace() and unknown in tokenizer(character).input_ids
        ]

    def _archive(self, heading: Heading, columns: Mapping[str, Column]) -> Path | None:
        """Write all pictures to a zip file; None where there is none."""
        if not any(column.pictures for column in columns.values()):
            return None
        name = slug(heading.text)
        path = Path(tempfile.mkdtemp(dir=self.folder)) / f"{name}.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for variant, column in columns.items():
                for seed, picture in zip(heading.seeds, column.pictures, strict=False):
                    archive.writestr(f"{name}-{variant}-seed{seed}.png", png_bytes(picture))
        return path
