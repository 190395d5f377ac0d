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


@all_algorithms
def test_steps_that_are_not_trained_are_held_in_a_forward_of_so_many_rows(params):
    held = params.model_copy(update={"background_rows": 2, "timestep_fraction": 0.5})
    found, (*trained, more) = gradient(held, rows())
    without, before = gradient(params.model_copy(update={"timestep_fraction": 0.5}), rows())
    assert [m["loss"] for m in trained] == [m["loss"] for m in before]
    assert list(more) == ["background_untrained"]
    moved = found - without
    assert moved[0, OUTSIDE].abs().max() > 0
    assert moved[1, OUTSIDE].abs().max() > 0
    assert moved[2].eq(0).all(), "two rows of three"
    assert moved[:, INSIDE].eq(0).all(), "the letters' steps are not theirs to change"


def test_the_noise_levels_held_are_all_those_that_are_not_trained():
    params = NFTParams(
        background_coef=1, background_rows=3, timestep_fraction=0.5, num_train_sigmas=1
    )
    policy, seen = Policy(Given(ROWS, LENGTH, CHANNELS)), set()
    velocity = policy.velocity
    policy.velocity = lambda x, sigma, c: (seen.update(sigma.tolist()), velocity(x, sigma, c))[1]
    for key in range(20):
        for _ in params.untrained_steps(policy, rows(), f"0/update/{key}/0", STEPS):
            pass
    assert seen == set(sigma_schedule(STEPS, LENGTH)[3:-1].tolist())


def test_a_source_that_is_reached_has_no_error_at_those_steps_either():
    params = NFTParams(background_coef=3, background_rows=2, timestep_fraction=0.5)
    batch, policy = rows(), Policy(Given(ROWS, LENGTH, CHANNELS))
    for shift, wanted in ((0.0, 0.0), (2.0, 4.0)):

        def velocity(x, sigma, c, shift=shift):
            return (x - batch.background.x0[: len(x)] + shift) / sigma[:, None, None]

        policy.velocity = velocity
        same = batch.pick([0, 1])
        ((loss, metrics),) = params.untrained_steps(policy, same, "0/update/0/0", STEPS)
        assert metrics["background_untrained"].item() == pytest.approx(wanted, abs=1e-6)
        assert loss.item() == pytest.approx(3 * wanted, abs=1e-6)


def test_rows_for_the_background_need_a_weight_and_a_step_that_is_left_out():
    with pytest.raises(ValueError, match="background_rows must be 0 where background_coef is 0"):
        NFTParams(background_rows=2)
    everything = AWMParams(background_coef=1, background_rows=2)
    with pytest.raises(ValueError, match=r"awm\.timestep_fraction leaves no step"):
        everything.fits(STEPS)
    GRPOParams(background_coef=1, background_rows=2, timestep_fraction=0.5).fits(STEPS)
