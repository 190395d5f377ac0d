"""One server's work without HTTP: admits and decodes items, runs every scorer, joins the answer."""

import asyncio
import hashlib
import json
import logging
import os
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import PackageNotFoundError, version

from PIL import Image

from reward_server.client.failover import FILES, PARTS
from reward_server.components import MEASURED_BY, NAMES, SEES_REFERENCE
from reward_server.scorers.base import (
    Item,
    Outcome,
    Scorer,
    failed,
    is_remote,
    keeps_to_the_mask,
    probe_item,
)
from reward_server.scorers.own import OwnScorer
from reward_server.scorers.safely import probe
from reward_server.service.admission import Admission
from reward_server.service.batching import Batcher
from reward_server.service.images import ImageError
from reward_server.service.intake import (
    Ask,
    ItemError,
    Opened,
    decode,
    open_pictures,
    shared_pictures,
)
from reward_server.service.lru import LRU
from reward_server.service.metrics import Metrics
from reward_server.service.schema import Health, Info, LetterScore, Limits, ScoreResponse
from reward_server.settings import Settings
from reward_server.text import RULE

log = logging.getLogger(__name__)

_PIXELS_IN_HOUSE = (
    16  # times max_pixels: what the pictures of all admitted requests may hold together
)
_SHARED_BYTES = 128 * 2**20  # of decoded masks and references that are kept
_FINAL = {"refused", "not_asked", "not_configured"}  # kinds that asking again gives again
_STUCK = 5  # times score_timeout: a batch that takes longer will not come back


class NotReadyError(RuntimeError):
    """The scorers are loading, broken or being stopped: another server may score this."""


class TooManyPixelsError(ValueError):
    """The pictures of one batch are too large together."""


@dataclass(frozen=True)
class Known:
    """The answer of an item that was asked before, and the pixels that it had."""

    answer: ScoreResponse
    pixels: int


