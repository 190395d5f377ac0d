"""Starts reward servers: one per GPU under one supervisor, or one of your own for a `with` block.

`calligrapher reward-server --gpu-ids 4,5,6,7 --port 8000 --vlm-model-path DIR` starts four on ports
8000 to 8003, each with its own CUDA_VISIBLE_DEVICES and log file, restarts one that dies, and stops
all on Ctrl-C or SIGTERM.
"""

import argparse
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from reward_server.processes.fleet import Fleet, local_fleet
from reward_server.processes.process import (
    START_TIMEOUT_S,
    ServerProcess,
    ServerStartError,
    local_server,
)
from reward_server.processes.serve import (
    EXIT_USAGE,
    add_flags,
    log_to_stderr,
    parse_settings,
    stop_with,
)

__all__ = ["Fleet", "ServerProcess", "ServerStartError", "local_fleet", "local_server", "main"]

_OWN_FLAGS = ("host", "port", "parent_pid")  # each server is told its own


def main(argv: Sequence[str] | None = None) -> int:
    """`calligrapher reward-server`: serve until Ctrl-C or SIGTERM. Returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["try"]:
        from reward_server.processes.try_out import main as try_out

        return try_out(arguments[1:])
    parser = server_parser()
    options = vars(parser.parse_args(arguments))
    gpu_ids = _gpu_ids(parser, options.pop("gpu_ids"))
    log_dir, max_restarts = options.pop("log_dir"), options.pop("max_restarts")
    start_timeout = options.pop("start_timeout")
    if gpu_ids != [""]:
        options.setdefault("device", "cuda")
        if options.get("ocr_engine") == "paddle":
            options.setdefault("ocr_device", "gpu")
    settings = parse_settings(parser, options)
    if gpu_ids != [""] and not settings.disable_reward_model:
        _check_gpus(parser, gpu_ids)
    if settings.port + len(gpu_ids) - 1 > 65535:
        parser.error(f"--port must leave room for {len(gpu_ids)} ports. Got {settings.port}.")

    log_to_stderr(settings)
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
    return _serve(fleet, gpu_ids, start_timeout, loads=not settings.disable_reward_model)


def server_parser() -> argparse.ArgumentParser:
    """Return what reads the command's flags."""
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


def _check_gpus(parser: argparse.ArgumentParser, gpu_ids: list[str]) -> None:
    """End the program unless this machine has the GPUs: servers would start without them."""
    there = gpus()
    if missing := [gpu for gpu in gpu_ids if gpu not in there]:
        parser.exit(
            EXIT_USAGE,
            f"{parser.prog}: error: --gpu-ids must name GPUs of this machine"
            f" ({', '.join(there) or 'it has none'}). Got {', '.join(missing)}. Name others, or"
            " leave --gpu-ids out for one process on the CPU.\n",
        )


def gpus() -> list[str]:
    """Numbers of this machine's GPUs, by its driver or, where that has no tool, by torch."""
    for command in (
        ["nvidia-smi", "--query-gpu=index", "--format=csv,noheader"],
        # Not imported here: the launcher stays light.
        [sys.executable, "-c", "import torch; print(*range(torch.cuda.device_count()), sep='\\n')"],
    ):
        try:
            told = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        if found := [line.strip() for line in told.stdout.splitlines() if line.strip().isdigit()]:
            return found
    return []


def _serve(fleet: Fleet, gpu_ids: list[str], start_timeout: float, *, loads: bool = True) -> int:
    """Start the fleet, say where it is, watch over it; return the exit status.

    loads: False where no model is loaded, so that no GPU is looked for.
    """
    try:
        fleet.start(start_timeout)
        if fleet.stopping:
            return 0
        for gpu, server in zip(gpu_ids, fleet.servers, strict=True):
            place = f"GPU {gpu}" if gpu else "CPU"
            place += "" if loads or not gpu else " by name only: no model is loaded"
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
