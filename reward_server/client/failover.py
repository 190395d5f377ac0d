"""Asking one of several reward servers: the least busy first, retries, deadline, circuit breaker.

```
RewardClientError
├── RewardRejectedError      for good: token, size, form (4xx), or a server that is set up unlike
└── RewardUnavailableError   the deadline passed; `.results` holds what was scored, None elsewhere
```
"""

import itertools
import logging
import random
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import requests

log = logging.getLogger(__name__)

# Header of every answer: a digest of what decides the server's scores (`fingerprint` of `/info`).
FINGERPRINT_HEADER = "X-Reward-Fingerprint"
# Header of every answer of a server that has `/score_files` and knows an item's `components` (from
# 2 on), and whose scorers all keep to the mask, so that an item may be a part of its picture (3).
PROTOCOL_HEADER, FILES, PARTS = "X-Reward-Protocol", 2, 3
REQUEST_ID_HEADER = "X-Request-Id"

_CONNECT_S = 5.0
_MAX_BACKOFF_S = 10.0
_MAX_RETRY_AFTER_S = 30.0


class RewardClientError(RuntimeError):
    """Root of what this client raises."""


class RewardRejectedError(RewardClientError):
    """Refused for good; sending it again would not help.

    `results[i]` is what was scored of other requests of the call, None elsewhere.
    """

    def __init__(self, message: str, results: Sequence = ()):
        super().__init__(message)
        self.results = list(results)


class RewardUnavailableError(RewardClientError):
    """No server scored everything before the deadline.

    `results[i]` is None where item i is unscored.
    """

    def __init__(self, message: str, results: list):
        super().__init__(message)
        self.results = results


@dataclass(frozen=True)
class Request:
    """What a server is asked; `body` is encoded once for all attempts."""

    method: str
    path: str
    body: bytes | None = None
    content_type: str = "application/json"


# A server's protocol (1 until it says more) -> what it is asked.
RequestFor = Callable[[int], Request]


class Server:
    """One server's address, the requests it has under way, and its circuit breaker."""

    def __init__(self, url: str, *, trip_after: int, max_pause_s: float):
        self.url = url.rstrip("/")
        self.outstanding = 0  # requests under way
        self.turn = 0  # number of the last request, counted over all servers
        self.there = False  # whether it answered the last request, if only that it is busy
        self.protocol = 1  # as its answers say
        self._trip_after, self._max_pause_s = trip_after, max_pause_s
        self._failures = 0
        self._open_until = 0.0
        self._lock = threading.Lock()

    def pause(self) -> float:
        """Return the seconds until this server may be asked again; 0 when it may now."""
        return max(0.0, self._open_until - time.monotonic())

    def succeeded(self) -> None:
        """Note that it works."""
        with self._lock:
            self._failures, self._open_until, self.there = 0, 0.0, True

    def failed(self) -> None:
        """Count a failure; from the `trip_after`th on, stay away for longer and longer."""
        with self._lock:
            self.there = False
            self._failures += 1
            if self._failures >= self._trip_after:
                pause = min(0.5 * 2 ** (self._failures - self._trip_after), self._max_pause_s)
                self._open_until = time.monotonic() + pause

    def busy(self, seconds: float) -> None:
        """Stay away for `seconds`: it is alive, and no failure is counted."""
        with self._lock:
            self._open_until, self.there = time.monotonic() + seconds, True


