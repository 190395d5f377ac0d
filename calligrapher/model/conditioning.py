"""The frozen encoders, and a content-addressed cache of what they say: each case is encoded once.

A cache entry's name is a digest of the case's files and text, the encoders' weights and precision,
the canvas and the version of Pillow, which resizes. Entries are safetensors files that can be
deleted at any time; a damaged one is made anew.
"""

import hashlib
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import PIL
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from calligrapher.data.canvas import Canvas, prepare
from calligrapher.data.case import Case
from calligrapher.data.crop import Box
from calligrapher.durable import atomic_path, save_tensors
from calligrapher.errors import DataError
from calligrapher.model import latents
from calligrapher.model.policy import Conditioning

logger = logging.getLogger(__name__)

CACHE_VERSION = 1  # Raise it when `Encoders` says something else of the same inputs.


@dataclass
class Encoders:
    """VAE, CLIP, T5 and SigLIP of one model. `pipeline` is a `FluxFillPipeline`."""

    pipeline: object
    siglip: torch.nn.Module
    image_processor: object
    digest: str  # of all their weights
    max_sequence_length: int
    offload_text_encoder_two: bool = False

    @property
    def vae(self):
        return self.pipeline.vae

    @torch.no_grad()
    def encode(
        self, case: Case, canvas: Canvas, device: torch.device, box: Box | None = None
    ) -> dict[str, Tensor]:
        """Return the fields of `Conditioning` for one case, on the CPU, without a batch dimension.

        `box` is the part of the source that is on the canvas; None = all of it.
        """
        prompt, pooled = self.encode_prompt(case, device)
        prepared = prepare(case, canvas, box=box)
        pixels = self.image_processor(prepared.style_image, return_tensors="pt").pixel_values
        style = self.siglip(pixel_values=pixels.to(device, self.siglip.dtype)).pooler_output
        image, mask = prepared.image[None].to(device), prepared.mask[None].to(device)
        hidden = latents.encode(self.vae, image * (1 - mask))
        masked = torch.cat(
            [latents.pack(hidden), latents.pack_mask(mask, latents.vae_factor(self.vae))], dim=-1
        )
        ids = latents.image_ids(*hidden.shape[-2:])
        row = {"prompt": prompt, "pooled": pooled, "style": style, "masked": masked}
        return {k: v[0].float().cpu().contiguous() for k, v in row.items()} | {"image_ids": ids}

    def encode_target(self, case: Case, canvas: Canvas, device: torch.device) -> dict[str, Tensor]:
        """Return `x0` [L, D], the packed latents of the target or, without one, of the source."""
        prepared = prepare(case, canvas)
        picture = prepared.image if prepared.target is None else prepared.target
        return self._encode_picture(picture, device)

    def encode_source(self, case: Case, canvas: Canvas, device: torch.device) -> dict[str, Tensor]:
        """Return `x0` [L, D], the packed latents of the source, of which nothing is masked."""
        return self._encode_picture(prepare(case, canvas).image, device)

    @torch.no_grad()
    def _encode_picture(self, picture: Tensor, device: torch.device) -> dict[str, Tensor]:
        x0 = latents.pack(latents.encode(self.vae, picture[None].to(device)))
        return {"x0": x0[0].cpu().contiguous()}

    def check_prompts(self, cases: Sequence[Case]) -> None:
        """Raise a DataError when T5 would cut a prompt; see the function `check_prompts`."""
        check_prompts(self.pipeline.tokenizer_2, cases, self.max_sequence_length)

    def encode_prompt(self, case: Case, device: torch.device) -> tuple[Tensor, Tensor]:
        """Prompt -> ([1, T, D], [1, P]). Raises DataError when T5's limit would cut the text."""
        self.check_prompts([case])
        t5 = self.pipeline.text_encoder_2
        try:
            if self.offload_text_encoder_two:
                t5.to(device)
            prompt, pooled, _ = self.pipeline.encode_prompt(
                prompt=case.prompt,
                prompt_2=None,
                device=device,
                max_sequence_length=self.max_sequence_length,
            )
        finally:
            if self.offload_text_encoder_two:
                t5.to("cpu")
        return prompt, pooled


