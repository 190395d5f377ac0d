"""Prefect's API for a run that has no Prefect server: a child process that never outlives the run.

Prefect starts such a server by itself, but leaves it behind when the run is killed. The child is
`python -m flows.services.prefect_api`.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from calligrapher.errors import CalligrapherError
from flows.services.loopback import ask_this_machine_directly

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
        if _answers(configured):
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


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url + "/health", timeout=5):
            return True
    except urllib.error.HTTPError:  # a server all the same, which wants to be asked in another way
        return True
    except OSError:
        return False


def _wait_healthy(child: subprocess.Popen, url: str) -> None:
    stop_at = time.monotonic() + START_TIMEOUT_S
    while True:
        if _answers(url):
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
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:
        return
    import uvicorn
    from prefect.server.api.server import create_app

    uvicorn.run(
        create_app(ephemeral=True, final=True), fd=descriptor, log_level="error", lifespan="on"
    )


if __name__ == "__main__":
    serve(int(sys.argv[1]), int(sys.argv[2]))
