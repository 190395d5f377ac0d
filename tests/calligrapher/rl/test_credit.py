"""Credit by place: where a letter's advantage counts, and what the losses make of it."""

import pytest
import torch
from given import Given, drawn

from calligrapher.errors import InputError
from calligrapher.model.latents import image_ids, unpack
from calligrapher.model.policy import Conditioning, Policy
from calligrapher.rl.awm import AWMParams
from calligrapher.rl.credit import credited, less_their_mean, letter_credit
from calligrapher.rl.grpo import GRPOParams
from calligrapher.rl.nft import NFTParams
from calligrapher.rl.rows import TrainRows
from calligrapher.sampling.exploration import Window
from calligrapher.sampling.schedule import sigma_schedule

ROWS, LENGTH, CHANNELS, STEPS = 3, 5, 8, 6


def test_each_position_follows_the_letter_that_is_nearest_worked_by_hand():
    # 24 x 8 px, tokens of 4 px, positions of 2 px with their middles at 1, 3, 5, ...
    credit = letter_credit(
        [1.0, -2.0],
        [(4, 0, 6, 4), (14, 0, 16, 4)],
        own=0.5,
        image_ids=image_ids(4, 12),
        channels=8,
        width=24,
        height=8,
    )
    assert credit.shape == (12, 8)
    positions = unpack(credit[None], 4, 12)[0]  # [2 channels, 4, 12]
    assert torch.equal(positions[0], positions[1])
    first = [1.0] * 5 + [-2.0] * 5 + [0.5] * 2  # no letter within 4 px of 21 and 23
    assert positions[0, 0].tolist() == first
    assert positions[0, 1].tolist() == first
    # 3 px below the letters' bottom, 7 px is too far; to the side the corner is farther still.
    assert positions[0, 3].tolist()[2] == 1.0
    assert positions[0, 3].tolist()[0] == 0.5


def test_a_strip_of_context_lies_above_the_picture():
    asked = {"image_ids": image_ids(8, 12), "channels": 8, "width": 24, "height": 8}
    credit = letter_credit([3.0], [(0, 0, 24, 4)], own=-1.0, **asked)
    positions = unpack(credit[None], 8, 12)[0, 0]
    assert positions[4:].eq(3.0).all()
    assert positions[0].eq(-1.0).all()  # 7 px above a letter of 4


def test_an_image_whose_letters_are_not_told_has_its_own_advantage_everywhere():
    credit = letter_credit(
        [], [], own=0.25, image_ids=image_ids(4, 12), channels=8, width=24, height=8
    )
    assert credit.eq(0.25).all()


def test_a_letter_that_may_stand_anywhere_yields_to_those_whose_place_is_known():
    credit = letter_credit(
        [30.0, 1.0, 2.0],
        [(0, 0, 24, 8), (0, 0, 12, 8), (12, 0, 24, 8)],
        own=0.0,
        image_ids=image_ids(4, 12),
        channels=8,
        width=24,
        height=8,
    )
    positions = unpack(credit[None], 4, 12)[0, 0]
    assert positions[:, :6].eq(1.0).all()
    assert positions[:, 6:].eq(2.0).all()


def test_tokens_of_another_picture_are_refused():
    with pytest.raises(InputError, match="cover a picture of 24 x 40 px"):
        letter_credit(
            [1.0], [(0, 0, 1, 1)], 0.0, image_ids=image_ids(4, 12), channels=8, width=24, height=40
        )