class RewardService:
    """Loads the scorers in the background, then scores requests.

    `load` returns the scorers when called. `on_broken` is called when a scorer that has worked
    works no more (it fails on its probe picture, or a batch never comes back): only a new process
    can mend that.
    """

    def __init__(
        self,
        settings: Settings,
        load: Callable[[], list[Scorer]],
        on_broken: Callable[[], None] = lambda: None,
    ):
        self.settings = settings
        self.metrics = Metrics()
        self.admission = Admission(settings.queue_size, _PIXELS_IN_HOUSE * settings.max_pixels)
        self._load, self._on_broken = load, on_broken
        self._batchers: list[Batcher] = []
        self._own: list[str] = []  # components that users' scorers measure
        self._state = "loading"  # ok | broken | stopping
        self._status: dict[str, str] = {"scorers": "loading"}
        self.fingerprint = ""  # of what decides the scores, once the scorers are loaded
        self._closed = threading.Event()
        self._decoders = ThreadPoolExecutor(
            len(os.sched_getaffinity(0)), thread_name_prefix="decode"
        )
        self._shared = shared_pictures(_SHARED_BYTES)
        self._answers = LRU(settings.answer_cache)

    @property
    def names(self) -> tuple[str, ...]:
        """Components that an item may ask for."""
        return (*NAMES, *self._own)

    @property
    def protocol(self) -> int:
        """What a client may send: `PARTS` where all scorers keep to the mask."""
        return PARTS if all(keeps_to_the_mask(one.scorer) for one in self._batchers) else FILES

    @property
    def ready(self) -> bool:
        """True once every scorer has scored a probe picture, for as long as all of them work."""
        return self._state == "ok"

    def start(self) -> None:
        """Load and probe all scorers; blocks. Raises what waiting cannot mend."""
        scorers = self._load()
        self._status = dict.fromkeys((scorer.name for scorer in scorers), "loading")
        self._own = [name for one in scorers for name in one.fields if name not in NAMES]
        for scorer in scorers:
            if not isinstance(scorer, OwnScorer):
                self._probe_until_ready(scorer)
        for scorer in scorers:
            batcher = Batcher(
                scorer,
                under_way=partial(self.admission.queued, scorer.name),
                on_batch=self.metrics.count_batch,
                on_broken=self._broke,
            )
            self.metrics.watch_queue(scorer.name, batcher.__len__)
            self._batchers.append(batcher)
            if isinstance(scorer, OwnScorer):
                self._try_out(batcher)
        self.fingerprint = self._digest_of_setup()
        if not self._closed.is_set():
            self._state = "ok"

    def _probe_until_ready(self, scorer: Scorer) -> None:
        delay = 0.5
        while not self._closed.is_set():
            outcome = probe(scorer)
            # A refusal is an answer: whether a judge likes the probe picture says nothing.
            if outcome.all_kinds <= {"refused"}:
                self._status[scorer.name] = "ready"
                return
            reason = next(iter(outcome.errors.values()))
            if "unavailable" not in outcome.all_kinds:
                raise RuntimeError(f"scorer {scorer.name} failed on its probe picture: {reason}")
            self._status[scorer.name] = f"waiting: {reason}"
            log.warning("not available yet: %s", reason)
            self._closed.wait(delay)
            delay = min(delay * 2, 10)

    def _try_out(self, batcher: Batcher) -> None:
        """Show a user's scorer the probe picture, and tell what it says; nothing waits for it."""
        name = batcher.scorer.name
        self._status[name] = "ready"

        def tell(answer: "Future[Outcome]") -> None:
            outcome = answer.result()
            if outcome.errors and outcome.kind != "refused":
                reason = outcome.errors[name]
                self._status[name] = f"ready, but failed on the probe picture: {reason}"
                log.warning("scorer %s failed on the probe picture: %s", name, reason)

        batcher.submit(probe_item()).add_done_callback(tell)

    def _broke(self, scorer: str, reason: str) -> None:
        if self.ready:
            log.error("scorer %s works no more: %s", scorer, reason)
            self._state, self._status[scorer] = "broken", f"broken: {reason}"
            self._on_broken()

    def stop(self) -> None:
        """Take no more requests; those under way go on."""
        self._closed.set()
        self._state = "stopping"

    def close(self) -> None:
        """Stop all threads."""
        self.stop()
        for batcher in self._batchers:
            batcher.close()
        self._decoders.shutdown(cancel_futures=True)

    def health(self) -> Health:
        """State of the service and of each scorer."""
        return Health(status=self._state, scorers=dict(self._status), pid=os.getpid())

    def info(self) -> Info:
        """What decides the scores, and the limits. Raises NotReadyError."""
        self.must_be_ready()
        settings = self.settings
        limits = Limits(
            max_items=settings.max_items,
            max_body_bytes=settings.max_body_bytes,
            max_pixels=settings.max_pixels,
            queue_size=settings.queue_size,
        )
        return Info(
            version=_version(),
            scorers=self._scorers_info(),
            components=[name for one in self._batchers for name in one.scorer.fields],
            letters=self.letters() is not None,
            limits=limits,
            reward_model_disabled=settings.disable_reward_model,
            fingerprint=self.fingerprint,
            alphabet=self._digest_of_letters(),
        )

    def letters(self) -> list[str] | None:
        """What the classes of the recogniser spell; None without OCR. Raises NotReadyError."""
        self.must_be_ready()
        found = (getattr(one.scorer, "characters", None) for one in self._batchers)
        return next((one for one in found if one is not None), None)

    def _digest_of_letters(self) -> str | None:
        letters = self.letters()
        return None if letters is None else hashlib.sha256(json.dumps(letters).encode()).hexdigest()

    def _scorers_info(self) -> dict[str, dict[str, str]]:
        return {batcher.scorer.name: dict(batcher.scorer.info) for batcher in self._batchers}

    def _digest_of_setup(self) -> str:
        setup = {
            "scorers": self._scorers_info(),
            "disabled": self.settings.disable_reward_model,
            "text_rule": RULE,
        }
        return hashlib.sha256(json.dumps(setup, sort_keys=True).encode()).hexdigest()

    def must_be_ready(self) -> None:
        """Raises NotReadyError."""
        if not self.ready:
            raise NotReadyError(f"the scorers are not ready ({self._state})")

    async def score(self, asked: Sequence[Ask | ItemError]) -> list[ScoreResponse | ItemError]:
        """Score all items at the same time; order kept, what is wrong with one stays as it is.

        Raises OverloadedError, TooManyPixelsError, and NotReadyError also when a scorer broke on
        the way: its nulls say nothing about the pictures.
        """
        self.must_be_ready()
        loop = asyncio.get_running_loop()
        pixels = 0
        # A place in a queue is given back as soon as its scorer is done with the item.
        places = Counter(
            batcher.scorer.name
            for ask in asked
            if isinstance(ask, Ask)
            for batcher in self._asked(ask)
        )
        self.admission.enter(places)
        try:
            opened = await loop.run_in_executor(self._decoders, self._open_all, asked)
            wanted = sum(one.pixels for one in opened if not isinstance(one, ItemError))
            if wanted > self.admission.max_pixels:
                raise TooManyPixelsError(
                    "the pictures of one batch must together have at most"
                    f" {self.admission.max_pixels} pixels. Got {wanted}; split the batch."
                )
            self.admission.enter(pixels=wanted)
            pixels = wanted
            results = await asyncio.gather(
                *(self._score_one(*pair, places) for pair in zip(asked, opened, strict=True))
            )
        finally:
            self.admission.leave(places, pixels=pixels)
        if self._state == "broken":
            self.must_be_ready()
        return results

    def _asked(self, ask: Ask) -> list[Batcher]:
        """The scorers that an item asks for."""
        if ask.components is None:
            return self._batchers
        return [
            one for one in self._batchers if not set(ask.components).isdisjoint(one.scorer.fields)
        ]

    def _looks_at_reference(self, ask: Ask) -> bool:
        # A scorer of the user's own may look at anything.
        return any(
            SEES_REFERENCE.intersection(one.scorer.fields)
            or (isinstance(one.scorer, OwnScorer) and one.scorer.sees_reference)
            for one in self._asked(ask)
        )

    def _open_all(self, asked: Sequence[Ask | ItemError]) -> list[Opened | Known | ItemError]:
        return [one if isinstance(one, ItemError) else self._open(one) for one in asked]

    def _open(self, ask: Ask) -> Opened | Known | ItemError:
        """Return an item's pictures opened, or its answer when it was asked before."""
        if ask.part is not None and self.protocol < PARTS:
            return ItemError("the whole picture must be sent: a scorer here looks at all of it.")
        reference = self._looks_at_reference(ask)
        if self._answers.capacity:
            known = self._answers.get(ask.digest(reference=reference))
            self.metrics.count_cache("answers", hit=known is not None)
            if known is not None:
                return known
        opened = open_pictures(ask, self.settings.max_pixels, self._shared, reference=reference)
        if isinstance(opened, Opened):
            for one in (opened.mask, opened.reference):
                if one is not None and not isinstance(one, ImageError):
                    self.metrics.count_cache("pictures", hit=not isinstance(one, Image.Image))
        return opened

    async def _score_one(
        self, ask: Ask | ItemError, opened: Opened | Known | ItemError, places: Counter[str]
    ) -> ScoreResponse | ItemError:
        if isinstance(opened, Known):
            return opened.answer
        try:
            if isinstance(ask, ItemError) or isinstance(opened, ItemError):
                raise ask if isinstance(ask, ItemError) else opened
            item = await asyncio.get_running_loop().run_in_executor(
                self._decoders, decode, ask, opened, self._shared
            )
        except ItemError as error:
            self.metrics.rejected.labels("item").inc()
            return error
        batchers = self._asked(ask)
        answer = self._response(
            await asyncio.gather(*(self._outcome(batcher, item, places) for batcher in batchers)),
            not_asked=[one.scorer for one in self._batchers if one not in batchers],
        )
        if self._answers.capacity and _FINAL.issuperset(answer.kinds.values()):
            known = Known(answer, opened.pixels)
            self._answers.put(ask.digest(reference=self._looks_at_reference(ask)), known)
        return answer

    async def _outcome(self, batcher: Batcher, item: Item, places: Counter[str]) -> Outcome:
        outcome = await self._scored(batcher, item)
        name = batcher.scorer.name
        places[name] -= 1
        self.admission.leave({name: 1})
        return outcome

    async def _scored(self, batcher: Batcher, item: Item) -> Outcome:
        scorer, limit = batcher.scorer, self.settings.score_timeout
        if item.reference_error is not None and SEES_REFERENCE.intersection(scorer.fields):
            outcome = failed(scorer.fields, item.reference_error)
            self.metrics.count_failures(scorer.name, outcome)
            return outcome
        try:
            return await asyncio.wait_for(asyncio.wrap_future(batcher.submit(item)), limit)
        except TimeoutError:
            outcome = failed(
                scorer.fields, f"{scorer.name} took longer than {limit:g} s", "timeout"
            )
            self.metrics.count_failures(scorer.name, outcome)
            if not is_remote(scorer) and batcher.seconds_in_hand() > _STUCK * limit:
                self._broke(scorer.name, f"a batch has not come back for {_STUCK * limit:g} s")
            return outcome

    def _response(self, outcomes: list[Outcome], not_asked: list[Scorer]) -> ScoreResponse:
        values: dict = dict.fromkeys([*NAMES, *self._own])
        errors = {
            name: f"no scorer for it is configured: start the reward server with {option}"
            for name, option in MEASURED_BY.items()
        }
        kinds = dict.fromkeys(errors, "not_configured")
        for scorer in not_asked:
            errors.update(dict.fromkeys(scorer.fields, "not asked for"))
            kinds.update(dict.fromkeys(scorer.fields, "not_asked"))
        letters = None
        for outcome in outcomes:
            letters = outcome.letters or letters
            for field, value in outcome.values.items():
                values[field] = value
                errors.pop(field, None)
                kinds.pop(field, None)
            errors.update(outcome.errors)
            kinds.update({field: outcome.kind_of(field) for field in outcome.errors})
        return ScoreResponse(
            **values,
            ocr_letters=letters and [LetterScore(**vars(letter)) for letter in letters],
            errors=errors,
            kinds=kinds,
            reward_model_disabled=self.settings.disable_reward_model,
        )


def _version() -> str:
    try:
        return version("calligrapher")
    except PackageNotFoundError:
        return "unknown"
