"""The background of a round's rows: no policy's loss moves it, and one of its own holds it."""

import pytest
import torch
from given import Given, drawn

from calligrapher.model.latents import pack_mask, unpack
from calligrapher.model.policy import Conditioning, Policy
from calligrapher.rl.awm import AWMParams
from calligrapher.rl.background import Background
from calligrapher.rl.grpo import GRPOParams
from calligrapher.rl.nft import NFTParams
from calligrapher.rl.rows import TrainRows
from calligrapher.sampling.exploration import Window
from calligrapher.sampling.schedule import sigma_schedule

ROWS, LENGTH, CHANNELS, PIXELS, STEPS = 3, 5, 8, 12, 6
INSIDE = [1, 2]  # tokens
OUTSIDE = [0, 3, 4]


def conditioning(inside):
    mask = torch.zeros(ROWS, LENGTH, PIXELS)
    mask[:, inside] = 1.0
    return Conditioning(
        torch.zeros(ROWS, 1, 1),
        torch.zeros(ROWS, 1),
        torch.zeros(ROWS, 1),
        torch.cat([drawn(5, ROWS, LENGTH, CHANNELS), mask], -1),
        torch.zeros(LENGTH, 3),
    )


def rows(inside=INSIDE, advantages=(1.0, 0.5, -2.0), held=True):
    c = conditioning(inside)
    sources = drawn(2, ROWS, LENGTH, CHANNELS)
    sigmas = sigma_schedule(STEPS, LENGTH)[1:4].expand(ROWS, -1)
    window = Window(
        drawn(3, ROWS, 3, LENGTH, CHANNELS),
        torch.zeros(ROWS, 2),
        torch.zeros(ROWS, 2, LENGTH, CHANNELS),
        sigmas,
    )
    return TrainRows(
        drawn(1, ROWS, LENGTH, CHANNELS),
        c,
        torch.tensor(advantages),
        window,
        torch.tensor([[0, 0], [0, 1], [1, 0]]),
        Background.of(sources, c) if held else None,
    )


ALGORITHMS = [
    NFTParams(kl_coef=0, num_train_sigmas=2, background_coef=0.3),
    GRPOParams(kl_coef=0, window_size=2, background_coef=0.3),
    AWMParams(kl_coef=0, num_train_sigmas=2, background_coef=0.3),
]
all_algorithms = pytest.mark.parametrize("params", ALGORITHMS, ids=lambda params: params.name)


def gradient(params, batch):
    """Return the gradient of each token's velocity, [B, L, D], and the metrics."""
    torch.manual_seed(0)
    policy = Policy(Given(ROWS, LENGTH, CHANNELS))
    old = {name: weight + 0.1 for name, weight in policy.snapshot().items()}
    found = []
    for loss, metrics in params.losses(
        policy, batch, "0/update/0/0", num_steps=STEPS, old=old, reference=None
    ):
        loss.backward()
        found.append(metrics)
    return policy.parameters["adapter.weight"].grad.reshape(ROWS, LENGTH, CHANNELS), found


@all_algorithms
def test_outside_the_mask_the_gradient_is_the_background_s_whatever_the_advantages(params):
    one, _ = gradient(params, rows(advantages=(1.0, 0.5, -2.0)))
    other, _ = gradient(params, rows(advantages=(-1.0, 2.0, 0.5)))
    torch.testing.assert_close(one[:, OUTSIDE], other[:, OUTSIDE])
    assert one[:, OUTSIDE].abs().max() > 0
    assert not torch.allclose(one[:, INSIDE], other[:, INSIDE], rtol=0.1)


@all_algorithms
def test_inside_the_mask_the_gradient_is_as_without_a_background(params):
    held, _ = gradient(params, rows())
    free, metrics = gradient(params, rows(held=False))
    torch.testing.assert_close(held[:, INSIDE], free[:, INSIDE])
    assert all("background" not in found for found in metrics)


@all_algorithms
def test_the_background_s_error_counts_with_its_weight(params):
    light, metrics = gradient(params, rows())
    heavy, _ = gradient(params.model_copy(update={"background_coef": 0.9}), rows())
    torch.testing.assert_close(heavy[:, OUTSIDE], 3 * light[:, OUTSIDE])
    torch.testing.assert_close(heavy[:, INSIDE], light[:, INSIDE])
    for found in metrics:
        wanted = found["policy_loss"] + 0.3 * found["background"]
        torch.testing.assert_close(found["loss"].float(), wanted.float())


def test_the_error_is_that_of_the_clean_latent_that_the_velocity_leads_to():
    batch = rows()
    x, sigma = drawn(6, ROWS, LENGTH, CHANNELS), torch.tensor([0.9, 0.5, 0.7])
    right = (x - batch.background.x0) / sigma[:, None, None]
    assert batch.background.apart(right, x, sigma)[1].item() == pytest.approx(0, abs=1e-12)
    velocity = (right + 2.0).requires_grad_()
    inside, error = batch.background.apart(velocity, x, sigma)
    assert error.item() == pytest.approx(((2.0 * sigma) ** 2).mean().item(), rel=1e-5)
    assert torch.equal(inside, velocity)
    (found,) = torch.autograd.grad(inside.sum(), velocity)
    assert found[:, INSIDE].eq(1).all()
    assert found[:, OUTSIDE].eq(0).all()


@all_algorithms
def test_where_all_is_painted_there_is_nothing_to_hold(params):
    everywhere = list(range(LENGTH))
    held, metrics = gradient(params, rows(everywhere))
    free, _ = gradient(params, rows(everywhere, held=False))
    assert torch.equal(held, free)
    assert [found["background"].item() for found in metrics] == [0, 0]


def test_one_pixel_to_paint_frees_its_latent_position_and_no_other():
    picture = torch.zeros(1, 1, 8, 16)  # at a VAE factor of 2: 4 x 8 positions, 2 x 4 tokens
    picture[0, 0, 3, 5] = 1.0  # position (1, 2)
    c = conditioning([])
    masked = torch.cat([torch.zeros(1, 8, CHANNELS), pack_mask(picture, 2)], -1)
    c = Conditioning(c.prompt, c.pooled, c.style, masked, c.image_ids)
    outside = Background.of(torch.zeros(1, 8, CHANNELS), c).outside
    positions = unpack(outside.float(), 4, 8)[0]  # [2, 4, 8]
    wanted = torch.ones(2, 4, 8)
    wanted[:, 1, 2] = 0
    assert torch.equal(positions, wanted)


def test_rows_keep_their_background_when_they_are_picked():
    batch = rows()
    picked = batch.pick([2, 0])
    assert torch.equal(picked.background.x0, batch.background.x0[[2, 0]])
    assert picked.background.outside.shape == (2, LENGTH, CHANNELS)
