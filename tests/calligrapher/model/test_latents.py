"""Pixels to tokens and back: a mask's pixels keep their places, the VAE's shift and scale are
undone."""

from types import SimpleNamespace

import pytest
import torch

from calligrapher.model import latents


def test_pack_puts_each_2x2_patch_into_one_token_channel_by_channel():
    z = torch.arange(2 * 4 * 6).reshape(1, 2, 4, 6)
    packed = latents.pack(z)
    assert packed.shape == (1, 6, 8)
    # The patch in row 1, column 2: rows 2-3, columns 4-5, channel 0 then channel 1 (24 further on).
    assert packed[0, 1 * 3 + 2].tolist() == [16, 17, 22, 23, 40, 41, 46, 47]


@pytest.mark.parametrize(("channels", "height", "width"), [(16, 4, 12), (1, 2, 2), (3, 10, 4)])
def test_unpack_undoes_pack(channels, height, width):
    z = torch.randn(3, channels, height, width)
    assert torch.equal(latents.unpack(latents.pack(z), height, width), z)


@pytest.mark.parametrize("factor", [4, 8])
def test_a_single_painted_pixel_is_one_channel_of_one_token(factor):
    height, width = 4 * factor, 6 * factor
    row, column = 2 * factor + 1, 5 * factor + 3
    mask = torch.zeros(1, 1, height, width)
    mask[0, 0, row, column] = 1
    packed = latents.pack_mask(mask, factor)
    assert packed.shape == (1, 6, 4 * factor * factor)
    # Latent position (2, 5) is row 0, column 1 of the patch of token (1, 2); the pixel is (1, 3)
    # within it.
    assert packed.nonzero().tolist() == [[0, 1 * 3 + 2, (1 * factor + 3) * 4 + 0 * 2 + 1]]


def test_masks_of_a_batch_stay_apart():
    mask = torch.zeros(3, 1, 16, 24)
    mask[1] = 1
    assert latents.pack_mask(mask, 4).flatten(1).mean(1).tolist() == [0, 1, 0]


def test_image_ids_are_zero_row_column():
    assert latents.image_ids(4, 6).tolist() == [
        [0, row, column] for row in range(2) for column in range(3)
    ]


class AverageVAE:
    """4x4 means as latents: small enough to check shift and scale by hand."""

    def __init__(self, spread=0.5):
        self.config = SimpleNamespace(
            shift_factor=0.25, scaling_factor=2.0, block_out_channels=(8, 8, 8)
        )
        self.dtype = torch.float32
        self.spread = spread

    def encode(self, pixels):
        mean = torch.nn.functional.avg_pool2d(pixels, 4)
        return SimpleNamespace(latent_dist=SimpleNamespace(mode=lambda: mean))

    def decode(self, z):
        return SimpleNamespace(sample=torch.nn.functional.interpolate(z, scale_factor=4))


def test_encode_shifts_then_scales_and_decode_undoes_it():
    vae = AverageVAE()
    assert latents.vae_factor(vae) == 4
    z = latents.encode(vae, torch.full((2, 3, 8, 16), 0.75))
    assert z.shape == (2, 3, 2, 4)
    assert z.unique().tolist() == [1.0]  # (0.75 - 0.25) * 2
    assert latents.decode(vae, z).unique().tolist() == [0.75]


def test_decode_clamps_to_the_range_of_pictures():
    assert latents.decode(AverageVAE(), torch.tensor([[[[9.0, -9.0]]]])).unique().tolist() == [
        -1.0,
        1.0,
    ]


def test_no_graph_is_kept_through_the_vae():
    pixels = torch.rand(1, 3, 8, 8, requires_grad=True)
    assert not latents.decode(AverageVAE(), latents.encode(AverageVAE(), pixels)).requires_grad
