"""A progress line per stage, with time left and current values; silent where there is no
terminal."""

import sys
from types import TracebackType
from typing import Self

from tqdm import tqdm


class Progress:
    """`with Progress("rollout", total=96, unit="image") as bar: bar.advance(12, reward=0.61)`."""

    def __init__(self, label: str, total: int | None, unit: str, *, done: int = 0):
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=f"{label:<22}",
            unit=unit,
            leave=False,
            dynamic_ncols=True,
            disable=not sys.stderr.isatty(),
        )

    def advance(self, count: int = 1, **values: float) -> None:
        """Count `count` more as done and show `values`."""
        if values:
            self.bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)
        self.bar.update(count)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bar.close()
