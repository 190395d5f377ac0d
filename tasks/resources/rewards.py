"""Asks the reward servers about pictures and weighs the answers: a row of the score table each."""

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from calligrapher.data.canvas import Canvas
from calligrapher.data.case import Case
from calligrapher.data.images import load_mask, load_rgb, mask_to_tensor, png_bytes, to_image
from calligrapher.durable import atomic_write
from calligrapher.errors import ParamsError, RewardError
from calligrapher.tables.schema import SCORE_COLUMNS
from reward_server.alphabet import Alphabet
from reward_server.client import (
    TOKEN_VARIABLE,
    RewardClient,
    RewardClientError,
    RewardItem,
    RewardResult,
)
from reward_server.components import (
    FACTORS,
    LESSENED,
    LETTERS,
    NAMES,
    SEES_REFERENCE,
    STYLE,
    WEIGHABLE,
    WEIGHT_OF,
    measured_by,
)
from reward_server.text import Match
from tasks.params.run_params import RewardParams

DISABLED_REWARD = 0.5
MADE_UP = (
    "The reward servers must measure pictures. Got made-up numbers: one runs with"
    " --disable-reward-model. Start it without, or set reward.disable_reward_model=true to train"
    " on constant rewards, without a server."
)
NO_LETTERS = (
    "advantage.per_letter must be false where the reward servers do not tell where letters stand."
    " Got true. Set it to false, or run a newer version of each server, with OCR."
)
_GAVE_NONE = "the server gave none"
REFERENCE_SIDE = 1024  # pixels of the longer side; judges see a reference no larger


class RewardScorer:
    """Scores pictures of one size on the servers `urls`.

    urls: or a function that starts the servers when they are first needed; with
    `disable_reward_model` nobody is asked. identity_note: a file whose name stands for all that
    decides what `identity` says, so that nothing need be started to know it.
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
        self._token = _token(params)
        self._checked = False
        self.is_asking = False
        """Whether an answer about pictures is awaited, for at most 10 x `reward.timeout_s`."""

    @cached_property
    def client(self) -> RewardClient | None:
        params = self.params
        if params.disable_reward_model:
            return None
        return RewardClient(
            self.urls(),
            rank=self._rank,
            token=self._token,
            request_timeout_s=params.timeout_s,
            deadline_s=10 * params.timeout_s,
            needed=tuple(params.component_weights),
        )

    def urls(self) -> list[str]:
        """Return the servers' addresses; those of servers of our own start when first asked for."""
        return list(self._urls() if callable(self._urls) else self._urls)

    def identity(self) -> dict[str, Any]:
        """Return what decides a score besides the picture: engines and digests of their weights.

        Raises RewardError when the servers do not answer, are set up unlike, make numbers up, or do
        not measure what is weighed.
        """
        if self._note is not None and self._note.is_file():
            return json.loads(self._note.read_bytes())
        if self.client is None:
            return {"disabled": True}
        info = self._info()
        _check_info(info, self.params)
        identity = {"scorers": info["scorers"]}
        if self._note is not None:
            self._note.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(self._note, json.dumps(identity).encode())
        return identity

    def score(
        self, images: Sequence[bytes], cases: Sequence[Case], letters: bool = False
    ) -> list[dict[str, Any]]:
        """Return a row of the score table, without `sample_id`, for each PNG picture and its case.

        letters: each letter of the text is asked about; a row then has `ocr_letters`. Raises
        RewardError when the servers cannot be reached, refuse the request or make numbers up.
        """
        if self.client is None:
            return [
                dict.fromkeys(NAMES) | {"reward": DISABLED_REWARD, "reason": None} for _ in images
            ]
        self._check_scorers_unchanged()
        # By the case, not by its id: training and held-out cases may both be numbered from 1.
        pictures = {case: self._pictures(case) for case in dict.fromkeys(cases)}
        items = [
            RewardItem(
                image=image,
                prompt=case.prompt,
                text=case.text,
                match=case.ocr_match or self.params.ocr_match,
                letters=letters,
                **pictures[case],
            )
            for image, case in zip(images, cases, strict=True)
        ]
        self.is_asking = True
        try:
            results = self.client.score_batch(items)
        except RewardClientError as error:
            raise RewardError(
                f"{len(items)} images could not be scored. {error} What was scored before is kept:"
                " start the same command again when the servers answer."
            ) from error
        finally:
            self.is_asking = False
        if any(result.reward_model_disabled for result in results):
            raise RewardError(MADE_UP)
        return self.weigh(results, letters=letters)

    def _check_scorers_unchanged(self) -> None:
        """Raise RewardError when the run's own server has loaded other files than were named.

        Its identity was noted, maybe by an earlier start, and stands in what is made; the server
        reads the files when it is first needed.
        """
        if self._note is None or not self.params.scorers or self._checked:
            return
        noted, loaded = self.identity()["scorers"], self._info()["scorers"]
        for name in self.params.scorers:
            if noted.get(name) != loaded.get(name):
                raise RewardError(
                    f"The file of the scorer {name} must stay as it is while a run goes on. It has"
                    " changed. Start the run again; scores by the earlier file are then stale."
                )
        self._checked = True

    def _info(self) -> dict[str, Any]:
        assert self.client is not None
        try:
            return self.client.info()
        except RewardClientError as error:
            raise RewardError(
                f"The reward servers must say what they score with. {error}"
            ) from error

    def weigh(
        self, results: Sequence[RewardResult], *, letters: bool = False
    ) -> list[dict[str, Any]]:
        """Rows of the score table: what was measured, and the reward that it gives.

        Raises RewardError where `letters` were asked about and a server does not know of them.
        """
        measured = [result.components() for result in results]
        # A refused item has none of the components that only a user's own scorers know of.
        names = list(dict.fromkeys(n for row in (*measured, self.params.weights) for n in row))
        rows = [
            (full := {name: row.get(name) for name in names})
            | reward_of(self.params, full, result.errors)
            for row, result in zip(measured, results, strict=True)
        ]
        for row, result in zip(rows, results, strict=True) if letters else ():
            found = result.ocr_letters
            if found is None and result.ocr_likelihood is not None:
                raise RewardError(NO_LETTERS)
            row[LETTERS] = None if found is None else [vars(letter) for letter in found]
        return rows

    def _pictures(self, case: Case) -> dict[str, bytes]:
        """Return what is sent with a picture of `case`: mask and, if anybody looks, reference."""
        mask = mask_to_tensor(load_mask(case.mask), self.canvas.width, self.canvas.height)
        pictures = {"mask": png_bytes(to_image(mask.expand(3, -1, -1) * 2 - 1))}
        # A scorer of one's own may look at anything.
        if self.params.scorers or any(
            name in SEES_REFERENCE or name not in (*NAMES, *FACTORS)
            for name in self.params.component_weights
        ):
            reference = load_rgb(case.reference)
            reference.thumbnail((REFERENCE_SIDE, REFERENCE_SIDE), Image.Resampling.LANCZOS)
            pictures["reference"] = png_bytes(reference)
        return pictures


