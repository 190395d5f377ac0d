"""The wire types: what a request and an answer look like."""

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from reward_server.components import LOWEST
from reward_server.scorers.base import KINDS
from reward_server.text import Match

MAX_PROMPT_CHARS = 4096
MAX_TEXT_CHARS = 256

Base64PNG = Annotated[
    str,
    Field(
        description="a PNG file, base64 (standard alphabet, padded)",
        json_schema_extra={"contentEncoding": "base64", "contentMediaType": "image/png"},
    ),
]
Kind = Annotated[
    str,
    Field(
        description="; ".join(f"{kind}: {meaning}" for kind, meaning in KINDS.items()),
        json_schema_extra={"enum": list(KINDS)},
    ),
]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]
Cosine = Annotated[float, Field(ge=LOWEST["style_score"], le=1)]


class Wire(BaseModel):
    """Fields that are not known are passed over: either side may be newer than the other."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class Part(Wire):
    """Where a picture lies in the whole one that it was cut out of, in px."""

    left: int = Field(ge=0, strict=True)
    top: int = Field(ge=0, strict=True)
    width: int = Field(ge=1, strict=True, description="of the whole picture")
    height: int = Field(ge=1, strict=True, description="of the whole picture")


class LetterScore(Wire):
    """One character of the target, as `components.Letter` says it."""

    likelihood: Share
    left: Number
    top: Number
    right: Number
    bottom: Number


class ScoreRequest(Wire):
    """One painted picture to be scored.

    Limits are checked by `intake`, not here: an item that breaks one fails alone, not its batch.
    """

    image: Base64PNG
    prompt: str = Field(
        description=(
            "ends in \"The text is 'X'.\" unless `text` is given; at most"
            f" {MAX_PROMPT_CHARS} characters"
        ),
    )
    mask: Base64PNG | None = Field(
        None,
        description=(
            "white = the painted text area; of the image's size. OCR reads what lies in it; style"
            " sees its bounding box"
        ),
    )
    timestep: float | None = Field(
        None,
        ge=0,
        le=1000,
        strict=True,
        allow_inf_nan=False,
        description="accepted for older clients; no scorer depends on it",
    )
    text: str | None = Field(
        None,
        description=f"the text that the picture should show, 1 to {MAX_TEXT_CHARS} characters",
    )
    reference: Base64PNG | None = Field(
        None, description="the picture whose style was wanted (style, VLM)"
    )
    match: Match | None = Field(
        None,
        description="exact: case and spaces count; loose: they do not; default: as the server's",
    )
    letters: bool = Field(
        False,
        strict=True,
        description="whether `ocr_letters` is wanted; only where `/info` says so of itself",
    )
    part: Part | None = Field(
        None,
        description=(
            "image and mask are this part of their whole picture; only where an answer's"
            " X-Reward-Protocol is 3 or more, and with all that OCR looks at"
        ),
    )
    components: list[str] | None = Field(
        None,
        description=(
            "measure only these: what is not asked for costs no time and waits in no queue;"
            " default: all"
        ),
    )


class ScoreResponse(Wire):
    """Every component of one picture's score; one is null exactly when `errors` says why.

    Its fields are those of `components.Measured`, described, and one for each aspect of the
    lines read (`components.FACTORS`) and each component that a scorer of the user's own measures.
    """

    model_config = ConfigDict(extra="allow", frozen=True)
    __pydantic_extra__: dict[str, Number | None] = Field(init=False)

    vlm_score: Share | None
    ocr_text: str | None
    ocr_confidence: Share | None = Field(
        description="mean confidence of what was read, whatever was read"
    )
    ocr_accuracy: Share | None = Field(
        description="1 - min(edit distance, length) / length of the target text"
    )
    ocr_likelihood: Share | None = Field(
        description=(
            "probability of the target text in the recogniser's output, geometric mean per"
            " character"
        )
    )
    style_score: Cosine | None = Field(
        description="how alike the styles of crop and reference are, by SigLIP"
    )
    ocr_letters: list[LetterScore] | None = Field(
        None,
        description=(
            "of each letter of the target that counts, in the picture's order from left to right,"
            " how likely it is, and its box in px of the whole picture; null, without an error,"
            " unless `letters` was sent and ocr_likelihood is there"
        ),
    )
    errors: dict[str, str] = Field(description="field -> why it is null")
    kinds: dict[str, Kind] = Field(description="field -> of what kind its error is")
    reward_model_disabled: bool = Field(
        description="debug mode: the numbers are made up from the picture's bytes"
    )


class BatchRequest(Wire):
    """Several pictures; the answer keeps their order.

    Each item is checked by itself: one of a wrong form is answered with its `error`.
    """

    items: list[Any] = Field(
        min_length=1,
        json_schema_extra={"items": {"anyOf": [{"$ref": "#/components/schemas/ScoreRequest"}, {}]}},
    )


class ItemResult(Wire):
    """Either `score`, or `error` for an item that cannot be scored as it was sent."""

    score: ScoreResponse | None
    error: str | None


class BatchResponse(Wire):
    results: list[ItemResult]


class Alive(Wire):
    status: str = Field(description="alive")
    pid: int


class Health(Wire):
    status: str = Field(description="ok | loading | broken | stopping")
    scorers: dict[str, str] = Field(
        description="name -> ready | loading | waiting: why | broken: why"
    )
    pid: int


class Limits(Wire):
    max_items: int
    max_body_bytes: int
    max_pixels: int
    queue_size: int
    max_prompt_chars: int = MAX_PROMPT_CHARS
    max_text_chars: int = MAX_TEXT_CHARS


class Info(Wire):
    version: str
    scorers: dict[str, dict[str, str]] = Field(
        description="engine, model, versions and weight digests of each"
    )
    components: list[str] = Field(description="what is measured: fields of an answer")
    letters: bool = Field(description="whether an item may ask for `letters`")
    limits: Limits
    reward_model_disabled: bool
    fingerprint: str = Field(
        description="sha256 of what decides the scores: scorers and debug mode, not limits"
    )
    alphabet: str | None = Field(
        description="sha256 of the letters that the OCR knows (`/alphabet`); null without OCR"
    )


class Letters(Wire):
    characters: list[str] | None = Field(
        description=(
            "what each output class of the recogniser spells, the first one nothing; null without"
            " OCR"
        )
    )


class Problem(Wire):
    """The body of every 4xx and 5xx answer."""

    detail: str
