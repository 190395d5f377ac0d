"""What stands before the service: bearer token, body limit, no more requests than it can hold, counting.

A plain ASGI middleware, because it must refuse before a byte of the body is read into memory.
"""

import hmac
import json
import time

from reward_server.metrics import Metrics

_OPEN_PATHS = ("/health",)  # a load balancer asks without a token
_KNOWN_PATHS = ("/score", "/score_batch", "/health", "/info", "/metrics", "/openapi.json")


class _TooLargeError(Exception):
    pass


class Guard:
    """Wraps the application. `max_requests`: how many may be under way at one time."""

    def __init__(self, app, *, token: str | None, max_body_bytes: int, max_requests: int, metrics: Metrics):
        self.app = app
        self._token = token.encode() if token else None
        self._max_body_bytes = max_body_bytes
        self._max_requests = max_requests
        self._metrics = metrics
        self._under_way = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        path = scope["path"] if scope["path"] in _KNOWN_PATHS else "other"
        headers = {key.lower(): value for key, value in scope["headers"]}
        refusal = self._refusal(scope["path"], headers)
        if refusal is not None:
            status, detail, extra = refusal
            self._metrics.rejected.labels(str(status)).inc()
            self._count(path, status, started)
            await self._answer(receive, send, status, detail, extra)
            return

        status_sent = received = 0
        more_body = True

        async def limited_receive():
            nonlocal received, more_body
            message = await receive()
            more_body = message.get("more_body", False)
            received += len(message.get("body", b""))
            if received > self._max_body_bytes:
                raise _TooLargeError  # the application answers it in its own way, which is dropped below
            return message

        async def noting_send(message):
            nonlocal status_sent
            if received > self._max_body_bytes:
                return
            if message["type"] == "http.response.start":
                status_sent = message["status"]
            await send(message)

        self._under_way += 1
        try:
            await self.app(scope, limited_receive, noting_send)
        except _TooLargeError:
            pass
        except Exception:
            self._count(path, 500, started)
            raise
        finally:
            self._under_way -= 1
        if received > self._max_body_bytes:
            status_sent = 413
            self._metrics.rejected.labels("413").inc()
            rest = receive if more_body else None
            await self._answer(rest, send, 413, self._too_large(), [(b"connection", b"close")])
        self._count(path, status_sent, started)

    def _refusal(self, path: str, headers: dict[bytes, bytes]):
        """(status, detail, extra headers) when the request must not go further."""
        if self._token is not None and path not in _OPEN_PATHS:
            scheme, _, sent = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not hmac.compare_digest(sent.strip(), self._token):
                detail = "the header `Authorization: Bearer <token>` must hold this server's token"
                return 401, detail, [(b"www-authenticate", b"Bearer")]
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length[:20]) > self._max_body_bytes:
            return 413, self._too_large(), [(b"connection", b"close")]
        if path not in _OPEN_PATHS and self._under_way >= self._max_requests:
            return 503, f"{self._under_way} requests are under way", [(b"retry-after", b"1")]
        return None

    def _too_large(self) -> str:
        return f"a request's body must have at most {self._max_body_bytes} bytes; split the batch"

    def _count(self, path: str, status: int, started: float) -> None:
        self._metrics.requests.labels(path, str(status)).inc()
        self._metrics.latency.labels(path).observe(time.perf_counter() - started)

    async def _answer(
        self, receive, send, status: int, detail: str, extra: list[tuple[bytes, bytes]]
    ) -> None:
        """Answer, and read the body's rest for a while: who still sends would see a broken pipe instead."""
        body = json.dumps({"detail": detail}).encode()
        headers = [
            (b"content-type", b"application/json"),
            (b"content-length", str(len(body)).encode()),
            *extra,
        ]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body, "more_body": True})
        left = 4 * self._max_body_bytes
        while receive is not None and left > 0:
            message = await receive()
            left -= len(message.get("body", b""))
            if not message.get("more_body", False):
                break
        await send({"type": "http.response.body", "body": b""})
