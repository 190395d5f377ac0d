"""What orchestration costs: `python -m flows.bench [--rounds 10]` trains the tiny model and prints figures.

1. Per round: Prefect, MLflow and artifacts (hashing, fsync, manifests) as a share of the round.
2. A second start of the finished run, in which every stage is found: seconds besides process start.

The first is measured from inside: a stage's own function is timed apart from all that surrounds it.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from flows.prefect_api import prefect_api
from flows.rl_train import rl_train
from tasks import stages
from tasks.artifacts import RunDir

PARAMS = "params/tiny-nft.yaml"


class Clock:
    """Seconds inside the stages' own functions, and where the rounds begin and end."""

    def __init__(self) -> None:
        self.working, self.rounds = 0.0, 0.0

    def timed(self, build: Callable[[Path], Any]) -> Callable[[Path], Any]:
        def building(out: Path) -> Any:
            started = time.monotonic()
            try:
                return build(out)
            finally:
                self.working += time.monotonic() - started

        return building


def overhead(clock: Clock, overrides: list[str], runs_dir: Path) -> float:
    """Train; the share of the flow's time after the first stage that no stage's own function used."""
    ensure, warmup = RunDir.ensure, stages.warmup
    started = 0.0

    def timed_ensure(self: RunDir, name: str, build: Callable[[Path], Any], **how: Any) -> Any:
        return ensure(self, name, clock.timed(build), **how)

    def first(run: Any) -> Any:
        nonlocal started
        made = warmup(run)
        clock.working, started = 0.0, time.monotonic()
        return made

    RunDir.ensure, stages.warmup = timed_ensure, first  # type: ignore[method-assign, assignment]
    try:
        rl_train(PARAMS, overrides, "bench", str(runs_dir))
    finally:
        RunDir.ensure, stages.warmup = ensure, warmup  # type: ignore[method-assign]
    clock.rounds = time.monotonic() - started
    return 1 - clock.working / clock.rounds


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.bench", description=__doc__)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--runs-dir", type=Path, help="default: a temporary folder")
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="changes to params/tiny-nft.yaml")
    chosen = parser.parse_args(argv)
    overrides = [f"rounds={chosen.rounds}", *chosen.settings]
    with tempfile.TemporaryDirectory() as temporary, prefect_api():
        runs_dir = chosen.runs_dir or Path(temporary)
        clock = Clock()
        share = overhead(clock, overrides, runs_dir)
        started = time.monotonic()
        rl_train(PARAMS, overrides, "bench", str(runs_dir))
        again = time.monotonic() - started
    sys.stdout.write(
        f"{chosen.rounds} rounds: {clock.rounds / chosen.rounds:.2f} s a round, of which "
        f"{share:.1%} is orchestration ({share * clock.rounds / chosen.rounds:.3f} s)\n"
        f"no-op rerun: {again:.2f} s\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
