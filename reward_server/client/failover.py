"""Asking one of several reward servers: preference, retries with backoff, deadline, circuit
breaker.

```
RewardClientError
├── RewardRejectedError      the server refused the request for good (4xx): token, size, form
└── RewardUnavailableError   the deadline passed; `.results` holds what was scored, None elsewhere
```
"""

import logging
import random
import threading
import time
from collections.abc import Sequence

import requests

log = logging.getLogger(__name__)

_CONNECT_S = 5.0
_MAX_BACKOFF_S = 10.0
_MAX_RETRY_AFTER_S = 30.0


class RewardClientError(RuntimeError):
    """Root of what this client raises."""


class RewardRejectedError(RewardClientError):
    """The server refused the request for good; sending it again would not help."""


class RewardUnavailableError(RewardClientError):
    """No server scored everything before the deadline. `results[i]` is None where item i is
    unscored."""

    def __init__(self, message: str, results: list):
        super().__init__(message)
        self.results = results


class Server:
    """One server's address and its circuit breaker."""

    def __init__(self, url: str, *, trip_after: int, max_pause_s: float):
        self.url = url.rstrip("/")
        self._trip_after, self._max_pause_s = trip_after, max_pause_s
        self._failures = 0
        self._open_until = 0.0
        self._lock = threading.Lock()

    def pause(self) -> float:
        """Seconds until this server may be asked again; 0 when it may now."""
        return max(0.0, self._open_until - time.monotonic())

    def succeeded(self) -> None:
        with self._lock:
            self._failures, self._open_until = 0, 0.0

    def failed(self) -> None:
        """Count a failure; from the `trip_after`th on, stay away for longer and longer."""
        with self._lock:
            self._failures += 1
            if self._failures >= self._trip_after:
                pause = min(0.5 * 2 ** (self._failures - self._trip_after), self._max_pause_s)
                self._open_until = time.monotonic() + pause


class Servers:
    """Servers in order of preference. Threads may `ask` at the same time; each has its own
    connection."""

    def __init__(
        self,
        urls: Sequence[str],
        *,
        token: str | None,
        request_timeout_s: float,
        trip_after: int,
        max_pause_s: float,
    ):
        self.servers = [Server(url, trip_after=trip_after, max_pause_s=max_pause_s) for url in urls]
        self._request_timeout_s = request_timeout_s
        self._headers = {"Content-Type": "application/json"}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._local = threading.local()
        self._sessions: list[requests.Session] = []
        self._closing = threading.Event()

    def close(self) -> None:
        """Make every `ask` under way give up, and end the connections."""
        self._closing.set()
        for session in self._sessions:
            session.close()

    def ask(self, method: str, path: str, body: bytes | None, stop_at: float) -> dict:
        """The JSON answer of whichever server gives one first in order of preference, until
        `stop_at`.

        `body`: JSON, encoded once for all attempts.
        """
        delay, reason = 0.1, "no server was asked"
        while time.monotonic() < stop_at and not self._closing.is_set():
            wait = min(server.pause() for server in self.servers)
            for server in self.servers:
                left = stop_at - time.monotonic()
                if server.pause() > 0 or left <= 0:
                    continue
                answer, reason, wait = self._try(server, method, path, body, left)
                if answer is not None:
                    return answer
            wait = max(wait, delay * random.uniform(0.5, 1.5))
            self._closing.wait(max(0.0, min(wait, stop_at - time.monotonic())))
            delay = min(delay * 2, _MAX_BACKOFF_S)
        raise RewardUnavailableError(f"no reward server answered in time (last: {reason})", [])

    def _try(self, server: Server, method: str, path: str, body: bytes | None, left: float):
        """One request: (answer or None, why none, seconds to wait). Raises RewardRejectedError."""
        timeout = (min(_CONNECT_S, left), min(self._request_timeout_s, left))
        try:
            response = self._session().request(
                method, server.url + path, data=body, timeout=timeout
            )
            if response.status_code in (200, 207):
                answer = response.json()
                server.succeeded()
                return answer, "", 0.0
        except (requests.RequestException, ValueError) as error:
            server.failed()
            log.warning("reward server %s failed: %s", server.url, error)
            return None, f"{server.url}: {error}", 0.0
        reason = f"{server.url}{path} answered {response.status_code}: {response.text[:300]}"
        if response.status_code in (429, 503):  # alive but busy or loading: no fault of its own
            return (
                None,
                reason,
                min(_seconds(response.headers.get("Retry-After")), _MAX_RETRY_AFTER_S),
            )
        if response.status_code >= 500:
            server.failed()
            log.warning(reason)
            return None, reason, 0.0
        raise RewardRejectedError(reason)

    def _session(self) -> requests.Session:
        session = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.trust_env = False  # neither a proxy nor ~/.netrc may step between
            session.headers.update(self._headers)
            self._sessions.append(session)
        return session


def _seconds(retry_after: str | None) -> float:
    try:
        return max(0.0, float(retry_after or 1))
    except ValueError:
        return 1.0
