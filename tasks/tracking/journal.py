"""A JSONL file that is only appended to: each record stands once, and crashes leave no half
line."""

import json
import os
import threading
from collections.abc import Callable, Hashable, Iterable
from pathlib import Path
from typing import Any

METRICS_FILE, EVENTS_FILE, REPORT = "metrics.jsonl", "events.jsonl", "report"
Entry = dict[str, Any]


class Journal:
    """The records of a file, told apart by `key(record)`. Several threads of a process may
    append."""

    def __init__(self, path: Path, key: Callable[[Entry], Hashable]) -> None:
        self.path = path
        self._key = key
        self._lock = threading.Lock()
        self.end = _cut_half_line(path)
        self._seen = {key(record) for record in self.read()}

    def append(self, records: Iterable[Entry]) -> int:
        """Write the records whose keys are new, and have them on disk on return; the number of
        them."""
        with self._lock:
            fresh: dict[Hashable, Entry] = {}
            for record in records:
                key = self._key(record)
                if key not in self._seen:
                    fresh.setdefault(key, record)
            if not fresh:
                return 0
            lines = "".join(
                json.dumps(record, allow_nan=False) + "\n" for record in fresh.values()
            ).encode()
            with self.path.open("ab") as file:
                try:
                    file.write(lines)
                    file.flush()
                    os.fsync(file.fileno())
                except OSError:
                    os.truncate(self.path, self.end)
                    raise
            self.end += len(lines)
            self._seen |= fresh.keys()
            return len(fresh)

    def read(self, start: int = 0, end: int | None = None) -> list[Entry]:
        """The records between two byte offsets at which lines begin; `end` None = all there are
        now."""
        end = self.end if end is None else end
        if end <= start:
            return []
        with self.path.open("rb") as file:
            file.seek(start)
            return [json.loads(line) for line in file.read(end - start).splitlines()]


def run_journals(run_dir: Path) -> tuple[Journal, Journal]:
    """Return the journals of a run: its metrics, and what else a tracker is told."""

    def event_key(record: Entry) -> str:
        return json.dumps({k: v for k, v in record.items() if k != "time"}, sort_keys=True)

    metrics = Journal(run_dir / METRICS_FILE, lambda record: (record["stage"], record["step"]))
    return metrics, Journal(run_dir / EVENTS_FILE, event_key)


def whole_lines(path: Path) -> list[Entry]:
    """Return the records of a journal that another process may be writing to; [] without a file."""
    data = path.read_bytes() if path.is_file() else b""
    return [json.loads(line) for line in data[: data.rfind(b"\n") + 1].splitlines()]


def _cut_half_line(path: Path) -> int:
    """Cut off what a killed writer left after the last whole line; returns the size that
    remains."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    if end < len(data):
        os.truncate(path, end)
    return end