def reward_of(
    params: RewardParams, row: Mapping[str, Any], errors: Mapping[str, str]
) -> dict[str, Any]:
    """Return the `reward` of what was measured; null, with a `reason`, when a part is missing.

    It is `sum(weight * component)`; with `factors`, what OCR read counts their product times, with
    `style_factors` the style.
    """
    missing = [
        f"{component}: {errors.get(component, _no_reason(errors))}"
        for component in params.needed
        if row.get(component) is None
    ]
    if missing:
        return {"reward": None, "reason": "; ".join(missing)}
    parts = reward_parts(params, row)
    reward = sum(weight * parts[name] for name, weight in params.component_weights.items())
    return {"reward": reward, "reason": None}


def reward_parts(params: RewardParams, row: Mapping[str, Any]) -> dict[str, float]:
    """Return what is weighed of a row that lacks nothing `needed`: component -> value.

    What OCR read counts the product of `factors` times, style the product of `style_factors` (of
    what OCR read, as it counts); other components are as measured.
    """
    factor = lessening(params, row)

    def counted(name: str) -> float:
        if name == STYLE:
            return row[name] * math.prod(counted(other) for other in params.style_factors)
        return row[name] * factor if name in LESSENED else row[name]

    return {name: counted(name) for name in params.component_weights}


def lessening(params: RewardParams, row: Mapping[str, Any]) -> float:
    """Return what `factors` leave of what OCR read, 0..1, for a row that lacks none of them."""
    return math.prod(row[name] for name in params.factors)


def measured_numbers(columns: Iterable[str]) -> list[str]:
    """Return the components among the columns of a score table that a reward could weigh."""
    others = {*NAMES, LETTERS, "sample_id", "reward", "reason"}
    columns = list(columns)
    own = [name for name in columns if name not in others]
    return [name for name in WEIGHABLE if name in columns] + own


