"""The client: batches of pictures to reward servers, with failover, retries and a deadline.

Imports only `requests` and the standard library. A picture is encoded once, a wrong request is
never retried, and a picture that could not be scored is never a number.
"""

import base64
import io
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from typing import Any

from reward_server.client.failover import (
    Request,
    RewardClientError,
    RewardRejectedError,
    RewardUnavailableError,
    Servers,
)
from reward_server.components import NAMES, Measured

__all__ = [
    "TOKEN_VARIABLE",
    "RewardClient",
    "RewardClientError",
    "RewardItem",
    "RewardRejectedError",
    "RewardResult",
    "RewardUnavailableError",
    "encode_png",
    "server_urls",
]

_INFO = Request("GET", "/info")
TOKEN_VARIABLE = "CALLIGRAPHER_REWARD_TOKEN"


@dataclass(frozen=True)
class RewardItem:
    """One picture to score.

    Pictures: PNG bytes (sent as they are), PIL images, or uint8 arrays [H, W, 3] or [H, W].
    """

    image: Any
    prompt: str
    mask: Any = None
    text: str | None = None
    reference: Any = None


@dataclass(frozen=True)
class RewardResult(Measured):
    """What one picture was measured to be; None exactly where `errors` says why, by field name.

    own: components that scorers of the user's own measure.
    """

    own: dict[str, float | None] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    reward_model_disabled: bool = False

    def components(self) -> dict[str, float | str | None]:
        """Return every component by name, the user's own last."""
        return {name: getattr(self, name) for name in NAMES} | self.own


def server_urls(host: str, first_port: int, count: int) -> list[str]:
    """`http://host:port` for `count` consecutive ports, as the launcher opens them."""
    return [f"http://{host}:{first_port + number}" for number in range(count)]


def encode_png(picture: Any) -> str:
    """base64 of a picture's PNG; PNG bytes are taken as they are."""
    if not isinstance(picture, bytes | bytearray | memoryview):
        from PIL import Image

        image = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
        buffer = io.BytesIO()
        image.save(buffer, format="PNG", compress_level=1)
        picture = buffer.getvalue()
    return base64.b64encode(picture).decode("ascii")


