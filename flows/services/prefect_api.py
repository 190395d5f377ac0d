"""Prefect's API for a run that has no Prefect server: a child process that never outlives the run.

Prefect starts such a server by itself, but leaves it behind when the run is killed. The child is
`python -m flows.services.prefect_api`; its home and database are a temporary folder of its own.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from calligrapher.errors import CalligrapherError
from flows.services.loopback import answers, ask_this_machine_directly

logger = logging.getLogger(__name__)

QUIET = {
    "DO_NOT_TRACK": "true",
    "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
}  # Prefect tells nobody anything
START_TIMEOUT_S = (
    300.0  # its imports and migrations take 10 s on an idle core, much longer on a busy one
)
_PR_SET_PDEATHSIG = 1


@contextmanager
def prefect_api() -> Iterator[str]:
    """The API's URL for the block: of the server that Prefect's settings name, else of a child of
    ours.

    A named server that does not answer is replaced by a child, with a warning. Raises
    CalligrapherError when the child does not start.
    """
    from prefect.settings import PREFECT_API_URL, PREFECT_LOGGING_TO_API_ENABLED, temporary_settings

    ask_this_machine_directly()
    if configured := PREFECT_API_URL.value():
        if answers(f"{configured}/health"):
            yield configured
            return
        logger.warning(
            "no Prefect server answers at %s: this run is not shown in its UI", configured
        )
    with socket.create_server(("127.0.0.1", 0)) as listener:
        # The child inherits the open port, so that nobody can take it in between.
        child = subprocess.Popen(
            [
                sys.executable,
                "-m",
                "flows.services.prefect_api",
                str(listener.fileno()),
                str(os.getpid()),
            ],
            pass_fds=[listener.fileno()],
            env=os.environ | QUIET,
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C reaches only the run, which ends its children in order
        )
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/api"
    try:
        _wait_healthy(child, url)
        # Logs stand on the terminal: sending the last ones to an API that ends with the run would
        # fail.
        with temporary_settings({PREFECT_API_URL: url, PREFECT_LOGGING_TO_API_ENABLED: False}):
            yield url
    finally:
        child.terminate()
        try:
            child.wait(10)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _wait_healthy(child: subprocess.Popen, url: str) -> None:
    stop_at = time.monotonic() + START_TIMEOUT_S
    while True:
        if answers(f"{url}/health"):
            return
        if child.poll() is not None or time.monotonic() > stop_at:
            raise CalligrapherError(
                f"Prefect's API must start within {START_TIMEOUT_S:g} s. It did not (exit status"
                f" {child.poll()}). Its messages are above. Or `make services` starts a server that"
                " stays."
            )
        time.sleep(0.1)


def serve(descriptor: int, parent: int) -> None:
    """Serve Prefect's API on an open socket until the process `parent` is gone or SIGTERM comes."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # unwinds: the home is deleted
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return
    with tempfile.TemporaryDirectory(prefix="calligrapher-prefect-") as home:
        _forget_settings(Path(home))
        import uvicorn
        from prefect.server.api.server import create_app

        uvicorn.run(
            create_app(ephemeral=True, final=True), fd=descriptor, log_level="error", lifespan="on"
        )


def _forget_settings(home: Path) -> None:
    """Leave nothing of the user's Prefect to this process: no settings, no home, no database.

    Another version's database would end the start, and one that is shared would be migrated.
    """
    for name in [name for name in os.environ if name.startswith("PREFECT_")]:
        del os.environ[name]
    os.environ |= QUIET | {
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"sqlite+aiosqlite:///{home / 'prefect.db'}",
    }
    os.chdir(home)  # no `prefect.toml` of the folder in which the run was started


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
