"""One server's work without HTTP: admit items, decode them, run every scorer, put the answer together."""

import asyncio
import hashlib
import json
import logging
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import PackageNotFoundError, version

from PIL import Image

from reward_server.batching import Batcher
from reward_server.images import ImageError, bounding_box, decode_mask, decode_rgb, open_png
from reward_server.metrics import Metrics
from reward_server.schema import COMPONENTS, Health, Info, Limits, ScoreRequest, ScoreResponse
from reward_server.scorer import Item, Outcome, Scorer, ScorerUnavailableError, failed, probe_item
from reward_server.settings import Settings
from reward_server.text import normalise, text_from_prompt

log = logging.getLogger(__name__)

_PIXELS_IN_HOUSE = 16  # times max_pixels: what the pictures of all admitted requests may hold together


Opened = dict[str, Image.Image]  # field -> picture whose header was checked


class OverloadedError(RuntimeError):
    """No room for this request now; `retry_after` seconds later there may be."""

    def __init__(self, reason: str, retry_after: int = 1):
        super().__init__(reason)
        self.retry_after = retry_after


class TooManyPixelsError(ValueError):
    """The pictures of one batch are too large together."""


class ItemError(ValueError):
    """This item cannot be scored as it was sent."""


class Admission:
    """Bounds the items and the pixels that are in the house at one time."""

    def __init__(self, max_items: int, max_pixels: int):
        self.max_items, self.max_pixels = max_items, max_pixels
        self.items = self.pixels = 0
        self._lock = threading.Lock()

    def enter(self, *, items: int = 0, pixels: int = 0) -> None:
        """Take room or raise OverloadedError. An empty house admits any single request."""
        with self._lock:
            if items and self.items and self.items + items > self.max_items:
                raise OverloadedError(f"{self.items} items are in the queue, {self.max_items} may be")
            if pixels and self.pixels and self.pixels + pixels > self.max_pixels:
                raise OverloadedError(f"{self.pixels} pixels are in the queue, {self.max_pixels} may be")
            self.items += items
            self.pixels += pixels

    def leave(self, *, items: int = 0, pixels: int = 0) -> None:
        """Give room back."""
        with self._lock:
            self.items -= items
            self.pixels -= pixels