def check_prompts(tokenizer: Any, cases: Sequence[Case], limit: int) -> None:
    """Raise a DataError that names every case whose prompt has more than `limit` tokens of T5.

    Warns of characters that the tokenizer does not know. Costs a tokenization a case: meant for the
    start of a run.
    """
    ids = {case: tokenizer(case.prompt).input_ids for case in cases}
    long = [f"{c.case_id}: {c.prompt!r} has {len(i)}" for c, i in ids.items() if len(i) > limit]
    if long:
        raise DataError(
            f"A prompt must fit into model.max_sequence_length = {limit} tokens. Shorten the"
            " text or raise the limit (at most 512). Found:\n- " + "\n- ".join(long)
        )
    unknown = [case.case_id for case, i in ids.items() if tokenizer.unk_token_id in i]
    if unknown:
        logger.warning(
            "T5 does not know all characters of %d text(s): %s", len(unknown), unknown[:8]
        )


class ConditioningCache:
    """Encodes cases on demand and keeps the results in memory and, when given a folder, on disk.

    With a folder, memory holds the last `keep` results only: full-size prompts take 8 MB each.
    """

    def __init__(
        self,
        encoders: Encoders,
        canvas: Canvas,
        device: torch.device,
        folder: Path | None = None,
        keep: int = 512,
    ):
        self.encoders, self.canvas, self.device = encoders, canvas, device
        self.folder, self.keep = folder, keep
        self.memory: dict[tuple[str, Case], dict[str, Tensor]] = {}

    def batch(self, cases: Sequence[Case]) -> Conditioning:
        """Conditioning of `cases`, one row each, on the device. Equal cases share one encoding.

        Raises DataError when the cases do not have one number of image tokens.
        """
        rows = [self._entry("conditioning", case, self.encoders.encode) for case in cases]
        heights = {len(row["masked"]): case.case_id for row, case in zip(rows, cases, strict=True)}
        if len(heights) > 1:
            raise DataError(
                "the cases of one batch must have one size. Found "
                + ", ".join(
                    f"{case_id} with {length} image tokens" for length, case_id in heights.items()
                )
                + ". model.reference_context stacks references on top, and theirs differ in shape:"
                " make a batch of cases with one `Canvas.height_with`."
            )
        stacked = {k: torch.stack([row[k] for row in rows]) for k in rows[0] if k != "image_ids"}
        return Conditioning(**stacked, image_ids=rows[0]["image_ids"]).to(self.device)

    def sources(self, cases: Sequence[Case]) -> Tensor:
        """Return the clean packed latents [B, L, D] of the cases' sources, whole."""
        rows = [self._entry("source", case, self.encoders.encode_source) for case in cases]
        return torch.stack([row["x0"] for row in rows]).to(self.device)

    def targets(self, cases: Sequence[Case], *, reconstruct: bool = False) -> Tensor:
        """Return the clean packed latents [B, L, D] that supervised learning paints.

        A case without a target is refused with a DataError, unless `reconstruct` says that such a
        case is to be painted as its source is.
        """
        bare = [case.case_id for case in cases if case.target is None]
        if bare and not reconstruct:
            raise DataError(f"A case must have a target to be learned from. Found none: {bare}.")
        rows = [self._entry("target", case, self.encoders.encode_target) for case in cases]
        return torch.stack([row["x0"] for row in rows]).to(self.device)

    def _entry(
        self, kind: str, case: Case, encode: Callable[..., dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        key = (kind, case)
        entry = self.memory.pop(key, None) or self._load_or_encode(kind, case, encode)
        self.memory[key] = entry  # Last in, so that the first is the one not used for longest.
        if self.folder is not None and len(self.memory) > self.keep:
            del self.memory[next(iter(self.memory))]
        return entry

    def _load_or_encode(
        self, kind: str, case: Case, encode: Callable[..., dict[str, Tensor]]
    ) -> dict[str, Tensor]:
        if self.folder is None:
            return encode(case, self.canvas, self.device)
        path = self.folder / f"{self._name(kind, case)}.safetensors"
        if path.exists():
            try:
                return load_file(path)
            except SafetensorError as error:
                logger.warning("%s is damaged (%s): encoding %s again.", path, error, case.case_id)
        entry = encode(case, self.canvas, self.device)
        self.folder.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            save_tensors(entry, temporary)
        return entry

    def _name(self, kind: str, case: Case) -> str:
        e = self.encoders
        parts = (
            CACHE_VERSION,
            PIL.__version__,
            kind,
            case.digest,
            e.digest,
            e.vae.dtype,
            self.canvas,
            e.max_sequence_length,
        )
        return hashlib.sha256(repr(parts).encode()).hexdigest()
