"""What orchestration costs: `python -m flows.bench [--rounds 10] [--mlflow
file|off|down|slow|full]`.

Trains the tiny model and prints

1. per round, what Prefect, MLflow and artifacts (hashing, fsync, manifests) cost, as a share of the
   round: all time outside of the stages' own functions, the time in `fsync` inside of them, and the
   processor time of the threads that feed MLflow, as if the training had waited for them;
2. how long a second start of the finished run takes, in which every stage is found, besides process
   start.

Counted from the end of the first stage, when model and reward server are there. `--mlflow` says
what the tracking finds: a database on this disk (`file`), nothing at its address (`down`), a server
that takes every request and never answers (`slow`), one that has no room left (`full`), or that it
is not wanted (`off`). With `--ranks N` it measures what stages cost beside their model's calls:
`bench_stages`.
"""

import argparse
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from unittest.mock import patch

import psutil

from flows import stages
from flows.rl_train import rl_train
from flows.services.prefect_api import prefect_api
from tasks.launch.calls import StageAnswer, StageCall
from tasks.launch.in_process import InProcess
from tasks.tracking.tracker import Tracker

PARAMS = "tiny-nft"


@dataclass
class Cost:
    """Seconds of all rounds together."""

    rounds: float = 0.0
    working: float = 0.0  # in the stages' own functions
    syncing: float = 0.0  # of those, in fsync
    mirroring: float = 0.0  # processor time of the threads that feed MLflow
    closing: float = 0.0  # the last of the tracking, once a run

    @property
    def orchestration(self) -> float:
        return self.rounds - self.working + self.syncing + self.mirroring


def measure(overrides: list[str], runs_dir: Path) -> Cost:
    """Train the run `bench` and say what it cost."""
    cost, main, inside, started = Cost(), threading.current_thread(), False, 0.0
    run, warmup, fsync, close = InProcess.run, stages.warmup, os.fsync, Tracker.close

    def timed_run(self: InProcess, call: StageCall, out: Path) -> StageAnswer:
        nonlocal inside
        began, inside = time.monotonic(), True
        try:
            return run(self, call, out)
        finally:
            inside = False
            cost.working += time.monotonic() - began

    def timed_fsync(descriptor: Any) -> None:
        began = time.monotonic()
        fsync(descriptor)
        if inside and threading.current_thread() is main:
            cost.syncing += time.monotonic() - began

    def first(training: Any) -> Any:
        nonlocal started
        start = warmup(training)
        training.sources["scored_by"]()  # starts the reward server
        cost.working = cost.syncing = 0.0
        cost.mirroring = -_mirror_seconds()
        started = time.monotonic()
        return start

    def timed_close(self: Tracker, *how: Any, **also: Any) -> None:
        ended = time.monotonic()
        cost.rounds = ended - started
        cost.mirroring += _mirror_seconds()
        close(self, *how, **also)
        cost.closing = time.monotonic() - ended

    with (
        patch.object(InProcess, "run", timed_run),
        patch.object(stages, "warmup", first),
        patch.object(os, "fsync", timed_fsync),
        patch.object(Tracker, "close", timed_close),
    ):
        rl_train(PARAMS, overrides, "bench", str(runs_dir))
    return cost


def _mirror_seconds() -> float:
    """Processor time so far of the tracker's thread and of MLflow's own."""
    names = ("tracking", "MLflow", "SystemMetrics")
    ours = {t.native_id for t in threading.enumerate() if t.name.startswith(names)}
    used = {t.id: t.user_time + t.system_time for t in psutil.Process().threads()}
    return sum(seconds for thread, seconds in used.items() if thread in ours)


@contextmanager
def mlflow_that_is(state: str) -> Iterator[list[str]]:
    """The overrides that send the tracking to an MLflow in this state."""
    if state in ("file", "off"):
        yield [] if state == "file" else ["tracking.enabled=false"]
        return
    kind = Full if state == "full" else BaseHTTPRequestHandler
    with HTTPServer(("127.0.0.1", 0), kind) as server:
        address = f"tracking.uri=http://127.0.0.1:{server.server_port}"
        if state == "full":
            threading.Thread(target=server.serve_forever, daemon=True).start()
        if (
            state != "down"
        ):  # When slow, the system takes the connections and nobody reads from them.
            yield [address]
        if state == "full":
            server.shutdown()
    if state == "down":  # The port is closed again.
        yield [address]


class Full(BaseHTTPRequestHandler):
    """Answers whatever is asked with 507 Insufficient Storage."""

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length", 0)))  # or closing would reset it
        self.send_error(507)

    do_POST = do_PUT = do_PATCH = do_GET  # noqa: N815

    def log_message(self, *what: object) -> None:
        """Says nothing."""


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.bench",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--mlflow", choices=("file", "off", "down", "slow", "full"), default="file")
    parser.add_argument(
        "--ranks", type=int, help="measure stages in so many processes, not orchestration"
    )
    parser.add_argument("--runs-dir", type=Path, help="default: a temporary folder")
    parser.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="changes to params/tiny-nft.yaml"
    )
    chosen = parser.parse_intermixed_args(argv)
    if chosen.ranks:
        from flows.bench_stages import stage_costs

        with tempfile.TemporaryDirectory() as temporary:
            folder = chosen.runs_dir or Path(temporary)
            sys.stdout.write(stage_costs(chosen.ranks, chosen.rounds, chosen.settings, folder))
        return 0
    with (
        tempfile.TemporaryDirectory() as temporary,
        prefect_api(),
        mlflow_that_is(chosen.mlflow) as tracking,
    ):
        overrides = [f"rounds={chosen.rounds}", *tracking, *chosen.settings]
        runs_dir = chosen.runs_dir or Path(temporary)
        cost = measure(overrides, runs_dir)
        started = time.monotonic()
        rl_train(PARAMS, overrides, "bench", str(runs_dir))
        again = time.monotonic() - started
    per_round = {name: seconds / chosen.rounds for name, seconds in vars(cost).items()}
    outside = per_round["rounds"] - per_round["working"]
    share, seconds = cost.orchestration / cost.rounds, cost.orchestration / chosen.rounds
    sys.stdout.write(
        f"{chosen.rounds} rounds, MLflow {chosen.mlflow}: {per_round['rounds']:.2f} s a"
        f" round\norchestration: {share:.1%}, {seconds:.3f} s a round ({outside:.3f} outside of the"
        f" stages, {per_round['syncing']:.3f} in fsync, {per_round['mirroring']:.3f} of MLflow's"
        f" threads)\nend of tracking: {cost.closing:.1f} s\nno-op rerun: {again:.2f} s\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
