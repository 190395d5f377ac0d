"""The client: batches of pictures to reward servers, with failover, retries and a deadline.

Imports only `requests` and the standard library. A picture is encoded once, a wrong request is
never retried, and a picture that could not be scored is never a number.
"""

import logging
import os
import random
import time
from collections.abc import Collection, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from dataclasses import dataclass, field, fields

from reward_server.client.failover import (
    Request,
    RewardClientError,
    RewardRejectedError,
    RewardUnavailableError,
    Servers,
)
from reward_server.client.sending import Chunk, RewardItem, SentItem, encode_png, sent_items
from reward_server.components import LETTERS, NAMES, Letter, Measured

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

log = logging.getLogger(__name__)

_INFO, _ALPHABET = Request("GET", "/info"), Request("GET", "/alphabet")
UNAVAILABLE = "unavailable"  # the kind of an error that asking again may mend
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.5, 10.0  # between asking again, about
_PASSED_OVER = 8  # times that others are scored before an item's outage counts as its own
TOKEN_VARIABLE = "CALLIGRAPHER_REWARD_TOKEN"


@dataclass(frozen=True)
class RewardResult(Measured):
    """What one picture was measured to be; None exactly where `errors` says why, by field name.

    own: components that scorers of the user's own measure. ocr_letters: of each character of the
    target, where the item asked for them and OCR could tell.
    """

    own: dict[str, float | None] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    # Field -> of what kind its error is (`kinds` of an answer); empty from a server of before.
    kinds: dict[str, str] = field(default_factory=dict)
    reward_model_disabled: bool = False
    ocr_letters: tuple[Letter, ...] | None = None

    def components(self) -> dict[str, float | str | None]:
        """Return every component by name, the user's own last."""
        return {name: getattr(self, name) for name in NAMES} | self.own


def server_urls(host: str, first_port: int, count: int) -> list[str]:
    """`http://host:port` for `count` consecutive ports, as the launcher opens them."""
    return [f"http://{host}:{first_port + number}" for number in range(count)]


