"""Background processes that outlive the command that started them, found again by pid and start
time."""

import contextlib
import json
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import psutil

from calligrapher.durable import atomic_write

STOP_TIMEOUT_S = 20.0
_LOG_TAIL = 2000  # characters


class Daemons:
    """The processes noted in `folder`: `NAME.json` and `NAME.log` for each, in the order of their
    start."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self.folder, self.environment = folder, dict(environment)

    def start(
        self, name: str, command: Sequence[str], more: Mapping[str, str] | None = None
    ) -> None:
        """Start `command` unless it runs; `more` is added to its environment."""
        if self.running(name):
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        with (self.folder / f"{name}.log").open("ab") as log:
            child = subprocess.Popen(
                command,
                env=self.environment | dict(more or {}),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        born = psutil.Process(child.pid).create_time()
        atomic_write(self._note(name), json.dumps({"pid": child.pid, "born": born}).encode())

    def running(self, name: str) -> bool:
        """Whether the noted process is there; another one that got its pid does not count."""
        return self._process(name) is not None

    def stop_all(self) -> list[str]:
        """End all, the last started first, with everything that they started; their names.

        Each is asked with SIGTERM and killed after `STOP_TIMEOUT_S`.
        """
        notes = sorted(
            self.folder.glob("*.json"), key=lambda note: note.stat().st_mtime_ns, reverse=True
        )
        stopped = []
        for note in notes:
            process = self._process(note.stem)
            if process is not None:
                _end(process)
                stopped.append(note.stem)
            note.unlink()
        return stopped

    def log_tail(self, name: str) -> str:
        """The end of what the process wrote."""
        return (self.folder / f"{name}.log").read_text(errors="replace")[-_LOG_TAIL:]

    def _note(self, name: str) -> Path:
        return self.folder / f"{name}.json"

    def _process(self, name: str) -> psutil.Process | None:
        try:
            note = json.loads(self._note(name).read_bytes())
            process = psutil.Process(note["pid"])
            same = abs(process.create_time() - note["born"]) < 0.1
            return process if same and process.status() != psutil.STATUS_ZOMBIE else None
        except (FileNotFoundError, psutil.NoSuchProcess):
            return None


def _end(process: psutil.Process) -> None:
    family = [*process.children(recursive=True), process]
    for member in family:
        _signal(member.terminate)
    _, alive = psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)
    for member in alive:
        _signal(member.kill)
    psutil.wait_procs(alive, timeout=STOP_TIMEOUT_S)


def _signal(send: Callable[[], None]) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        send()
