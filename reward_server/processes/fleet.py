"""Several server processes under one supervisor, which restarts those that die.

They are started and stopped together.
"""

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from reward_server.processes.process import START_TIMEOUT_S, ServerProcess, ServerStartError
from reward_server.processes.serve import bind

log = logging.getLogger(__name__)

_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 60.0
_SETTLED_S = 600.0  # a server that ran this long has its restarts forgiven
_POLL_S = 0.2


class Fleet:
    """Keeps one server per GPU alive until told to stop."""

    def __init__(
        self,
        gpu_ids: Sequence[str],
        *,
        host: str,
        first_port: int,
        flags: Sequence[str],
        log_dir: Path,
        max_restarts: int,
    ):
        self._host, self._flags, self._max_restarts = host, list(flags), max_restarts
        self._stopping = threading.Event()
        self._slots = [
            _Slot(
                gpu,
                first_port + number,
                log_dir / f"reward_server_{f'gpu_{gpu}' if gpu else 'cpu'}.log",
            )
            for number, gpu in enumerate(gpu_ids)
        ]

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    @property
    def servers(self) -> list[ServerProcess]:
        """Those that were started and not given up."""
        return [slot.server for slot in self._slots if slot.server is not None]

    def start(self, timeout_s: float = START_TIMEOUT_S) -> None:
        """Start all at the same time and wait until all are healthy.

        Raises ServerStartError; none is left then.
        """
        for slot in self._slots:
            check_free(self._host, slot.port)
        try:
            for slot in self._slots:
                self._spawn(slot)
            for server in self.servers:
                server.wait_healthy(timeout_s, give_up=self._stopping)
        except BaseException:
            self.stop()
            raise

    def watch(self) -> int:
        """Restart what dies until `ask_to_stop`; 0 then, 1 when every server had to be given up."""
        while not self._stopping.wait(_POLL_S):
            now = time.monotonic()
            for slot in self._slots:
                self._tend(slot, now)
            if not self.servers and not any(slot.restart_at for slot in self._slots):
                log.error("every reward server was given up")
                return 1
        return 0

    def ask_to_stop(self, *_) -> None:
        """Make `watch` return; a signal handler."""
        self._stopping.set()

    def stop(self) -> None:
        """Stop all servers; they end at the same time."""
        for server in self.servers:
            server.terminate()
        for server in self.servers:
            server.stop()

    def _spawn(self, slot: "_Slot") -> None:
        env = {"CUDA_VISIBLE_DEVICES": slot.gpu}
        slot.server = ServerProcess(
            self._flags, port=slot.port, host=self._host, log_path=slot.log_path, env=env
        )
        slot.started_at, slot.restart_at = time.monotonic(), None

    def _tend(self, slot: "_Slot", now: float) -> None:
        if slot.restart_at is not None:
            if now >= slot.restart_at:
                self._spawn(slot)
            return
        if slot.server is None or (status := slot.server.exit_status()) is None:
            return
        if now - slot.started_at > _SETTLED_S:
            slot.restarts = 0
        if slot.restarts >= self._max_restarts:
            log.error(
                "the reward server on port %d ended with status %d; given up after %d restarts\n%s",
                slot.port, status, slot.restarts, slot.server.log_tail(),
            )  # fmt: skip
            slot.server = None
            return
        pause = min(_BACKOFF_S * 2**slot.restarts, _MAX_BACKOFF_S)
        slot.restarts += 1
        slot.restart_at, slot.server = now + pause, None
        log.warning(
            "the reward server on port %d ended with status %d; restart %d of %d in %g s",
            slot.port, status, slot.restarts, self._max_restarts, pause,
        )  # fmt: skip


@contextmanager
def local_fleet(
    gpu_ids: Sequence[str],
    *,
    first_port: int,
    flags: Sequence[str] = (),
    log_dir: Path,
    max_restarts: int = 5,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Iterator[list[str]]:
    """A server on each of `gpu_ids` for this process: `with local_fleet(["4", "5"], ...) as urls:`.

    They listen on loopback from `first_port` on; one that dies is started again; all are gone after
    the block, and also when this process is killed. Raises ServerStartError.
    """
    flags = ["--device=cuda", *flags]
    fleet = Fleet(
        gpu_ids,
        host="127.0.0.1",
        first_port=first_port,
        flags=flags,
        log_dir=log_dir,
        max_restarts=max_restarts,
    )
    fleet.start(start_timeout_s)
    watch = threading.Thread(target=fleet.watch, name="reward-fleet", daemon=True)
    watch.start()
    try:
        yield [server.url for server in fleet.servers]
    finally:
        fleet.ask_to_stop()
        watch.join()
        fleet.stop()


class _Slot:
    """One port of the fleet and the server that has it now."""

    def __init__(self, gpu: str, port: int, log_path: Path):
        self.gpu, self.port, self.log_path = gpu, port, log_path
        self.server: ServerProcess | None = None
        self.started_at = 0.0
        self.restarts = 0
        self.restart_at: float | None = None


def check_free(host: str, port: int) -> None:
    """Raises ServerStartError when the port is taken."""
    try:
        bind(host, port).close()
    except OSError as error:
        raise ServerStartError(
            f"port {port} on {host} must be free for a reward server. Got: {error.strerror}. "
            "Stop what listens there or choose another --port."
        ) from None
