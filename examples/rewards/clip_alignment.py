"""Closeness of picture and prompt by CLIP, or by PickScore, which is a CLIP trained on preferences.

`--scorer "clip=examples/rewards/clip_alignment.py:CLIPAlignment?folder=/models/clip&device=cuda"`

The folder is a CLIP in Hugging Face's layout (openai/clip-vit-large-patch14,
yuvalkirstain/PickScore_v1 with laion/CLIP-ViT-H-14-laion2B-s32B-b79K's processor files beside it).
"""

import torch
from PIL import Image
from transformers import AutoProcessor, CLIPModel


class CLIPAlignment:
    """Cosine of the embeddings of the whole picture and of the prompt, -1..1.

    PickScore is `logit_scale` times this cosine: the same order, with the range of a component.
    A prompt of more tokens than the model reads is cut, as CLIP does. On the CPU each picture has a
    forward of its own, so that a score depends on its item alone.
    """

    lowest = -1.0
    max_batch = 16
    timeout_s = 60.0

    def __init__(self, folder: str, device: str = "cpu", crop: str = "no"):
        """Crop: `yes` looks at the mask's box in place of the whole picture."""
        if crop not in ("yes", "no"):
            raise ValueError(f"crop must be yes or no. Got {crop!r}.")
        self.crop = crop == "yes"
        dtype = torch.float32 if device == "cpu" else torch.bfloat16
        model = CLIPModel.from_pretrained(folder, dtype=dtype, local_files_only=True)
        self.model = model.to(device).eval()
        self.processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        self.batch = 1 if device == "cpu" else self.max_batch

    def score(self, items):
        """Return one cosine for each item."""
        found: list[float] = []
        for start in range(0, len(items), self.batch):
            found += self._cosines(items[start : start + self.batch])
        return found

    def _cosines(self, items) -> list[float]:
        pictures = [Image.fromarray(item.crop if self.crop else item.image) for item in items]
        given = self.processor(
            text=[item.prompt for item in items],
            images=pictures,
            padding="max_length",
            truncation=True,
            max_length=self.model.config.text_config.max_position_embeddings,
            return_tensors="pt",
        ).to(self.model.device)
        given["pixel_values"] = given["pixel_values"].to(self.model.dtype)
        with torch.inference_mode():
            answer = self.model(**given)
        picture, text = answer.image_embeds.float(), answer.text_embeds.float()  # [B, E] each
        cosines = torch.nn.functional.cosine_similarity(picture, text)
        return cosines.clamp(-1, 1).tolist()  # rounding can leave the range by an ulp
