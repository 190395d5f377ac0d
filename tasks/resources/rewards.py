"""Asks the reward servers about pictures and weighs the answers: one row of the score table per
picture."""

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from calligrapher.data.canvas import Canvas
from calligrapher.data.case import Case
from calligrapher.data.images import load_mask, load_rgb, mask_to_tensor, png_bytes, to_image
from calligrapher.durable import atomic_write
from calligrapher.errors import RewardError
from reward_server.client import RewardClient, RewardClientError, RewardItem, RewardResult
from tasks.params.run_params import RewardParams

COMPONENTS = {
    "ocr_weight": "ocr_accuracy",
    "likelihood_weight": "ocr_likelihood",
    "vlm_weight": "vlm_score",
    "style_weight": "style_score",
}
FIELDS = (
    "ocr_text",
    "ocr_confidence",
    "ocr_accuracy",
    "ocr_likelihood",
    "vlm_score",
    "style_score",
)
DISABLED_REWARD = 0.5


class Scorer:
    """Scores pictures of one size on the servers `urls`; with `disable_reward_model` it asks
    nobody.

    urls: or a function that starts the servers when they are first needed. identity_note: a file
    whose name stands for all that decides what `identity` says, so that nothing need be started to
    know it.
    """

    def __init__(
        self,
        params: RewardParams,
        urls: Sequence[str] | Callable[[], Sequence[str]],
        canvas: Canvas,
        *,
        rank: int = 0,
        identity_note: Path | None = None,
    ):
        self.params, self.canvas = params, canvas
        self._urls, self._rank, self._note = urls, rank, identity_note
        self._pngs: dict[str, tuple[bytes, bytes]] = {}

    @cached_property
    def client(self) -> RewardClient | None:
        params = self.params
        if params.disable_reward_model:
            return None
        urls = self._urls() if callable(self._urls) else self._urls
        return RewardClient(
            urls,
            rank=self._rank,
            request_timeout_s=params.timeout_s,
            deadline_s=10 * params.timeout_s,
        )

    def identity(self) -> dict[str, Any]:
        """What decides a score besides the picture: engines and the digests of their weights."""
        if self._note is not None and self._note.is_file():
            return json.loads(self._note.read_bytes())
        if self.client is None:
            return {"disabled": True}
        try:
            info = self.client.info()
        except RewardClientError as error:
            raise RewardError(
                f"The reward servers must say what they score with. {error}"
            ) from error
        found = {"scorers": info["scorers"]}
        if self._note is not None:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self._note, json.dumps(found).encode())
        return found

    def score(self, images: Sequence[bytes], cases: Sequence[Case]) -> list[dict[str, Any]]:
        """PNG pictures and their cases -> rows of the score table, without `sample_id`.

        Raises RewardError when the servers cannot be reached or refuse the request.
        """
        if self.client is None:
            return [
                dict.fromkeys(FIELDS) | {"reward": DISABLED_REWARD, "reason": None} for _ in images
            ]
        items = [self._item(image, case) for image, case in zip(images, cases, strict=True)]
        try:
            results = self.client.score_batch(items)
        except RewardClientError as error:
            raise RewardError(
                f"{len(items)} images could not be scored. {error} What was scored before is kept:"
                " start the same command again when the servers answer."
            ) from error
        return [self.weigh(result) for result in results]

    def weigh(self, result: RewardResult) -> dict[str, Any]:
        """A row of the score table: what was measured, and the reward that it gives."""
        row = {name: getattr(result, name) for name in FIELDS}
        return row | reward_of(self.params, row, result.errors)

    def _item(self, image: bytes, case: Case) -> RewardItem:
        if case.case_id not in self._pngs:
            mask = mask_to_tensor(load_mask(case.mask), self.canvas.width, self.canvas.height)
            grey = to_image(mask.expand(3, -1, -1) * 2 - 1)
            self._pngs[case.case_id] = (png_bytes(grey), png_bytes(load_rgb(case.reference)))
        mask_png, reference = self._pngs[case.case_id]
        looks_at_reference = self.params.style_weight > 0 or self.params.vlm_weight > 0
        return RewardItem(
            image=image,
            prompt=case.prompt,
            text=case.text,
            mask=mask_png,
            reference=reference if looks_at_reference else None,
        )


def reward_of(
    params: RewardParams, row: Mapping[str, Any], errors: Mapping[str, str]
) -> dict[str, Any]:
    """`sum(weight * component)` as `reward`; null, with a `reason`, when one that counts is
    missing."""
    total, missing = 0.0, []
    for weight_name, component in COMPONENTS.items():
        weight = getattr(params, weight_name)
        if weight == 0:
            continue
        if row[component] is None:
            missing.append(f"{component}: {errors.get(component, 'the server gave none')}")
        else:
            total += weight * row[component]
    return {"reward": None if missing else total, "reason": "; ".join(missing) or None}
