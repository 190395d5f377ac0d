"""One server process seen from outside: started, awaited, stopped; and one for a `with` block."""

import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from reward_server.processes.serve import EXIT_PORT_TAKEN

# Not 8000-8999: Prefect's ephemeral API picks random ports there.
LOCAL_PORTS = range(18000, 19000)
START_TIMEOUT_S = (
    600.0  # loading the OCR takes 4 s on an idle core, minutes beside a training on few cores
)
STOP_TIMEOUT_S = 15.0


class ServerStartError(RuntimeError):
    """A server process did not become healthy; the message ends with the tail of its log."""

    def __init__(self, message: str, exit_status: int | None = None):
        super().__init__(message)
        self.exit_status = exit_status


def url_of(host: str, port: int) -> str:
    """Where a server bound to `host` is asked from this machine: all addresses mean loopback."""
    address = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"http://[{address}]:{port}" if ":" in address else f"http://{address}:{port}"


class ServerProcess:
    """A `python -m reward_server` child. It stops by itself when this process is gone, however that
    came."""

    def __init__(
        self,
        flags: Sequence[str],
        *,
        port: int,
        host: str = "127.0.0.1",
        log_path: Path,
        env: dict | None = None,
        module: str = "reward_server",
    ):
        self.port, self.log_path = port, log_path
        self.url = url_of(host, port)
        command = [sys.executable, "-m", module, f"--host={host}", f"--port={port}", *flags]
        log_path.parent.mkdir(parents=True, exist_ok=True)
        with log_path.open("ab") as log_file:
            self._child = subprocess.Popen(
                [*command, f"--parent-pid={os.getpid()}"],
                stdin=subprocess.DEVNULL,
                stdout=log_file,
                stderr=subprocess.STDOUT,
                env={**os.environ, **(env or {})},
                start_new_session=True,  # Ctrl-C reaches the parent alone, which stops its children
            )

    @property
    def pid(self) -> int:
        return self._child.pid

    def exit_status(self) -> int | None:
        """None while it runs."""
        return self._child.poll()

    def healthy(self) -> bool:
        """True when this very process (not another on the port) answers that it is ready."""
        try:
            # No proxy of the environment may step between: it is on this machine.
            opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
            with opener.open(self.url + "/health", timeout=2) as answer:
                return json.load(answer).get("pid") == self.pid
        except (OSError, ValueError):
            return False

    def wait_healthy(
        self, timeout_s: float = START_TIMEOUT_S, *, give_up: threading.Event | None = None
    ) -> None:
        """Return once it is ready, or `give_up` is set.

        Raises ServerStartError when it ends or takes too long.
        """
        stop_at = time.monotonic() + timeout_s
        while not self.healthy() and not (give_up and give_up.is_set()):
            status = self.exit_status()
            if status is not None:
                raise ServerStartError(
                    f"the reward server on port {self.port} ended with status"
                    f" {status}.\n{self.log_tail()}",
                    status,
                )
            if time.monotonic() > stop_at:
                raise ServerStartError(
                    f"the reward server on port {self.port} is not ready after {timeout_s:g} s\n"
                    f"{self.log_tail()}"
                )
            time.sleep(0.1)

    def log_tail(self, lines: int = 20) -> str:
        """Where the log is and how it ends."""
        try:
            tail = self.log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:]
        except OSError as error:
            tail = [str(error)]
        return "\n".join([f"--- end of {self.log_path}:", *tail])

    def terminate(self) -> None:
        """Ask it to stop; does not wait."""
        if self.exit_status() is None:
            self._child.terminate()

    def stop(self) -> None:
        """Ask it to stop, insist after a while, return when it is gone."""
        self.terminate()
        try:
            self._child.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._child.kill()
            self._child.wait()


@contextmanager
def local_server(
    port: int | None = None,
    *,
    ocr_threads: int = 1,
    disable_reward_model: bool = False,
    flags: Sequence[str] = (),
    log_path: Path | None = None,
    start_timeout_s: float = START_TIMEOUT_S,
) -> Iterator[str]:
    """A reward server of this process's own: `with local_server() as url:`.

    `port`: None takes a free one of LOCAL_PORTS. `flags`: further flags of `python -m
    reward_server`. The server is gone after the block, and also when this process is killed. Raises
    ServerStartError.
    """
    flags = [f"--ocr-threads={ocr_threads}", *flags]
    if disable_reward_model:
        flags.append("--disable-reward-model")
    with tempfile.TemporaryDirectory(prefix="reward-server-") as folder:
        log_path = log_path or Path(folder) / "server.log"
        server = _start_on_a_port(
            flags, [port] if port is not None else _shuffled_ports(), log_path, start_timeout_s
        )
        try:
            yield server.url
        finally:
            server.stop()


def _shuffled_ports() -> list[int]:
    ports = list(LOCAL_PORTS)
    random.SystemRandom().shuffle(
        ports
    )  # not the seeded generator: two runs with one seed must not collide
    return ports[:20]


def _start_on_a_port(
    flags: Sequence[str], ports: list[int], log_path: Path, timeout_s: float
) -> ServerProcess:
    for port in ports:
        server = ServerProcess(flags, port=port, log_path=log_path)
        try:
            server.wait_healthy(timeout_s)
            return server
        except ServerStartError as error:
            if error.exit_status != EXIT_PORT_TAKEN or port == ports[-1]:
                raise
        except BaseException:
            server.stop()
            raise
    raise AssertionError("ports is never empty")