def further_numbers(columns: Iterable[str]) -> list[str]:
    """Return the components of `measured_numbers` that stand in no fixed column of the table."""
    return [name for name in measured_numbers(columns) if name not in SCORE_COLUMNS.names]


def _no_reason(errors: Mapping[str, str]) -> str:
    """Return the reason of a component that `errors` does not know: that of a refused item."""
    reasons = set(errors.values())
    return reasons.pop() if set(NAMES) <= set(errors) and len(reasons) == 1 else _GAVE_NONE


def check_scorers(params: RewardParams) -> None:
    """Raise ParamsError unless each of `scorers` names a readable file and a class in it.

    Nothing is run. Without a server of the run's own nobody loads them.
    """
    if params.disable_reward_model or params.server_urls:
        return
    for file in params.scorer_files.values():
        try:
            file.check()
        except ValueError as error:
            raise ParamsError(f"reward.scorers: {error}") from None


def scorer_identities(params: RewardParams) -> dict[str, dict[str, str]]:
    """Return what decides the numbers of each of `scorers`. Raises ParamsError."""
    try:
        return {name: file.identity() for name, file in params.scorer_files.items()}
    except ValueError as error:
        raise ParamsError(f"reward.scorers: {error}") from None


def check_servers(params: RewardParams, *, letters: bool = False) -> None:
    """Raise RewardError unless the servers that `params` names can score, or are loading.

    Asks each once; without named servers there is nothing to ask. letters: they must tell of those.
    """
    if params.disable_reward_model or not params.server_urls:
        return
    with RewardClient(
        params.server_urls, token=_token(params), request_timeout_s=min(params.timeout_s, 10.0)
    ) as client:
        try:
            infos = client.check()
        except RewardClientError as error:
            raise RewardError(
                "reward.server_urls must name reward servers that answer. Found:"
                f" {str(error).rstrip('.')}. Start them, or correct the addresses; empty, the run"
                " starts a server of its own."
            ) from error
    for info in infos:
        _check_info(info, params, letters=letters)


def served_alphabet(params: RewardParams, urls: Sequence[str], match: Match) -> Alphabet:
    """Return the alphabet of these servers' OCR. Raises LookupError where none tells it now."""
    with RewardClient(
        urls, token=_token(params), request_timeout_s=min(params.timeout_s, 10.0)
    ) as client:
        try:
            characters = client.alphabet()
        except RewardClientError as error:
            raise LookupError(str(error)) from None
    if characters is None:
        raise LookupError("no reward server tells its letters (older, loading, or without OCR)")
    return Alphabet(characters, match)


def _check_info(info: Mapping[str, Any], params: RewardParams, *, letters: bool = False) -> None:
    """Raise RewardError unless a server with this `/info` measures what `params` weighs.

    letters: it must also tell where letters stand.
    """
    if info.get("reward_model_disabled"):
        raise RewardError(MADE_UP)
    if "scorers" not in info:
        raise RewardError(
            "reward.server_urls, or reward.server_port, must name reward servers. Got something"
            f" whose /info holds {sorted(info)[:5]} and no scorers. Correct the address."
        )
    measured = info.get("components", NAMES)  # a server of before does not say
    for component, weight in params.component_weights.items():
        if component not in measured:
            key = WEIGHT_OF.get(component, f"weights.{component}")
            raise RewardError(
                f"reward.{key} must be 0 where the reward servers do not measure"
                f" {component}. Got {weight}. Set it to 0, or start them with"
                f" {measured_by(component)}."
            )
    if letters and not info.get("letters"):
        raise RewardError(NO_LETTERS)
    for component in params.needed:
        if component not in measured:
            key = "factors" if component in params.factors else "style_factors"
            raise RewardError(
                f"reward.{key} must name what the reward servers measure. Got {component}, which"
                f" they do not. Leave it out, or start them with {measured_by(component)}."
            )


def _token(params: RewardParams) -> str | None:
    """Return the token of `params.token_file`; None leaves it to the environment, which wins.

    Raises ParamsError.
    """
    if params.token_file is None or os.environ.get(TOKEN_VARIABLE):
        return None
    path = Path(params.token_file)
    try:
        token = path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise ParamsError(
            f"reward.token_file must be a readable text file. Got {path}: {error}. Name another, or"
            f" set the environment variable {TOKEN_VARIABLE}."
        ) from error
    if not token or not token.isascii():
        raise ParamsError(
            f"reward.token_file must hold an ASCII token. Got {path}, which does not."
        )
    return token
