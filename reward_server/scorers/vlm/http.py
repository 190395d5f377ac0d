"""The remote VLM scorer: any server with OpenAI's chat completions (vLLM, SGLang)."""

import base64
import io
import logging
import math
import threading
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import requests
from PIL import Image

from reward_server.scorers.base import Item, Outcome, ScorerUnavailableError, failed
from reward_server.scorers.vlm.question import (
    DIGITS,
    DeniedError,
    NoScoreError,
    Question,
    expectation,
    parse_answer,
    pictures,
)

log = logging.getLogger(__name__)

_TOP_LOGPROBS = 20  # the most that the API allows; ten digits fit in
_MAX_NEW_TOKENS = 256
_ABOVE_ZERO = 1e-3  # rounding that a log-probability may have


class HttpVLMScorer:
    """A VLM behind an OpenAI-compatible API as a Scorer.

    Its server does the batching: `parallel` requests are under way at once. Whatever it answers,
    this process is not broken: what makes no sense is its server's outage, asked again later.
    """

    remote = True
    name = "vlm"
    fields = ("vlm_score",)
    max_batch, max_wait_s = 1, 0.0

    def __init__(
        self,
        url: str,
        model: str,
        question: Question,
        *,
        api_key: str | None = None,
        parallel: int = 8,
        timeout_s: float = 60.0,
        attempts: int = 3,
        min_mass: float = 0.5,
    ):
        self._endpoint = url.rstrip("/") + "/chat/completions"
        self._model, self._question = model, question
        self.parallel = parallel
        self._timeout_s, self._attempts, self._min_mass = timeout_s, attempts, min_mass
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._local = threading.local()

    @property
    def info(self) -> dict[str, str]:
        """See Scorer.

        The address is no part of it: the same model elsewhere gives the same scores.
        """
        return {
            "engine": "openai-compatible",
            "model": self._model,
            "mode": self._question.mode,
            "prompt_sha256": self._question.digest,
        }

    def score_items(self, items: Sequence[Item]) -> list[Outcome]:
        """See Scorer. Raises ScorerUnavailableError when the endpoint does not answer."""
        return [self._score_one(item) for item in items]

    def close(self) -> None:
        """Connections end with their threads."""

    def request_body(self, item: Item) -> dict[str, Any]:
        """The chat completion that is asked for: pictures as data URLs, then the question."""
        content: list[dict] = [
            {"type": "image_url", "image_url": {"url": _data_url(picture)}}
            for picture in pictures(item)
        ]
        content.append({"type": "text", "text": self._question.ask(item)})
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
        }
        if self._question.mode == "expectation":
            return {**body, "max_tokens": 1, "logprobs": True, "top_logprobs": _TOP_LOGPROBS}
        return {**body, "max_tokens": _MAX_NEW_TOKENS}

    def _score_one(self, item: Item) -> Outcome:
        try:
            choice = self._complete(self.request_body(item))
            if self._question.mode == "generate":
                return Outcome({"vlm_score": parse_answer(choice["message"]["content"] or "")})
            return Outcome(
                {"vlm_score": expectation(_digit_probs(choice), min_mass=self._min_mass)}
            )
        except NoScoreError as error:
            return failed(self.fields, str(error))
        except DeniedError as error:
            return failed(self.fields, str(error), "denied")
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            reason = f"the VLM's answer must be a chat completion. Missing: {error!r}."
            return failed(self.fields, reason, "unavailable")

    def _complete(self, body: dict) -> dict:
        """Return `choices[0]` of the answer.

        Busy, broken or silent servers are asked again, refusals are final.
        """
        reason, pause = "", 0.5
        for attempt in range(self._attempts):
            if attempt:
                time.sleep(pause)
                pause = min(2 * pause, 8.0)
            try:
                response = self._session().post(
                    self._endpoint, json=body, timeout=(5.0, self._timeout_s)
                )
                if response.status_code == 200:
                    return response.json()["choices"][0]
            except requests.RequestException as error:  # includes an answer that breaks off
                reason = f"{type(error).__name__}: {error}"
                continue
            reason = f"status {response.status_code}: {response.text[:200]}"
            if response.status_code == 429:
                pause = _seconds(response.headers.get("Retry-After"), pause)
            elif response.status_code < 500:
                raise DeniedError(f"the VLM server refused the request with {reason}")
        raise ScorerUnavailableError(f"no answer in {self._attempts} attempts, last: {reason}")

    def _session(self) -> requests.Session:
        if not hasattr(self._local, "session"):
            self._local.session = requests.Session()
            self._local.session.trust_env = False
            self._local.session.headers.update(self._headers)
        return self._local.session


def _digit_probs(choice: dict) -> dict[str, float]:
    """Return the probabilities of the digits among the first token's alternatives.

    A digit that is not among them is left out. Raises DeniedError without log-probabilities, and
    ScorerUnavailableError when one is none (NaN, above 0): the model there has lost its numbers.
    """
    if not choice.get("logprobs") or not choice["logprobs"].get("content"):
        raise DeniedError(
            "the VLM server must return logprobs. Got none: it may have to be started with them"
            " allowed."
        )
    found: dict[str, float] = {}
    for one in choice["logprobs"]["content"][0]["top_logprobs"]:
        digit = one["token"].strip()
        if len(digit) == 1 and digit in DIGITS:
            if not one["logprob"] <= _ABOVE_ZERO:
                raise ScorerUnavailableError(
                    f"log-probabilities must be numbers up to 0. Got {one['logprob']} for {digit}"
                )
            found[digit] = found.get(digit, 0.0) + math.exp(one["logprob"])
    return found


def _data_url(picture: np.ndarray) -> str:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _seconds(text: str | None, otherwise: float) -> float:
    try:
        return min(max(float(text or otherwise), 0.0), 30.0)
    except ValueError:
        return otherwise
