"""Ranks as processes of this machine, started by torch's elastic launcher."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch.distributed.elastic.multiprocessing import LogsDest, LogsSpecs, start_processes
from torch.distributed.elastic.multiprocessing.api import SignalException

from tasks.launch.channel import Invitation, Switchboard
from tasks.launch.failures import log_of
from tasks.launch.places import threads_of_a_rank, visible
from tasks.launch.rank_process import INVITATION, LOG

_KILL_S = 5  # until a killed process is gone


class Spawned:
    """The backend `accelerate`: a process for each rank, with its GPU and its share of the cores.

    gpu_ids: those of this process's CUDA devices that the ranks take, in their order.
    """

    host, everywhere, replaces = "127.0.0.1", False, 0

    def __init__(self, logs: Path, gpu_ids: list[int]) -> None:
        self._logs, self._gpu_ids = logs, gpu_ids
        self._processes: Any = None

    def start(self, invitations: list[Invitation], switchboard: Switchboard) -> None:
        # The launcher would say at each end that it ends processes.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.ERROR)
        size = len(invitations)
        common = {"OMP_NUM_THREADS": str(threads_of_a_rank(size)), "WORLD_SIZE": str(size)}
        if self._gpu_ids:
            common["CUDA_VISIBLE_DEVICES"] = visible(self._gpu_ids, os.environ)
        environments = {
            i.rank: common
            | {
                INVITATION: i.to_json(),
                LOG: str(log_of(self._logs, i.rank).absolute()),
                "RANK": str(i.rank),
                "LOCAL_RANK": str(i.rank),
            }
            for i in invitations
        }
        ours = {number: signal.getsignal(number) for number in _HANDLED}
        try:
            self._processes = start_processes(
                name="rank",
                entrypoint=sys.executable,
                args=dict.fromkeys(environments, ("-m", "tasks.launch.rank_process")),
                envs=environments,
                logs_specs=_OwnLogs(),
            )
        except SignalException as error:  # it came while the launcher's own handlers stood
            _handle(ours)
            signal.raise_signal(error.sigval)
            raise
        finally:
            _handle(ours)

    def ended(self, rank: int) -> str | None:
        status = self._processes.subprocess_handlers[rank].proc.poll()
        return None if status is None else how(status)

    def stop(self, patience_s: float) -> None:
        if self._processes is None:
            return
        stop_at = time.monotonic() + patience_s
        ranks = self._processes.pids()
        while time.monotonic() < stop_at and any(self.ended(rank) is None for rank in ranks):
            time.sleep(0.02)
        self._processes.close(signal.SIGKILL, timeout=_KILL_S)
        self._processes = None

    def close(self) -> None:
        pass


class _OwnLogs(LogsSpecs):
    """No redirection: each rank appends to a log of its own from its first line on."""

    def reify(self, envs: dict[int, dict[str, str]]) -> LogsDest:
        none = dict.fromkeys(envs, "")
        return LogsDest(stdouts=none, stderrs=none, error_files=none)

    @property
    def root_log_dir(self) -> str:
        return ""


def how(status: int) -> str:
    """Return an exit status in words."""
    if status < 0:
        return f"was killed by {signal.Signals(-status).name}"
    return f"ended with status {status}"


_HANDLED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGQUIT)


def _handle(handlers: Mapping[signal.Signals, Any]) -> None:
    """Undo the launcher's own signal handlers: a run ends as it would in one process."""
    if threading.current_thread() is threading.main_thread():
        for number, handler in handlers.items():
            signal.signal(number, handler)