class RewardService:
    """Loads the scorers in the background, then scores requests. `load` returns the scorers when called."""

    def __init__(self, settings: Settings, load: Callable[[], list[Scorer]]):
        self.settings = settings
        self.metrics = Metrics()
        self.admission = Admission(settings.queue_size, _PIXELS_IN_HOUSE * settings.max_pixels)
        self.failure: Exception | None = None  # why loading failed, for good
        self._load = load
        self._batchers: list[Batcher] = []
        self._status: dict[str, str] = {"scorers": "loading"}
        self._ready = False
        self._closed = threading.Event()
        self._decoders = ThreadPoolExecutor(2, thread_name_prefix="decode")

    @property
    def ready(self) -> bool:
        """True once every scorer has scored a probe picture."""
        return self._ready

    def start(self) -> None:
        """Load and probe all scorers; blocks. What waiting cannot mend is kept in `failure` and raised."""
        try:
            scorers = self._load()
            self._status = dict.fromkeys((scorer.name for scorer in scorers), "loading")
            for scorer in scorers:
                self._probe_until_ready(scorer)
            for scorer in scorers:
                batcher = Batcher(scorer, self.metrics.count_batch)
                self.metrics.watch_queue(scorer.name, batcher.__len__)
                self._batchers.append(batcher)
            self._ready = not self._closed.is_set()
        except Exception as error:
            self.failure = error
            raise

    def _probe_until_ready(self, scorer: Scorer) -> None:
        delay = 0.5
        while not self._closed.is_set():
            outcome = _probe(scorer)
            if isinstance(outcome, Outcome) and set(outcome.values) == set(scorer.fields):
                self._status[scorer.name] = "ready"
                return
            if isinstance(outcome, Outcome):
                raise RuntimeError(f"scorer {scorer.name} failed on its probe picture: {outcome.errors}")
            self._status[scorer.name] = f"waiting: {outcome}"
            log.warning("scorer %s is not available yet: %s", scorer.name, outcome)
            self._closed.wait(delay)
            delay = min(delay * 2, 10)

    def close(self) -> None:
        """Stop all threads."""
        self._closed.set()
        self._ready = False
        for batcher in self._batchers:
            batcher.close()
        self._decoders.shutdown(cancel_futures=True)

    def health(self) -> Health:
        return Health(status="ok" if self.ready else "loading", scorers=dict(self._status), pid=os.getpid())

    def info(self) -> Info:
        settings = self.settings
        scorers = {batcher.scorer.name: dict(batcher.scorer.info) for batcher in self._batchers}
        identity = {"scorers": scorers, "disabled": settings.disable_reward_model}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()
        limits = Limits(
            max_items=settings.max_items,
            max_body_bytes=settings.max_body_bytes,
            max_pixels=settings.max_pixels,
            queue_size=settings.queue_size,
        )
        return Info(
            version=_version(),
            scorers=scorers,
            limits=limits,
            reward_model_disabled=settings.disable_reward_model,
            fingerprint=digest,
        )

    async def score(self, requests: list[ScoreRequest]) -> list[ScoreResponse | ItemError]:
        """Score all requests at the same time; order kept. Raises OverloadedError, TooManyPixelsError."""
        loop = asyncio.get_running_loop()
        pixels = 0
        self.admission.enter(items=len(requests))
        try:
            opened = await loop.run_in_executor(self._decoders, self._open_all, requests)
            wanted = sum(_pixels(images) for images in opened if not isinstance(images, ItemError))
            if wanted > self.admission.max_pixels:
                raise TooManyPixelsError(
                    f"the pictures of one batch must together have at most {self.admission.max_pixels} "
                    f"pixels. Got {wanted}; split the batch."
                )
            self.admission.enter(pixels=wanted)
            pixels = wanted
            return await asyncio.gather(
                *(self._score_one(request, images) for request, images in zip(requests, opened, strict=True))
            )
        finally:
            self.admission.leave(items=len(requests), pixels=pixels)

    async def _score_one(
        self, request: ScoreRequest, opened: Opened | ItemError
    ) -> ScoreResponse | ItemError:
        try:
            if isinstance(opened, ItemError):
                raise opened
            loop = asyncio.get_running_loop()
            item = await loop.run_in_executor(self._decoders, self._decode, request, opened)
        except (ImageError, ItemError) as error:
            self.metrics.rejected.labels("item").inc()
            return ItemError(str(error))
        return self._response(
            await asyncio.gather(*(self._outcome(batcher, item) for batcher in self._batchers))
        )

    def _open_all(self, requests: list[ScoreRequest]) -> list[Opened | ItemError]:
        return [self._open(request) for request in requests]

    def _open(self, request: ScoreRequest) -> Opened | ItemError:
        sent = {"image": request.image, "mask": request.mask, "reference": request.reference}
        limit = self.settings.max_pixels
        try:
            opened = {
                field: open_png(data, field=field, max_pixels=limit)
                for field, data in sent.items()
                if data is not None
            }
        except ImageError as error:
            return ItemError(str(error))
        if "mask" in opened and opened["mask"].size != opened["image"].size:
            return ItemError(
                f"mask must be of the image's size {opened['image'].size}. "
                f"Got {opened['mask'].size} (width, height)."
            )
        return opened

    @staticmethod
    def _decode(request: ScoreRequest, opened: Opened) -> Item:
        try:
            text = request.text if request.text is not None else text_from_prompt(request.prompt)
        except ValueError as error:
            raise ItemError(str(error)) from None
        if not normalise(text):
            raise ItemError(f"text must hold at least one character that is not a space. Got {text!r}.")
        image = crop = decode_rgb(opened["image"], field="image")
        if "mask" in opened:
            top, bottom, left, right = bounding_box(decode_mask(opened["mask"]))
            crop = image[top:bottom, left:right]
        reference = decode_rgb(opened["reference"], field="reference") if "reference" in opened else None
        return Item(image=image, crop=crop, text=text, has_mask="mask" in opened, reference=reference)

    async def _outcome(self, batcher: Batcher, item: Item) -> Outcome:
        limit = self.settings.score_timeout
        try:
            return await asyncio.wait_for(asyncio.wrap_future(batcher.submit(item)), limit)
        except TimeoutError:
            self.metrics.failures.labels(batcher.scorer.name, "timeout").inc()
            return failed(batcher.scorer.fields, f"{batcher.scorer.name} took longer than {limit:g} s")

    def _response(self, outcomes: list[Outcome]) -> ScoreResponse:
        values: dict = dict.fromkeys(COMPONENTS)
        errors = dict.fromkeys(COMPONENTS, "no scorer for it is configured")
        for outcome in outcomes:
            for field, value in outcome.values.items():
                values[field] = value
                del errors[field]
            errors.update(outcome.errors)
        return ScoreResponse(
            **values, errors=errors, reward_model_disabled=self.settings.disable_reward_model
        )


def _probe(scorer: Scorer) -> Outcome | ScorerUnavailableError:
    """The outcome of the probe picture, or the reason to try again later."""
    try:
        return scorer.score_items([probe_item()])[0]
    except ScorerUnavailableError as error:
        return error
    except Exception as error:
        log.exception("scorer %s failed on its probe picture", scorer.name)
        return failed(scorer.fields, f"{type(error).__name__}: {error}")


def _pixels(opened: Opened) -> int:
    return sum(image.width * image.height for image in opened.values())


def _version() -> str:
    try:
        return version("calligrapher")
    except PackageNotFoundError:
        return "unknown"