class Servers:
    """Servers that share the work. Threads may `ask` at the same time, each on its connection.

    All must be set up alike: the first fingerprint that is seen is expected of every later answer.
    """

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
        self._headers: dict[str, str] = {}
        if token:
            self._headers["Authorization"] = f"Bearer {token}"
        self._local = threading.local()
        self._sessions: list[requests.Session] = []
        self._closing = threading.Event()
        self._lock = threading.Lock()
        self._turns = itertools.count(1)
        self._expected: tuple[str, str] | None = None  # fingerprint, and the server that gave it

    def close(self) -> None:
        """Make every `ask` under way give up, and end the connections."""
        self._closing.set()
        for session in self._sessions:
            session.close()

    def ask(self, request: Request | RequestFor, stop_at: float) -> dict:
        """Return the JSON answer of the first server that gives one until `stop_at`.

        The server with the fewest requests under way is asked first, the others when it fails.
        Raises RewardRejectedError and RewardUnavailableError.
        """
        delay, reason = 0.1, "no server was asked"
        # Each turn asks every server that may be asked once, then waits.
        while time.monotonic() < stop_at and not self._closing.is_set():
            tried: set[Server] = set()
            while time.monotonic() < stop_at and (server := self._take(tried)) is not None:
                tried.add(server)
                answer, reason = self._try(server, request, stop_at)
                if answer is not None:
                    return answer
            # Until the first may be asked again; at random, so that clients do not return together.
            wait = min(server.pause() for server in self.servers)
            wait = max(wait, delay * random.uniform(0.5, 1.5))
            self._closing.wait(max(0.0, min(wait, stop_at - time.monotonic())))
            delay = min(delay * 2, _MAX_BACKOFF_S)
        raise RewardUnavailableError(f"no reward server answered in time (last: {reason})", [])

    def ask_all(self, request: Request, stop_at: float) -> tuple[list[dict], list[str]]:
        """Return the answers of the servers that give one now, and why the others give none.

        Raises RewardRejectedError.
        """
        answers, reasons = [], []
        tried: set[Server] = set()
        while (server := self._take(tried)) is not None:
            tried.add(server)
            answer, reason = self._try(server, request, stop_at)
            if answer is None:
                reasons.append(reason)
            else:
                answers.append(answer)
        return answers, reasons

    def _check_setup(self, server: Server, fingerprint: str | None) -> None:
        """Raise RewardRejectedError when `server` is set up unlike the one that answered first."""
        if fingerprint is None:  # a server of before: what it scores with is not known
            return
        with self._lock:
            self._expected = self._expected or (fingerprint, server.url)
            expected, first = self._expected
        if fingerprint != expected:
            raise RewardRejectedError(
                f"reward servers must be set up alike. Got {server.url} with the fingerprint"
                f" {fingerprint[:12]}, {first} answered with {expected[:12]}. Compare their /info"
                " (engines, models, digests, --disable-reward-model) and stop or restart the wrong"
                " one."
            )

    def _take(self, tried: set[Server]) -> Server | None:
        """Return the least busy server that may be asked now and is not in `tried`, if any.

        Among equals it is the one whose last request is longest ago: single requests go round.
        """
        with self._lock:
            free = [one for one in self.servers if one not in tried and one.pause() == 0]
            server = min(free, key=lambda one: (one.outstanding, one.turn), default=None)
            if server is not None:
                # Under the same lock as the choice, or two threads find the same server idle.
                server.outstanding += 1
                server.turn = next(self._turns)
            return server

    def wait(self, seconds: float) -> bool:
        """Wait; return whether `close` was called meanwhile."""
        return self._closing.wait(seconds)

    def _try(
        self, server: Server, asked: Request | RequestFor, stop_at: float
    ) -> tuple[dict | None, str]:
        """Ask `server`, which was taken, once: (answer or None, why none)."""
        left = max(0.001, stop_at - time.monotonic())
        request_id = uuid.uuid4().hex[:16]
        try:
            request = asked if isinstance(asked, Request) else asked(server.protocol)
            response = self._session().request(
                request.method,
                server.url + request.path,
                data=request.body,
                headers={
                    "Content-Type": request.content_type,
                    REQUEST_ID_HEADER: request_id,
                },
                timeout=(min(_CONNECT_S, left), min(self._request_timeout_s, left)),
            )
            if response.status_code in (200, 207):
                answer = response.json()
                self._check_setup(server, response.headers.get(FINGERPRINT_HEADER))
                server.protocol = _protocol(response.headers.get(PROTOCOL_HEADER))
                server.succeeded()
                return answer, ""
        except (requests.RequestException, ValueError) as error:  # no connection, or no JSON
            server.failed()
            reason = f"{server.url}: {_cause(error)}"
            log.warning("reward server %s", reason)
            return None, reason
        finally:
            with self._lock:
                server.outstanding -= 1
        reason = (
            f"{server.url}{request.path} answered {response.status_code}: {response.text[:300]}"
            f" (request {request_id})"
        )
        if response.status_code in (404, 405) and server.protocol > 1:
            server.protocol = 1  # started anew as an older one
            return None, reason
        if response.status_code in (429, 503):  # alive but busy or loading: no fault of its own
            server.busy(min(_seconds(response.headers.get("Retry-After")), _MAX_RETRY_AFTER_S))
            return None, reason
        if response.status_code >= 500:
            server.failed()
            log.warning(reason)
            return None, reason
        if response.status_code == 408:  # the way there was too slow this time
            return None, reason
        # What is left is the request's own fault: every other server would say the same.
        raise RewardRejectedError(reason)

    def _session(self) -> requests.Session:
        # One for each thread: a session of `requests` is not safe to share.
        session = getattr(self._local, "session", None)
        if session is None:
            session = self._local.session = requests.Session()
            session.trust_env = False  # neither a proxy nor ~/.netrc may step between
            session.headers.update(self._headers)
            self._sessions.append(session)
        return session


def _cause(error: BaseException) -> str:
    """Return what the system said, without the three libraries that passed it on."""
    while error.__context__ is not None:
        error = error.__context__
    return getattr(error, "strerror", None) or str(error) or type(error).__name__


def _protocol(named: str | None) -> int:
    return int(named) if named is not None and named.isdigit() else 1


def _seconds(retry_after: str | None) -> float:
    try:
        return max(0.0, float(retry_after or 1))
    except ValueError:
        return 1.0