class RewardClient:
    """Scores items on several servers at once, on the others when one is down.

    `urls`: all servers, set up alike. `rank`: this process's; it begins with
    `urls[rank % len(urls)]`. `token`: None sends what the environment variable
    CALLIGRAPHER_REWARD_TOKEN holds, if anything. `deadline_s`: for one call of `score_batch`,
    retries included. `chunk_size`: the most items of one request. `concurrency`: requests at a
    time; None is 4, or one for each server.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        rank: int = 0,
        token: str | None = None,
        deadline_s: float = 600.0,
        request_timeout_s: float = 180.0,
        chunk_size: int = 8,
        concurrency: int | None = None,
        max_request_bytes: int = 32 * 2**20,
        trip_after: int = 3,
        max_pause_s: float = 30.0,
    ):
        if not urls:
            raise ValueError("urls must name at least one reward server. Got none.")
        if strange := [url for url in urls if not url.startswith(("http://", "https://"))]:
            raise ValueError(f"urls must begin with http:// or https://. Got {strange[0]!r}.")
        concurrency = max(4, len(urls)) if concurrency is None else concurrency
        if chunk_size < 1 or concurrency < 1:
            raise ValueError(
                f"chunk_size and concurrency must be at least 1. Got {chunk_size}, {concurrency}."
            )
        own = rank % len(urls)
        self._servers = Servers(
            [*urls[own:], *urls[:own]],
            token=token or os.environ.get(TOKEN_VARIABLE),
            request_timeout_s=request_timeout_s,
            trip_after=trip_after,
            max_pause_s=max_pause_s,
        )
        self._deadline_s = deadline_s
        self._chunk_size, self._max_request_bytes = chunk_size, max_request_bytes
        self._parallel = min(concurrency, len(urls))  # servers that can work at the same time
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="reward-client")

    def score_batch(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """Return the results of the items, order kept.

        An item that the server refuses gets a result whose every component is None. Raises
        RewardRejectedError (wrong token, malformed request, servers that are set up unlike) and
        RewardUnavailableError (deadline passed).
        """
        stop_at = time.monotonic() + self._deadline_s
        chunks = self._chunks(_bodies(items))
        futures = [self._pool.submit(self._score_chunk, chunk, stop_at) for chunk in chunks]
        results: list[RewardResult | None] = []
        reason = ""
        try:
            for chunk, future in zip(chunks, futures, strict=True):
                try:
                    results.extend(future.result())
                except RewardUnavailableError as error:
                    results.extend([None] * len(chunk))
                    reason = str(error)
        finally:
            for future in futures:
                future.cancel()
        if reason:
            left = sum(result is None for result in results)
            raise RewardUnavailableError(
                f"{left} of {len(results)} items are unscored: {reason}", results
            )
        return results  # type: ignore[return-value]

    def info(self) -> dict:
        """Return `GET /info` of the servers, which must be set up alike. Raises like `score_batch`.

        Servers that do not answer now are left out; their answers are compared when they come.
        """
        stop_at = time.monotonic() + self._deadline_s
        answers, _ = self._servers.ask_all(_INFO, stop_at)
        return answers[0] if answers else self._servers.ask(_INFO, stop_at)

    def check(self) -> list[dict]:
        """Return `GET /info` of the servers that give it now; a loading server gives none yet.

        Raises RewardRejectedError (wrong token, set up unlike) and RewardUnavailableError when no
        server is there at all, without waiting for one.
        """
        answers, reasons = self._servers.ask_all(_INFO, time.monotonic() + self._deadline_s)
        if not any(server.there for server in self._servers.servers):
            raise RewardUnavailableError(f"no reward server is there ({'; '.join(reasons)})", [])
        return answers

    def close(self) -> None:
        """End threads and connections."""
        self._servers.close()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "RewardClient":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _chunks(self, bodies: list[dict]) -> list[list[dict]]:
        """Return the bodies of each request, order kept, none above the limits for one.

        A few items are shared out as well, so that every server has some.
        """
        share = min(self._chunk_size, -(-len(bodies) // self._parallel))
        chunks: list[list[dict]] = []
        room = 0
        for body in bodies:
            size = sum(len(value) for value in body.values())
            if not chunks or len(chunks[-1]) == share or size > room:
                chunks.append([])
                room = self._max_request_bytes
            chunks[-1].append(body)
            room -= size
        return chunks

    def _score_chunk(self, bodies: list[dict], stop_at: float) -> list[RewardResult]:
        body = json.dumps({"items": bodies}).encode()
        answer = self._servers.ask(Request("POST", "/score_batch", body), stop_at)
        try:
            results = [_result(one) for one in answer["results"]]
        except (KeyError, TypeError) as error:
            raise RewardRejectedError(
                f"the answer must be a reward server's. Got {str(answer)[:200]}."
            ) from error
        if len(results) != len(bodies):
            raise RewardRejectedError(
                f"the server must answer {len(bodies)} results. Got {len(results)}."
            )
        return results


def _bodies(items: Sequence[RewardItem]) -> list[dict[str, str]]:
    """Return the items as they travel; a picture that several share is encoded and held once."""
    encoded: dict[int, str] = {}  # by identity: the items keep their pictures alive

    def once(picture: Any) -> str:
        if id(picture) not in encoded:
            encoded[id(picture)] = encode_png(picture)
        return encoded[id(picture)]

    bodies = []
    for item in items:
        body = {"image": once(item.image), "prompt": item.prompt}
        if item.mask is not None:
            body["mask"] = once(item.mask)
        if item.reference is not None:
            body["reference"] = once(item.reference)
        if item.text is not None:
            body["text"] = item.text
        bodies.append(body)
    return bodies


def _result(one: dict) -> RewardResult:
    if one["error"] is not None:
        return RewardResult(
            errors=dict.fromkeys(NAMES, f"the server refused the item: {one['error']}")
        )
    known = {name: one["score"][name] for name in _RESULT if name in one["score"]}
    # What a newer server says besides is no component unless it is a number, or null with a reason.
    own = {
        name: value
        for name, value in one["score"].items()
        if name not in _RESULT
        and (type(value) in (int, float) or (value is None and name in known["errors"]))
    }
    return RewardResult(**known, own=own)


_RESULT = {one.name for one in fields(RewardResult)} - {"own"}
