"""What stands before the service: token, limits of bodies, time and requests, names, counting.

No more requests are let in than the service can hold. A plain ASGI middleware, because it must
refuse before a byte of the body is read into memory.
"""

import asyncio
import hmac
import json
import logging
import re
import time
import uuid
from contextlib import suppress
from dataclasses import dataclass, field

from reward_server.client.failover import REQUEST_ID_HEADER
from reward_server.service.metrics import Metrics

log = logging.getLogger(__name__)

# Who looks after the process asks these without a token.
OPEN_PATHS = ("/health", "/livez", "/readyz")
_KNOWN_PATHS = (
    *OPEN_PATHS, "/score", "/score_batch", "/score_files", "/info", "/metrics", "/openapi.json",
    "/docs",
)  # fmt: skip
# Path -> the type that its bodies must have.
_TYPES = {
    "/score": "application/json",
    "/score_batch": "application/json",
    "/score_files": "multipart/form-data",
}
_BODIES_IN_HOUSE = 16  # times max_body_bytes: what all bodies under way may hold together
_BODIES_COMING_IN = 4  # times max_requests: bodies that are not whole yet
_BODY_TIMEOUTS = 10  # times body_timeout: what a body may take in all
_CLOSE = (b"connection", b"close")
_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:-]{1,128}")


@dataclass(frozen=True)
class _Refusal:
    status: int
    detail: str
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)
    drain: bool = True  # read what the client still sends, so that it sees the answer


class _RefusedError(Exception):
    """Ends the application's reading of a body; what it answers to that is dropped."""


class Guard:
    """Wraps the application.

    `max_requests`: how many may be under way at one time, those with a whole body; four times as
    many bodies may be coming in. `body_timeout`: seconds that a body may pause.
    """

    def __init__(
        self,
        app,
        *,
        token: str | None,
        max_body_bytes: int,
        max_requests: int,
        body_timeout: float,
        metrics: Metrics,
    ):
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.bytes_under_way = 0
        self._token = token.encode() if token else None
        self._max_requests = max_requests
        self.body_timeout = body_timeout
        self._metrics = metrics
        self.requests_under_way = self.bodies_coming_in = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = {key.lower(): value for key, value in scope["headers"]}
        exchange = _Exchange(self, receive, send, scope, headers)
        exchange.refusal = self._refusal(scope["path"], headers)
        try:
            if exchange.refusal is None:
                await self._pass_on(scope, exchange)
            if exchange.refusal is not None:
                self._metrics.rejected.labels(str(exchange.refusal.status)).inc()
                await exchange.refuse()
        finally:
            path = scope["path"] if scope["path"] in _KNOWN_PATHS else "other"
            self._metrics.requests.labels(path, str(exchange.status)).inc()
            seconds = time.perf_counter() - started
            self._metrics.latency.labels(path).observe(seconds)
            log.log(
                logging.ERROR if exchange.status == 500 else logging.DEBUG,
                "%s %s %d, %d bytes, %.0f ms, request %s",
                scope["method"], scope["path"], exchange.status, exchange.received, 1e3 * seconds,
                exchange.request_id.decode(),
            )  # fmt: skip

    async def _pass_on(self, scope, exchange: "_Exchange") -> None:
        exchange.entered()
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except _RefusedError:
            pass
        except asyncio.CancelledError:
            # The server stops and has waited for us as long as it may: another can take this.
            exchange.refusal = _busy("the server is stopping", [_CLOSE], drain=False)
        finally:
            exchange.left()

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> _Refusal | None:
        """Why the request must not go further, judged by its head."""
        if self._token is not None and path not in OPEN_PATHS:
            scheme, _, sent = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(sent.strip(), self._token):
                detail = "the header `Authorization: Bearer <token>` must hold this server's token"
                return _Refusal(401, detail, [(b"www-authenticate", b"Bearer")])
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.max_body_bytes:
            return self.too_large()
        if path in OPEN_PATHS:
            return None
        if self.bodies_coming_in >= _BODIES_COMING_IN * self._max_requests:
            return _busy(f"{self.bodies_coming_in} bodies are coming in")
        return self.crowded()

    def crowded(self) -> _Refusal | None:
        """Why no further request may go on to the application now."""
        if self.requests_under_way >= self._max_requests:
            return _busy(f"{self.requests_under_way} requests are under way")
        return None

    def body_refusal(self, received: int) -> _Refusal | None:
        """Why no more of a body may be read, judged by its bytes so far and those of all others."""
        if received > self.max_body_bytes:
            return self.too_large()
        if self.bytes_under_way > _BODIES_IN_HOUSE * self.max_body_bytes:
            return _busy(f"{self.bytes_under_way} bytes of requests are under way", [_CLOSE])
        return None

    def too_large(self) -> _Refusal:
        detail = f"a request's body must have at most {self.max_body_bytes} bytes; split the batch"
        return _Refusal(413, detail, [_CLOSE])


