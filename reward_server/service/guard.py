"""What stands before the service: bearer token, body limit, limit of requests, counting.

No more requests are let in than the service can hold. A plain ASGI middleware, because it must
refuse before a byte of the body is read into memory.
"""

import hmac
import json
import time
from dataclasses import dataclass, field

from reward_server.service.metrics import Metrics

_OPEN_PATHS = ("/health",)  # a load balancer asks without a token
_KNOWN_PATHS = ("/score", "/score_batch", "/health", "/info", "/metrics", "/openapi.json")
_BODIES_IN_HOUSE = 16  # times max_body_bytes: what all bodies under way may hold together
_CLOSE = (b"connection", b"close")


@dataclass(frozen=True)
class _Refusal:
    status: int
    detail: str
    headers: list[tuple[bytes, bytes]] = field(default_factory=list)


class _RefusedError(Exception):
    """Ends the application's reading of a body; what it answers to that is dropped."""


class Guard:
    """Wraps the application. `max_requests`: how many may be under way at one time."""

    def __init__(
        self, app, *, token: str | None, max_body_bytes: int, max_requests: int, metrics: Metrics
    ):
        self.app = app
        self.max_body_bytes = max_body_bytes
        self.bytes_under_way = 0
        self._token = token.encode() if token else None
        self._max_requests = max_requests
        self._metrics = metrics
        self._requests_under_way = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        exchange = _Exchange(self, receive, send)
        exchange.refusal = self._refusal(
            scope["path"], {key.lower(): value for key, value in scope["headers"]}
        )
        try:
            if exchange.refusal is None:
                await self._pass_on(scope, exchange)
            if exchange.refusal is not None:
                self._metrics.rejected.labels(str(exchange.refusal.status)).inc()
                await exchange.refuse()
        finally:
            path = scope["path"] if scope["path"] in _KNOWN_PATHS else "other"
            self._metrics.requests.labels(path, str(exchange.status)).inc()
            self._metrics.latency.labels(path).observe(time.perf_counter() - started)

    async def _pass_on(self, scope, exchange: "_Exchange") -> None:
        self._requests_under_way += 1
        try:
            await self.app(scope, exchange.receive, exchange.send)
        except _RefusedError:
            pass
        finally:
            self._requests_under_way -= 1
            self.bytes_under_way -= exchange.received

    def _refusal(self, path: str, headers: dict[bytes, bytes]) -> _Refusal | None:
        """Why the request must not go further, judged by its head."""
        if self._token is not None and path not in _OPEN_PATHS:
            scheme, _, sent = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(sent.strip(), self._token):
                detail = "the header `Authorization: Bearer <token>` must hold this server's token"
                return _Refusal(401, detail, [(b"www-authenticate", b"Bearer")])
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self.max_body_bytes:
            return self.too_large()
        if path not in _OPEN_PATHS and self._requests_under_way >= self._max_requests:
            return _busy(f"{self._requests_under_way} requests are under way")
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

    def __init__(self, guard: Guard, receive, send):
        self.refusal: _Refusal | None = None
        self.status = 500  # what the server answers when the application raises
        self.received = 0
        self._guard, self._receive, self._send = guard, receive, send
        self._more_body = True

    async def receive(self):
        message = await self._receive()
        size = len(message.get("body", b""))
        self._more_body = message.get("more_body", False)
        self.received += size
        self._guard.bytes_under_way += size
        if size:
            self.refusal = self._guard.body_refusal(self.received)
        if self.refusal is not None:
            raise _RefusedError
        return message

    async def send(self, message) -> None:
        if self.refusal is not None:
            return
        if message["type"] == "http.response.start":
            self.status = message["status"]
        await self._send(message)

    async def refuse(self) -> None:
        """Answer, and read the body's rest for a while.

        Who still sends would see a broken pipe instead.
        """
        assert self.refusal is not None
        self.status = self.refusal.status
        body = json.dumps({"detail": self.refusal.detail}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *self.refusal.headers,
        ]
        await self._send({"type": "http.response.start", "status": self.status, "headers": headers})
        await self._send({"type": "http.response.body", "body": body, "more_body": True})
        left = 4 * self._guard.max_body_bytes
        while self._more_body and left > 0:
            message = await self._receive()
            left -= len(message.get("body", b""))
            self._more_body = message.get("more_body", False)
        await self._send({"type": "http.response.body", "body": b""})


def _busy(detail: str, headers: list[tuple[bytes, bytes]] | None = None) -> _Refusal:
    return _Refusal(503, detail, [(b"retry-after", b"1"), *(headers or [])])
