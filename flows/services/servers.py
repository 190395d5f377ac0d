"""Starts and stops what stands beside a training: Prefect's server and workers, and a lean MLflow
server.

python -m flows.services start [--runs-dir runs] [--prefect-port 4200] [--mlflow-port 5000]
python -m flows.services stop [--runs-dir runs]

Their logs and process ids lie in `RUNS_DIR/.services`. `prefect.toml`, written here while they run,
tells every `prefect` and `calligrapher` command of this folder where the server is.
"""

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from calligrapher.errors import CalligrapherError
from calligrapher.threads import wait_asleep
from flows.services.daemons import Daemons
from flows.services.loopback import answers, ask_this_machine_directly
from flows.services.prefect_api import QUIET
from tasks.artifacts.layout import RunsDir
from tasks.tracking.mlflow_setup import create_database

START_TIMEOUT_S = 300.0  # ten seconds on an idle machine
SETTINGS = Path("prefect.toml")
_MARK = "# Written by `make services`, deleted by `make services-stop`."


def start(runs_dir: Path, prefect_port: int, mlflow_port: int) -> list[str]:
    """Start what is not running yet; returns lines that say where everything is.

    Raises CalligrapherError when a server does not answer in time; none of ours is left running
    then.
    """
    ask_this_machine_directly()
    runs_dir = runs_dir.absolute()
    api, mlflow = f"http://127.0.0.1:{prefect_port}/api", f"http://127.0.0.1:{mlflow_port}"
    environment = QUIET | {
        "PREFECT_API_URL": api,
        "PREFECT_HOME": str(runs_dir / ".services" / "prefect"),
        "CALLIGRAPHER_MLFLOW_URL": mlflow,
    }
    wait_asleep()  # the workers' flows train beside these servers
    daemons = Daemons(runs_dir / ".services", os.environ | environment)
    _write_settings(api)
    try:
        daemons.start("prefect-server", _prefect("server", "start", "--port", str(prefect_port)))
        # A run may be creating it as well.
        create_database(f"sqlite:///{RunsDir(runs_dir).mlflow_database}")
        daemons.start("mlflow", *mlflow_server(runs_dir, mlflow_port))
        wait_answers(daemons, "prefect-server", f"{api}/health")
        deploy = [sys.executable, "-m", "flows.services.deploy"]
        subprocess.run(deploy, env=daemons.environment, check=True, stdin=subprocess.DEVNULL)
        for pool in ("calligrapher-train", "calligrapher-evaluate"):
            daemons.start(
                f"worker-{pool}", _prefect("worker", "start", "--pool", pool, "--name", pool)
            )
        wait_answers(daemons, "mlflow", f"{mlflow}/health")
    except BaseException:
        stop(runs_dir)
        raise
    return [
        f"Prefect  http://127.0.0.1:{prefect_port}",
        f"MLflow   {mlflow}",
        f"Logs     {daemons.folder}",
        "Train    prefect deployment run rl-train/tiny-nft --watch",
    ]


def stop(runs_dir: Path) -> list[str]:
    """Stop exactly what `start` started, workers first; a training in their hands ends
    resumable."""
    stopped = Daemons(runs_dir.absolute() / ".services", os.environ).stop_all()
    if SETTINGS.is_file() and SETTINGS.read_text().startswith(_MARK):
        SETTINGS.unlink()
    return [f"stopped {name}" for name in stopped] or ["nothing was running"]


def _write_settings(api: str) -> None:
    if SETTINGS.is_file() and not SETTINGS.read_text().startswith(_MARK):
        raise CalligrapherError(
            f"{SETTINGS} must not be there: `make services` writes its own. Delete it, or start the"
            " servers yourself (docs/operations.md)."
        )
    SETTINGS.write_text(f'{_MARK}\n[api]\nurl = "{api}"\n')


def _prefect(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "prefect", *arguments]


def mlflow_server(runs_dir: Path, port: int) -> tuple[list[str], dict[str, str]]:
    """Command and environment. One worker and no job runner: 2 processes and 0.5 GB, not 14 and 2.5
    GB."""
    store = ["--backend-store-uri", f"sqlite:///{RunsDir(runs_dir).mlflow_database}"]
    place = ["--artifacts-destination", str(runs_dir / "mlartifacts"), "--host", "127.0.0.1"]
    command = [sys.executable, "-m", "mlflow", "server", "--workers", "1", "--port", str(port)]
    return [*command, *store, *place], {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}


def wait_answers(daemons: Daemons, name: str, url: str) -> None:
    """Return once `url` answers; CalligrapherError, with the end of its log, when it does not in
    time."""
    stop_at = time.monotonic() + START_TIMEOUT_S
    while True:
        if answers(url):
            return
        if not daemons.running(name) or time.monotonic() > stop_at:
            raise CalligrapherError(
                f"{name} must answer at {url} within {START_TIMEOUT_S:g} s. It did not; its log"
                f" ends:\n{daemons.log_tail(name)}"
            )
        time.sleep(0.2)


def main(argv: Sequence[str] | None = None) -> int:
    """Start or stop; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m flows.services", description=__doc__)
    parser.add_argument("command", choices=("start", "stop"))
    parser.add_argument("--runs-dir", type=Path, default=Path("runs"))
    parser.add_argument("--prefect-port", type=int, default=4200)
    parser.add_argument("--mlflow-port", type=int, default=5000)
    chosen = parser.parse_args(argv)
    try:
        if chosen.command == "start":
            lines = start(chosen.runs_dir, chosen.prefect_port, chosen.mlflow_port)
        else:
            lines = stop(chosen.runs_dir)
    except (CalligrapherError, subprocess.CalledProcessError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    sys.stdout.write("\n".join(lines) + "\n")
    return 0
