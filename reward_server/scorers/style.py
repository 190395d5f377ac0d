"""The style scorer: SigLIP embeddings of the painted crop and of the reference, and how alike.

The score is their cosine on the scale of the SigLIP's folder (`style_scale.py`).

Both are letterboxed to the model's square input on black, so every forward has one fixed shape. On
the CPU each picture has a forward of its own: a score depends on its item alone to the last bit.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from reward_server.scorers.base import Item, Outcome, failed
from reward_server.scorers.digest import folder_digest
from reward_server.style_scale import StyleScale


class StyleScorer:
    """SigLIP as a Scorer. An item without a reference has no style score."""

    name = "style"
    fields = ("style_score",)
    parallel, max_batch = 1, 16

    def __init__(
        self,
        model: Any,
        *,
        max_wait_s: float = 0.005,
        identity: dict[str, str] | None = None,
        scale: StyleScale | None = None,
    ):
        self.model, self.max_wait_s = model, max_wait_s
        self._identity, self._scale = identity or {}, scale or StyleScale()

    @classmethod
    def load(cls, path: Path, *, device: str, max_wait_s: float) -> "StyleScorer":
        """Return the scorer of a folder with a SigLIP, whole or its vision half.

        Hugging Face layout; nothing is taken from the network.
        """
        import torch
        from transformers import SiglipVisionModel

        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"siglip_path must be a folder with a SigLIP. Got {path}.")
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model: Any = SiglipVisionModel.from_pretrained(path, dtype=dtype, local_files_only=True)
        identity = {"model": path.name, "sha256": folder_digest(path), "dtype": str(dtype)}
        scale = StyleScale.read(path)
        return cls(model.to(device).eval(), max_wait_s=max_wait_s, identity=identity, scale=scale)

    @property
    def info(self) -> dict[str, str]:
        """See Scorer."""
        from importlib.metadata import version

        return {
            "engine": f"transformers {version('transformers')} on {self.model.device.type}",
            **self._identity,
        }

    def score_items(self, items: Sequence[Item]) -> list[Outcome]:
        """See Scorer."""
        pictures: list[np.ndarray] = []
        for item in items:
            if item.reference is not None:
                pictures += [item.crop, item.reference]
        embeddings = iter(self.embed(pictures))  # crop, reference, crop, reference, ...
        return [
            failed(self.fields, "no reference was given")
            if item.reference is None
            else Outcome({"style_score": self.match(next(embeddings), next(embeddings))})
            for item in items
        ]

    def close(self) -> None:
        """Nothing to release before the process ends."""

    def match(self, first: np.ndarray, second: np.ndarray) -> float:
        """Return how alike the styles of two embeddings [E] are, in [0, 1]."""
        return self._scale.score(cosine(first, second))

    def embed(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Embedding [E] of each RGB picture uint8 [H, W, 3]."""
        import torch

        side = self.model.config.image_size
        size = 1 if self.model.device.type == "cpu" else 2 * self.max_batch
        found: list[np.ndarray] = []
        for start in range(0, len(pictures), size):
            boxes = np.stack(
                [letterbox(picture, side) for picture in pictures[start : start + size]]
            )
            pixels = (
                torch.from_numpy(boxes).permute(0, 3, 1, 2).to(self.model.device, self.model.dtype)
            )
            with torch.inference_mode():
                found += list(
                    self.model(pixel_values=pixels).pooler_output.float().cpu().numpy()
                )  # [B, E]
        return found


def letterbox(picture: np.ndarray, side: int) -> np.ndarray:
    """Return a picture scaled into a square on black: float32 [side, side, 3] in [-1, 1]."""
    image = Image.fromarray(picture)
    scale = side / max(image.size)
    size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
    square = Image.new("RGB", (side, side))
    square.paste(
        image.resize(size, Image.Resampling.BICUBIC), ((side - size[0]) // 2, (side - size[1]) // 2)
    )
    return np.asarray(square, dtype=np.float32) / 127.5 - 1.0


def cosine(first: np.ndarray, second: np.ndarray) -> float:
    """Return the cosine of two embeddings [E]."""
    return float(first @ second) / float(np.linalg.norm(first) * np.linalg.norm(second))
