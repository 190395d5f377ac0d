"""Between pixels and the transformer's tokens: VAE scale and shift, 2x2 packing, mask packing.

Legend: B rows, C latent channels, H W latent height and width, L = (H/2)(W/2) image tokens, f = VAE
factor. The layout is that of `diffusers.FluxFillPipeline`, to which the tests compare it.
"""

import torch
from torch import Tensor
from torch.nn import functional as F


def pack(latents_BCHW: Tensor) -> Tensor:
    """[B, C, H, W] -> [B, L, 4C]: every 2x2 patch becomes a token. H and W must be even."""
    b, c, h, w = latents_BCHW.shape
    patches = latents_BCHW.reshape(b, c, h // 2, 2, w // 2, 2).permute(0, 2, 4, 1, 3, 5)
    return patches.reshape(b, (h // 2) * (w // 2), c * 4)


def unpack(tokens_BLD: Tensor, height: int, width: int) -> Tensor:
    """[B, L, 4C] -> [B, C, H, W], the inverse of `pack`; `height` and `width` are H and W."""
    b, _, d = tokens_BLD.shape
    patches = tokens_BLD.reshape(b, height // 2, width // 2, d // 4, 2, 2).permute(0, 3, 1, 4, 2, 5)
    return patches.reshape(b, d // 4, height, width)


def pack_mask(mask_B1HW: Tensor, vae_factor: int) -> Tensor:
    """Return a pixel mask [B, 1, fH, fW] (1 = paint) as tokens [B, L, 4 f*f].

    Every pixel keeps a channel of its own.
    """
    return pack(F.pixel_unshuffle(mask_B1HW, vae_factor))


def image_ids(height: int, width: int) -> Tensor:
    """Token coordinates [L, 3] = (0, row, column) for a latent of H x W."""
    ids = torch.zeros(height // 2, width // 2, 3)
    ids[..., 1] = torch.arange(height // 2)[:, None]
    ids[..., 2] = torch.arange(width // 2)[None, :]
    return ids.reshape(-1, 3)


def vae_factor(vae) -> int:
    """Pixels per latent position along one side."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


@torch.no_grad()
def encode(vae, pixels_B3HW: Tensor) -> Tensor:
    """Return the latents [B, C, H, W] of pixels in [-1, 1], shifted and scaled.

    They are the mode of the VAE's distribution, so nothing is drawn.
    """
    z = vae.encode(pixels_B3HW.to(vae.dtype)).latent_dist.mode()
    return ((z - vae.config.shift_factor) * vae.config.scaling_factor).float()


@torch.no_grad()
def decode(vae, latents_BCHW: Tensor) -> Tensor:
    """Latents [B, C, H, W] -> pixels [B, 3, fH, fW] in [-1, 1]."""
    z = latents_BCHW / vae.config.scaling_factor + vae.config.shift_factor
    return vae.decode(z.to(vae.dtype)).sample.float().clamp(-1, 1)
