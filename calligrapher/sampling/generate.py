"""Paints one case: crops and encodes it once, samples a picture per seed, pastes it back.

```
model = load_model(...)
images = generate(model, case, seeds=[0, 1], num_steps=50, canvas=Canvas(512, 512))
```

To paint one case in several ways (other weights, scales, steps), `look` once and `paint` the scene.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image

from calligrapher.data.canvas import Canvas
from calligrapher.data.case import Case
from calligrapher.data.crop import Box, crop_box, faded, paste, whole
from calligrapher.data.images import load_mask, load_rgb, mask_box
from calligrapher.errors import DataError
from calligrapher.model.ip_adapter import scaled
from calligrapher.model.loading import Model, pictures
from calligrapher.model.policy import Conditioning
from calligrapher.sampling.exploration import fresh_noise
from calligrapher.sampling.sampler import sample

GROW, FEATHER, BATCH_SIZE = 1.5, 8, 8


@dataclass(frozen=True, eq=False)
class EncodedCase:
    """A case as the model sees it, and the way back to its source."""

    source: Image.Image  # RGB, upright
    mask: Image.Image  # as large as source; 0 and 255
    box: Box  # the part of the source that is on the canvas
    canvas: Canvas
    conditioning: Conditioning  # one row


def generate(
    model: Model,
    case: Case,
    seeds: Sequence[int],
    *,
    num_steps: int,
    canvas: Canvas,
    noise_level: float = 0.0,
    scale: float = 1.0,
    crop: bool = True,
    grow: float = GROW,
    feather: int = FEATHER,
    batch_size: int = BATCH_SIZE,
) -> list[Image.Image]:
    """Return one picture per seed, each as large as the case's source.

    Outside of the mask it is the source. `scale` weighs the style; 0 is FLUX.1-Fill without an
    adapter. `crop=False` stretches the whole picture to the canvas, as the released scripts do;
    otherwise `crop_box` says what `grow` does, `faded` what `feather` does, and `fresh_noise` what
    `noise_level` (0 to 1) does. `batch_size` pictures are sampled at once. Runs under the policy's
    present weights. Raises DataError for a case that cannot be painted.
    """
    scene = look(model, case, canvas, crop=crop, grow=grow)
    return paint(
        model,
        scene,
        seeds,
        num_steps=num_steps,
        noise_level=noise_level,
        scale=scale,
        feather=feather,
        batch_size=batch_size,
    )


def look(
    model: Model, case: Case, canvas: Canvas, *, crop: bool = True, grow: float = GROW
) -> EncodedCase:
    """Return the case with its crop chosen and each encoder asked once.

    Raises DataError for a case that cannot be painted.
    """
    source, mask = load_rgb(case.source), load_mask(case.mask)
    if mask.size != source.size:
        wanted, found = ("x".join(map(str, image.size)) for image in (source, mask))
        raise DataError(f"{case.mask} must be as large as its source, {wanted}. Found {found}.")
    size = (canvas.width, canvas.height)
    box = crop_box(mask_box(mask), source.size, size, grow) if crop else whole(source.size)
    row = model.encoders.encode(case, canvas, model.device, box)
    ids = row.pop("image_ids")
    conditioning = Conditioning(**{k: v[None] for k, v in row.items()}, image_ids=ids).to(
        model.device
    )
    return EncodedCase(source, mask, box, canvas, conditioning)


@torch.no_grad()
def paint(
    model: Model,
    scene: EncodedCase,
    seeds: Sequence[int],
    *,
    num_steps: int,
    noise_level: float = 0.0,
    scale: float = 1.0,
    feather: int = FEATHER,
    batch_size: int = BATCH_SIZE,
) -> list[Image.Image]:
    """Return one picture per seed.

    A batch of them takes a transformer call per step and a VAE decoding.
    """
    painted: list[Image.Image] = []
    exploration = fresh_noise(noise_level, num_steps)
    with scaled(model.policy.model.transformer, scale):
        for at in range(0, len(seeds), batch_size):
            batch = list(seeds[at : at + batch_size])
            rows = scene.conditioning.rows([0] * len(batch))
            x0 = sample(
                model.policy, rows, batch, num_steps, exploration=exploration, keep_window=False
            ).x0
            painted += pictures(model, x0, scene.canvas)
    weights = faded(scene.mask, feather)
    return [paste(scene.source, image, scene.box, weights) for image in painted]