class _Exchange:
    """One request and its answer: bytes counted on the way in, the status noted on the way out."""

    def __init__(self, guard: Guard, receive, send, scope, headers: dict[bytes, bytes]):
        self.refusal: _Refusal | None = None
        self.status = 500  # what the server answers when the application raises
        self.received = 0
        named = headers.get(REQUEST_ID_HEADER.lower().encode(), b"")
        self.request_id = named if _REQUEST_ID.fullmatch(named) else uuid.uuid4().hex[:16].encode()
        self._guard, self._receive, self._send = guard, receive, send
        self._wrong_type = _wrong_type(scope["path"], headers) if _has_body(scope) else None
        self._open, self._answering = scope["path"] in OPEN_PATHS, False
        self._more_body = True
        self._stop_at = time.monotonic() + _BODY_TIMEOUTS * guard.body_timeout
        self._whole = not _has_body(scope)

    def entered(self) -> None:
        """The application has begun with it."""
        self._count(+1)

    def left(self) -> None:
        """The application is done with it."""
        self._count(-1)
        self._guard.bytes_under_way -= self.received

    async def receive(self):
        if self._whole:
            return await self._receive()  # the end of the connection, or the empty body of a GET
        try:
            left = max(0.0, self._stop_at - time.monotonic())
            message = await asyncio.wait_for(self._receive(), min(self._guard.body_timeout, left))
        except TimeoutError:
            self.refusal = _Refusal(
                408,
                f"a request's body must come without a pause of {self._guard.body_timeout:g} s and"
                f" within {_BODY_TIMEOUTS * self._guard.body_timeout:g} s."
                f" Got {self.received} bytes of it.",
                [_CLOSE],
                drain=False,
            )
            raise _RefusedError from None
        size = len(message.get("body", b""))
        self._more_body = message.get("more_body", False)
        self.received += size
        self._guard.bytes_under_way += size
        if size:
            self.refusal = self._guard.body_refusal(self.received)
        if self.refusal is None and not self._more_body:
            self.refusal = self._wrong_type or self._guard.crowded()
            self._count(-1)
            self._whole = True
            self._count(+1)
        if self.refusal is not None:
            raise _RefusedError
        return message

    async def send(self, message) -> None:
        if self.refusal is not None:
            return
        if message["type"] == "http.response.start":
            self.status, self._answering = message["status"], True
            message = {**message, "headers": [*message["headers"], self._named()]}
        await self._send(message)

    def _named(self) -> tuple[bytes, bytes]:
        return REQUEST_ID_HEADER.lower().encode(), self.request_id

    def _count(self, step: int) -> None:
        if not self._whole:
            self._guard.bodies_coming_in += step
        elif not self._open:
            self._guard.requests_under_way += step

    async def refuse(self) -> None:
        """Answer, and read the body's rest for a while.

        Who still sends would see a broken pipe instead.
        """
        assert self.refusal is not None
        if self._answering:  # too late for another answer
            return
        self.status = self.refusal.status
        body = json.dumps({"detail": self.refusal.detail}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            self._named(),
            *self.refusal.headers,
        ]
        await self._send({"type": "http.response.start", "status": self.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        left = 4 * self._guard.max_body_bytes if self.refusal.drain else 0
        with suppress(TimeoutError):
            async with asyncio.timeout(self._guard.body_timeout):
                while self._more_body and left > 0:
                    message = await self._receive()
                    left -= len(message.get("body", b""))
                    self._more_body = message.get("more_body", False)
        await self._send({"type": "http.response.body", "body": b""})


def _busy(
    detail: str, headers: list[tuple[bytes, bytes]] | None = None, *, drain: bool = True
) -> _Refusal:
    return _Refusal(503, detail, [(b"retry-after", b"1"), *(headers or [])], drain)


def _has_body(scope) -> bool:
    return scope["method"] not in ("GET", "HEAD", "OPTIONS")


def _wrong_type(path: str, headers: dict[bytes, bytes]) -> _Refusal | None:
    """Why a body of this type cannot be read, with the header that is to be set."""
    if path not in _TYPES:
        return None
    sent = headers.get(b"content-type", b"").decode("latin-1")
    kind, wanted = sent.partition(";")[0].strip().lower(), _TYPES[path]
    json_like = kind.startswith("application/") and kind.endswith("+json")
    if kind != wanted and not (wanted == "application/json" and json_like):
        return _Refusal(
            415,
            f"the header `Content-Type` must be {wanted} for {path}. Got {sent[:100]!r};"
            f" pictures as files go to /score_files as multipart/form-data.",
        )
    coding = headers.get(b"content-encoding", b"identity").decode("latin-1")
    if coding.strip().lower() not in ("identity", ""):
        return _Refusal(
            415,
            f"the header `Content-Encoding` must be absent: bodies are not compressed. Got"
            f" {coding[:100]!r}; send the body as it is.",
        )
    return None
