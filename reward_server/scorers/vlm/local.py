"""The local VLM scorer: a Qwen2.5-VL folder run by transformers.

In mode `expectation` a score takes one forward. Inputs are built from the image processor and the
tokenizer alone (`Qwen2_5_VLProcessor` wants torchvision for videos): each picture becomes
`<|vision_start|>`, one `<|image_pad|>` per merged patch, `<|vision_end|>`. On the CPU every item
has a forward of its own, so a score depends on its item alone to the last bit. On a GPU items share
one, padded on the left; there padding moves a score by rounding only.

Legend: B items, T tokens, N patches of all pictures, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from reward_server.scorers.base import Item, Outcome, failed
from reward_server.scorers.digest import folder_digest
from reward_server.scorers.vlm.question import (
    DIGITS,
    NoScoreError,
    Question,
    expectation,
    parse_answer,
    pictures,
)

_SYSTEM = "You are a careful judge of lettering."
_MAX_PIXELS = 28 * 28 * 1280  # larger pictures are scaled down: about 1280 tokens each
_PAD_TO = 64  # lengths are padded to a multiple of this on a GPU, for few kernel shapes
_MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class Encoded:
    """One item as model input."""

    ids: list[int]  # T tokens
    pixels: Any  # [N, patch values]
    grids: Any  # [pictures, 3] patches in time, height, width


class LocalVLMScorer:
    """Qwen2.5-VL on this process's device as a Scorer."""

    name = "vlm"
    fields = ("vlm_score",)
    parallel = 1

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        image_processor: Any,
        question: Question,
        *,
        max_batch: int = 8,
        max_wait_s: float = 0.005,
        min_mass: float = 0.5,
        identity: dict[str, str] | None = None,
    ):
        self.model, self.tokenizer, self.image_processor = model, tokenizer, image_processor
        self.question, self.max_batch, self.max_wait_s = question, max_batch, max_wait_s
        self._min_mass = min_mass
        self._identity = identity or {}
        self._digit_ids = [_single_token(tokenizer, digit) for digit in DIGITS]
        self._image_id = _single_token(tokenizer, "<|image_pad|>")

    @classmethod
    def load(
        cls,
        path: Path,
        question: Question,
        *,
        device: str,
        max_batch: int,
        max_wait_s: float,
        min_mass: float,
    ) -> "LocalVLMScorer":
        """Return the scorer of a folder in the Hugging Face layout; never from the network.

        bf16 on a GPU, else float32.
        """
        import torch
        from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
            Qwen2VLImageProcessorPil,
        )

        if not (path / "config.json").is_file():
            raise FileNotFoundError(
                f"vlm_model_path must be a folder with a Qwen2.5-VL. Got {path}."
            )
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        identity = {"model": path.name, "sha256": folder_digest(path), "dtype": str(dtype)}
        model: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
            path, dtype=dtype, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path, local_files_only=True)
        size = dict(image_processor.size)
        image_processor.size = {**size, "longest_edge": min(size["longest_edge"], _MAX_PIXELS)}
        return cls(
            model.to(device).eval(),
            tokenizer,
            image_processor,
            question,
            max_batch=max_batch,
            max_wait_s=max_wait_s,
            min_mass=min_mass,
            identity=identity,
        )

    @property
    def info(self) -> dict[str, str]:
        """See Scorer."""
        from importlib.metadata import version

        engine = f"transformers {version('transformers')} on {self.model.device.type}"
        return {
            "engine": engine,
            "mode": self.question.mode,
            "prompt_sha256": self.question.digest,
            **self._identity,
        }

    def score_items(self, items: Sequence[Item]) -> list[Outcome]:
        """See Scorer."""
        size = 1 if self.model.device.type == "cpu" else self.max_batch
        outcomes: list[Outcome] = []
        for start in range(0, len(items), size):
            outcomes += self.score_together(items[start : start + size])
        return outcomes

    def close(self) -> None:
        """Nothing to release before the process ends."""

    def score_together(self, items: Sequence[Item]) -> list[Outcome]:
        """Score items in one forward."""
        inputs = self.batch([self.encode(item) for item in items])
        if self.question.mode == "expectation":
            return [self._expected(row) for row in self._digit_probs(inputs)]
        return [self._parsed(answer) for answer in self._answers(inputs)]

    def encode(self, item: Item) -> Encoded:
        """Tokens and patches of one item: system line, pictures, question, start of the answer."""
        features = self.image_processor.preprocess(pictures(item), return_tensors="pt")
        merged = self.image_processor.merge_size**2
        vision = "".join(
            "<|vision_start|>" + "<|image_pad|>" * (int(grid.prod()) // merged) + "<|vision_end|>"
            for grid in features["image_grid_thw"]
        )
        # The target text is data: a special token spelled in it must not become one.
        question = self.question.ask(item).replace("<|", "< |")
        chat = (
            f"<|im_start|>system\n{_SYSTEM}<|im_end|>\n"
            f"<|im_start|>user\n{vision}{question}<|im_end|>\n<|im_start|>assistant\n"
        )
        ids = self.tokenizer(chat, add_special_tokens=False)["input_ids"]
        return Encoded(ids, features["pixel_values"], features["image_grid_thw"])

    def batch(self, encoded: Sequence[Encoded]) -> dict[str, Any]:
        """Model inputs of several items, padded on the left.

        input_ids, attention_mask, mm_token_type_ids: [B, T]; pixel_values: [N, patch values].
        """
        import torch

        longest = max(len(one.ids) for one in encoded)
        length = longest if len(encoded) == 1 else -(-longest // _PAD_TO) * _PAD_TO
        pad = self.tokenizer.pad_token_id
        ids = torch.tensor([[pad] * (length - len(one.ids)) + one.ids for one in encoded])
        mask = torch.tensor([[0] * (length - len(one.ids)) + [1] * len(one.ids) for one in encoded])
        device, dtype = self.model.device, self.model.dtype
        return {
            "input_ids": ids.to(device),
            "attention_mask": mask.to(device),
            "mm_token_type_ids": (ids == self._image_id)
            .int()
            .to(device),  # 1 where a picture's token stands
            "pixel_values": torch.cat([one.pixels for one in encoded]).to(device, dtype),
            "image_grid_thw": torch.cat([one.grids for one in encoded]).to(device),
        }

    def _digit_probs(self, inputs: dict[str, Any]) -> list[list[float]]:
        """Probability of each digit as the answer's first token, [B][10]."""
        import torch

        with torch.inference_mode():
            logits = self.model(**inputs, logits_to_keep=1).logits[:, -1]  # [B, V]
            return logits.float().softmax(-1)[:, self._digit_ids].tolist()

    def _answers(self, inputs: dict[str, Any]) -> list[str]:
        import torch

        with torch.inference_mode():
            ids = self.model.generate(
                **inputs,
                max_new_tokens=_MAX_NEW_TOKENS,
                do_sample=False,
                pad_token_id=self.tokenizer.pad_token_id,
            )
        return self.tokenizer.batch_decode(
            ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True
        )

    def _expected(self, probs: list[float]) -> Outcome:
        try:
            score = expectation(dict(zip(DIGITS, probs, strict=True)), min_mass=self._min_mass)
            return Outcome({"vlm_score": score})
        except NoScoreError as error:
            return failed(self.fields, str(error))

    def _parsed(self, answer: str) -> Outcome:
        try:
            return Outcome({"vlm_score": parse_answer(answer)})
        except NoScoreError as error:
            return failed(self.fields, str(error))


def _single_token(tokenizer: Any, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if len(ids) != 1:
        raise ValueError(f"the VLM's tokenizer must have one token for {text!r}. Got {len(ids)}.")
    return ids[0]