class RewardClient:
    """Scores items on several servers at once, on the others when one is down.

    `urls`: all servers, set up alike. `rank`: this process's; it begins with
    `urls[rank % len(urls)]`. `token`: None sends what the environment variable
    CALLIGRAPHER_REWARD_TOKEN holds, if anything. `deadline_s`: for one call of `score_batch`,
    retries included. `chunk_size`: the most items of one request. `concurrency`: requests at a
    time; None is 4, or one for each server. `needed`: the components that are worth waiting for
    while they are unavailable (None: all). `components`: measure only these (None: all), where a
    server knows of that.
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
        needed: Collection[str] | None = None,
        components: Sequence[str] | None = None,
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
        self._deadline_s, self._needed, self._components = deadline_s, needed, components
        self._chunk_size, self._max_request_bytes = chunk_size, max_request_bytes
        self._parallel = min(concurrency, len(urls))  # servers that can work at the same time
        self._pool = ThreadPoolExecutor(concurrency, thread_name_prefix="reward-client")

    def score_batch(self, items: Sequence[RewardItem]) -> list[RewardResult]:
        """Return the results of the items, order kept.

        An item that the server refuses gets a result whose every component is None. An item whose
        needed components are unavailable (a remote model is down) is asked again until the
        deadline; one that stays so while others are scored keeps its None. Raises
        RewardRejectedError (wrong token, malformed request, servers that are set up unlike) and
        RewardUnavailableError (deadline passed).
        """
        stop_at = time.monotonic() + self._deadline_s
        sent = sent_items(items, encode_png, self._components)
        results, reason = self._ask_all(sent, stop_at)
        passed_over = [0] * len(sent)  # how often others were scored and this one was not
        delay = _FIRST_PAUSE_S
        while again := [
            place
            for place, result in enumerate(results)
            if result is not None and self._lacks(result) and passed_over[place] < _PASSED_OVER
        ]:
            log.warning(
                "%d of %d items wait for what is unavailable: %s",
                len(again), len(results), _why(results[again[0]], self._lacks(results[again[0]])),
            )  # fmt: skip
            pause = delay * random.uniform(0.5, 1.5)
            if time.monotonic() + pause >= stop_at or self._servers.wait(pause):
                break
            delay = min(2 * delay, _MAX_PAUSE_S)
            answers, _ = self._ask_all([sent[place] for place in again], stop_at)
            scored = [one for one in answers if one is not None and not self._lacks(one)]
            for place, answer in zip(again, answers, strict=True):
                if answer is not None:
                    results[place] = answer
                    passed_over[place] += bool(scored)
        left = sum(result is None for result in results)
        if left:
            raise RewardUnavailableError(
                f"{left} of {len(results)} items are unscored: {reason}", results
            )
        return results  # type: ignore[return-value]

    def _lacks(self, result: RewardResult) -> set[str]:
        """The needed components that asking again may bring."""
        return {
            name
            for name, kind in result.kinds.items()
            if kind == UNAVAILABLE and (self._needed is None or name in self._needed)
        }

    def _ask_all(
        self, sent: list[SentItem], stop_at: float
    ) -> tuple[list[RewardResult | None], str]:
        """Ask about each item once: results, None where no server answered in time, and why.

        Raises RewardRejectedError, which holds what the other requests brought.
        """
        chunks = self._chunks(sent)
        futures = [self._pool.submit(self._score_chunk, chunk, stop_at) for chunk in chunks]
        results: list[RewardResult | None] = []
        reason, rejected = "", None
        for chunk, future in zip(chunks, futures, strict=True):
            try:
                results.extend(future.result())
                continue
            except RewardUnavailableError as error:
                reason = str(error)
            except RewardRejectedError as error:
                rejected = rejected or error
                for other in futures:
                    other.cancel()  # those that have not begun: they would be refused as well
            except CancelledError:
                pass
            results.extend([None] * len(chunk))
        if rejected is not None:
            raise RewardRejectedError(str(rejected), results) from rejected
        return results, reason

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

    def alphabet(self) -> list[str] | None:
        """Return what the classes of the servers' recogniser spell, the first one nothing.

        None where no server tells now: loading, of before, or without OCR. Raises like `check`.
        """
        if not any(info.get("alphabet") for info in self.check()):
            return None
        answers, _ = self._servers.ask_all(_ALPHABET, time.monotonic() + self._deadline_s)
        return answers[0].get("characters") if answers else None

    def close(self) -> None:
        """End threads and connections."""
        self._servers.close()
        self._pool.shutdown(cancel_futures=True)

    def __enter__(self) -> "RewardClient":
        return self

    def __exit__(self, *exc_info) -> None:
        self.close()

    def _chunks(self, sent: list[SentItem]) -> list[Chunk]:
        """Return the items of each request, order kept, none above the limits for one.

        A few items are shared out as well, so that every server has some.
        """
        share = min(self._chunk_size, -(-len(sent) // self._parallel))
        chunks: list[list[SentItem]] = []
        room = 0
        for item in sent:
            if not chunks or len(chunks[-1]) == share or item.size > room:
                chunks.append([])
                room = self._max_request_bytes
            chunks[-1].append(item)
            room -= item.size
        return [Chunk(items) for items in chunks]

    def _score_chunk(self, chunk: Chunk, stop_at: float) -> list[RewardResult]:
        answer = self._servers.ask(chunk.request_for, stop_at)
        try:
            results = [_result(one) for one in answer["results"]]
        except (KeyError, TypeError) as error:
            raise RewardRejectedError(
                f"the answer must be a reward server's. Got {str(answer)[:200]}."
            ) from error
        if len(results) != len(chunk):
            raise RewardRejectedError(
                f"the server must answer {len(chunk)} results. Got {len(results)}."
            )
        return results


def _result(one: dict) -> RewardResult:
    """What a server says of one item; what this client does not know of is passed over."""
    if one["error"] is not None:
        return RewardResult(
            errors=dict.fromkeys(NAMES, f"the server refused the item: {one['error']}"),
            kinds=dict.fromkeys(NAMES, "refused"),
        )
    score = one["score"]
    known = {name: score[name] for name in _RESULT if name in score}
    if known.get(LETTERS) is not None:
        known[LETTERS] = tuple(
            Letter(**{name: one[name] for name in _LETTER}) for one in known[LETTERS]
        )
    # A number, or null with a reason, that this client has no field for is a component.
    own = {
        name: value
        for name, value in score.items()
        if name not in _RESULT
        and (type(value) in (int, float) or (value is None and name in score["errors"]))
    }
    return RewardResult(**known, own=own)


def _why(result: RewardResult | None, names: set[str]) -> str:
    return "; ".join(result.errors.get(name, name) for name in sorted(names)) if result else ""


_RESULT = {one.name for one in fields(RewardResult)} - {"own"}
_LETTER = [one.name for one in fields(Letter)]