def test_a_credited_velocity_is_the_same_to_the_bit_and_its_gradient_is_not():
    velocity = torch.randn(2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()
    credit = torch.tensor([[0.0, 1.0, -2.0], [0.5, 0.25, 3.0]])
    found = credited(velocity, credit)
    assert torch.equal(found, velocity)
    (gradient,) = torch.autograd.grad((found**2).sum(), velocity)
    torch.testing.assert_close(gradient, 2 * velocity.detach() * credit)


def rows(advantages, credit=None):
    sigmas = sigma_schedule(STEPS, LENGTH)[1:4].expand(ROWS, -1)
    window = Window(
        drawn(3, ROWS, 3, LENGTH, CHANNELS),
        torch.zeros(ROWS, 2),
        torch.zeros(ROWS, 2, LENGTH, CHANNELS),
        sigmas,
    )
    conditioning = Conditioning(
        torch.zeros(ROWS, 1, 1),
        torch.zeros(ROWS, 1),
        torch.zeros(ROWS, 1),
        torch.zeros(ROWS, LENGTH, 2 * CHANNELS),
        torch.zeros(LENGTH, 3),
    )
    places = torch.tensor([[0, 0], [0, 1], [1, 0]])
    return TrainRows(
        drawn(1, ROWS, LENGTH, CHANNELS),
        conditioning,
        torch.tensor(advantages),
        window,
        places,
        credit=credit,
    )


def gradient(params, batch, away=0.0):
    """The gradient of each token's velocity, [B, L, D], with the old policy `away`."""
    torch.manual_seed(0)
    policy = Policy(Given(ROWS, LENGTH, CHANNELS))
    old = {name: weight + away for name, weight in policy.snapshot().items()}
    for loss, _ in params.losses(
        policy, batch, "0/update/0/0", num_steps=STEPS, old=old, reference=None
    ):
        loss.backward()
    return policy.parameters["adapter.weight"].grad.reshape(ROWS, LENGTH, CHANNELS)


def spread_out(advantages):
    return torch.tensor(advantages)[:, None, None].expand(-1, LENGTH, CHANNELS)


ALGORITHMS = [
    NFTParams(kl_coef=0, num_train_sigmas=2, adv_clip_max=2.0),
    GRPOParams(kl_coef=0, window_size=2, recompute_log_prob=True, adv_clip_max=2.0),
    GRPOParams(
        kl_coef=0, window_size=2, recompute_log_prob=True, trust_region="dppo", adv_clip_max=2.0
    ),
    AWMParams(kl_coef=0, num_train_sigmas=2, adv_clip_max=2.0),
    AWMParams(kl_coef=0, num_train_sigmas=2, adv_clip_max=2.0, clip_range=0.2),
]
all_algorithms = pytest.mark.parametrize("params", ALGORITHMS, ids=lambda params: params.name)


@all_algorithms
def test_one_credit_for_the_whole_picture_is_the_picture_s_advantage(params):
    advantages = (1.5, -0.5, 3.0)  # the last beyond the clip
    whole = gradient(params, rows(advantages))
    placed = gradient(params, rows(advantages, spread_out(advantages)))
    torch.testing.assert_close(placed, whole, rtol=1e-5, atol=1e-9)
    assert whole.abs().max() > 0


@all_algorithms
def test_each_place_has_the_gradient_of_its_own_advantage_and_of_no_other(params):
    advantages, others = (1.5, -0.5, 1.0), (-1.0, 1.75, 0.25)
    credit = spread_out(advantages).clone()
    credit[:, 3:] = spread_out(others)[:, 3:]
    placed = gradient(params, rows(advantages, credit))
    here, there = gradient(params, rows(advantages)), gradient(params, rows(others))
    torch.testing.assert_close(placed[:, :3], here[:, :3], rtol=1e-5, atol=1e-9)
    torch.testing.assert_close(placed[:, 3:], there[:, 3:], rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("params", ALGORITHMS[1:3], ids=["clip", "dppo"])
def test_a_row_that_has_left_the_trust_region_moves_no_further(params):
    """Its own advantage decides: row 0 is held, the others, which would come back, are not."""
    advantages = (1.0, 1.0, 1.0)
    tight = params.model_copy(update={"clip_range": 1e-9})
    whole = gradient(tight, rows(advantages), away=0.01)
    placed = gradient(tight, rows(advantages, spread_out(advantages)), away=0.01)
    assert torch.equal(placed.flatten(1).any(1), whole.flatten(1).any(1))


def test_rows_keep_their_credit_when_they_are_picked():
    credit = drawn(4, ROWS, LENGTH, CHANNELS)
    batch = rows((1.0, 2.0, 3.0), credit)
    assert torch.equal(batch.pick([2, 0]).credit, credit[[2, 0]])
    assert rows((1.0, 2.0, 3.0)).pick([1]).credit is None


def test_an_image_is_compared_with_the_mean_of_its_own_group():
    x0 = torch.tensor([1.0, 10.0, 3.0, 40.0, 8.0])[:, None, None].expand(-1, 2, 3)
    found = less_their_mean(x0, [5, 9, 5, 9, 5])
    assert found[:, 1, 2].tolist() == [-3.0, -15.0, -1.0, 15.0, 4.0]
    assert found.shape == x0.shape
    assert torch.equal(less_their_mean(x0[:1], [5]), torch.zeros(1, 2, 3))
