"""A model behind HTTP: pictures go out, numbers come back.

`--scorer "judge=examples/rewards/remote_scorer.py:RemoteScorer?url=http://host:9000/score"`

Asked is `{"items": [{"image": PNG, "mask": PNG or null, "text": ..., "prompt": ...}]}`, pictures in
base64, and the answer must be `{"scores": [0.5, null, ...]}`: a number of 0..1 or null for each
item.
`JUDGE_TOKEN` in the environment is sent as a bearer token.
"""

import base64
import io
import os

import numpy as np
import requests
from PIL import Image

from reward_server.scorers.base import ScorerUnavailableError


class RemoteScorer:
    """Asks `url`. What it cannot answer now (no connection, 429, 5xx) is unavailable."""

    parallel = 4  # requests under way at once
    max_batch = 8

    def __init__(self, url: str, timeout_s: str = "20"):
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"url must begin with http:// or https://. Got {url!r}.")
        self.url, self.request_s = url, float(timeout_s)
        self.timeout_s = self.request_s + 5  # of a call: the request gives up first
        token = os.environ.get("JUDGE_TOKEN")
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def score(self, items):
        """Return what the server answers for each item."""
        body = {"items": [sent(item) for item in items]}
        try:
            # A connection for each request: a session must not be shared by threads.
            answer = requests.post(
                self.url, json=body, headers=self.headers, timeout=self.request_s
            )
        except requests.RequestException as error:
            raise ScorerUnavailableError(f"{self.url}: {type(error).__name__}") from error
        if answer.status_code == 429 or answer.status_code >= 500:
            raise ScorerUnavailableError(f"{self.url} answered {answer.status_code}")
        if answer.status_code != 200:
            raise ValueError(f"{self.url} answered {answer.status_code}: {answer.text[:200]}")
        return answer.json()["scores"]


def sent(item) -> dict:
    """Return an item as it travels."""
    mask = None if item.mask is None else png(item.mask.astype(np.uint8) * 255)
    return {"image": png(item.image), "mask": mask, "text": item.text, "prompt": item.prompt}


def png(picture: np.ndarray) -> str:
    """Return a picture as base64 of a PNG file."""
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, format="PNG", compress_level=1)
    return base64.b64encode(buffer.getvalue()).decode("ascii")
