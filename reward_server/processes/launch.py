"""Starts reward servers: one per GPU under one supervisor, or one of your own for a `with` block.

`calligrapher reward-server --gpu-ids 4,5,6,7 --port 8000 --vlm-model-path DIR` starts four on ports
8000 to 8003, each with its own CUDA_VISIBLE_DEVICES and log file, restarts one that dies, and stops
all on Ctrl-C or SIGTERM.
"""

import argparse
import logging
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from reward_server.processes.fleet import Fleet
from reward_server.processes.process import (
    START_TIMEOUT_S,
    ServerProcess,
    ServerStartError,
    local_server,
)
from reward_server.processes.serve import EXIT_USAGE, add_flags, parse_settings, stop_with

__all__ = ["Fleet", "ServerProcess", "ServerStartError", "local_server", "main"]

_OWN_FLAGS = ("host", "port", "parent_pid")  # each server is told its own


def main(argv: Sequence[str] | None = None) -> int:
    """`calligrapher reward-server`: serve until Ctrl-C or SIGTERM. Returns the exit status."""
    parser = _parser()
    options = vars(parser.parse_args(argv))
    gpu_ids = _gpu_ids(parser, options.pop("gpu_ids"))
    log_dir, max_restarts = options.pop("log_dir"), options.pop("max_restarts")
    start_timeout = options.pop("start_timeout")
    if gpu_ids != [""]:
        options.setdefault("device", "cuda")
        if options.get("ocr_engine") == "paddle":
            options.setdefault("ocr_device", "gpu")
    settings = parse_settings(parser, options)
    if settings.port + len(gpu_ids) - 1 > 65535:
        parser.error(f"--port must leave room for {len(gpu_ids)} ports. Got {settings.port}.")

    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    given = {name: value for name, value in options.items() if name not in _OWN_FLAGS}
    flags = [f"--{name.replace('_', '-')}" + ("" if value is True else f"={value}")
             for name, values in given.items()
             for value in (values if isinstance(values, list) else [values])]  # fmt: skip
    fleet = Fleet(
        gpu_ids,
        host=settings.host,
        first_port=settings.port,
        flags=flags,
        log_dir=log_dir,
        max_restarts=max_restarts,
    )
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # `nohup` has a terminal's end ignored
            signal.signal(number, fleet.ask_to_stop)
    if settings.parent_pid is not None:
        stop_with(settings.parent_pid)  # by SIGTERM, which must be handled by now
    return _serve(fleet, gpu_ids, start_timeout)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="calligrapher reward-server", description=__doc__)
    parser.add_argument(
        "--gpu-ids", default="", help='"4,5,6,7": one process each; "" (default): one on the CPU'
    )
    parser.add_argument(
        "--log-dir", type=Path, default=Path("logs"), help="folder of the servers' logs"
    )
    parser.add_argument(
        "--max-restarts", type=int, default=5, help="restarts of one server before it is given up"
    )
    parser.add_argument(
        "--start-timeout", type=float, default=START_TIMEOUT_S, help="seconds until all are ready"
    )
    add_flags(parser)
    return parser


def _gpu_ids(parser: argparse.ArgumentParser, text: str) -> list[str]:
    """GPU numbers as they were given; [""] stands for one process on the CPU."""
    gpu_ids = [part.strip() for part in text.split(",")]
    named = all(part.isdigit() for part in gpu_ids) or gpu_ids == [""]
    if len(set(gpu_ids)) != len(gpu_ids) or not named:
        parser.error(f"--gpu-ids must be different GPU numbers. Got {text!r}.")
    return gpu_ids


def _serve(fleet: Fleet, gpu_ids: list[str], start_timeout: float) -> int:
    """Start the fleet, say where it is, watch over it; return the exit status."""
    try:
        fleet.start(start_timeout)
        if fleet.stopping:
            return 0
        for gpu, server in zip(gpu_ids, fleet.servers, strict=True):
            place = f"GPU {gpu}" if gpu else "CPU"
            sys.stdout.write(
                f"reward server ready: {server.url} ({place}, log {server.log_path})\n"
            )
        sys.stdout.flush()
        return fleet.watch()
    except ServerStartError as error:
        sys.stderr.write(f"{error}\n")
        return EXIT_USAGE
    finally:
        fleet.stop()
