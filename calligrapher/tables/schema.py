"""The Parquet schema: what a row of rollouts, scores and advantages has.

Legend: L image tokens, D packed channels, W window steps. Reading and writing:
`calligrapher.tables.parquet`.
"""

from collections.abc import Sequence
from typing import Any

import pyarrow as pa

SCHEMA_VERSION = "1"

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
# `group_id` counts the groups of a round: a case drawn twice has two. `member` counts within the
# group.
ROLLOUT_COLUMNS = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("round", pa.int32(), nullable=False),
        pa.field("case_id", pa.string(), nullable=False),
        pa.field("group_id", pa.int32(), nullable=False),
        pa.field("member", pa.int32(), nullable=False),
        pa.field("prompt", pa.string(), nullable=False),
        pa.field("text", pa.string(), nullable=False),
        pa.field("seed", pa.int64(), nullable=False),
        pa.field("policy_digest", pa.string(), nullable=False),
        pa.field("num_steps", pa.int32(), nullable=False),
        pa.field("guidance_scale", pa.float64(), nullable=False),
        pa.field(
            "mask_box", pa.list_(pa.int32(), 4), nullable=False
        ),  # left, top, right, bottom in pixels
        pa.field("image", IMAGE),  # nullable on paper: `datasets` compares the field with its own
    ]
)
# Rows' tensors: the clean latent always (but in evaluations), with GRPO the stochastic window.
TENSOR_COLUMNS = {
    "x0": "[L, D] the clean latent",
    "trajectory": "[W + 1, L, D] x before each step of the window and after its last",
    "log_prob": "[W] of the step taken",
    "window_sigmas": "[W + 1]",
    "mean_old": "[W, L, D] the rollout policy's means (GRPO-Guard)",
}
WINDOW_COLUMNS = {"trajectory", "log_prob", "window_sigmas"}

SCORE_COLUMNS = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("ocr_text", pa.string()),
        pa.field("ocr_confidence", pa.float64()),
        pa.field("ocr_accuracy", pa.float64()),
        pa.field("ocr_likelihood", pa.float64()),
        pa.field("vlm_score", pa.float64()),
        pa.field("style_score", pa.float64()),
        pa.field("reward", pa.float64()),  # null when unscored, then `reason` says why
        pa.field("reason", pa.string()),
    ]
)
_BOX = [pa.field(side, pa.float64()) for side in ("left", "top", "right", "bottom")]  # px
# Further columns, where letters are compared: of each letter of the text, in order.
LETTER_SCORES = pa.field(
    "ocr_letters", pa.list_(pa.struct([pa.field("likelihood", pa.float64()), *_BOX]))
)
LETTER_ADVANTAGES = pa.field(
    "letters", pa.list_(pa.struct([pa.field("advantage", pa.float64()), *_BOX]))
)
ADVANTAGE_COLUMNS = pa.schema(
    [
        pa.field("sample_id", pa.string(), nullable=False),
        pa.field("reward", pa.float64()),
        pa.field("group_mean", pa.float64()),
        pa.field("group_std", pa.float64()),
        pa.field("advantage", pa.float64()),  # null where not kept
        pa.field("kept", pa.bool_(), nullable=False),
    ]
)


def sample_id(round: int, group_id: int, member: int) -> str:
    """The key of one image within a run: sorts as the rollout made them."""
    return f"{round:04d}-{group_id:05d}-{member:03d}"


def huggingface_features(fields: Sequence[pa.Field]) -> dict[str, Any]:
    """Return the columns in the words of Hugging Face `datasets`.

    It then shows pictures and not bytes.
    """
    features: dict[str, Any] = {}
    for field in fields:
        if field.name == "image":
            features[field.name] = {"_type": "Image"}
        elif pa.types.is_fixed_size_list(field.type):
            element = {"dtype": str(field.type.value_type), "_type": "Value"}
            features[field.name] = {
                "feature": element,
                "length": field.type.list_size,
                "_type": "List",
            }
        else:
            dtype = {"double": "float64"}.get(str(field.type), str(field.type))
            features[field.name] = {"dtype": dtype, "_type": "Value"}
    return features
