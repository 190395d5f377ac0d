"""The GRPO loss by hand and by its invariants, and where the window of trained steps lies."""

import json
import math
from collections import Counter
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from calligrapher.errors import InputError
from calligrapher.rl.grpo import GRPOParams, grpo_loss
from calligrapher.sampling.exploration import (
    moving_start,
    window_length,
    window_start,
    windows_of,
)
from calligrapher.sampling.step import cps_step, sde_step

GOLDEN = Path(__file__).parents[2] / "golden"
NO_KL = GRPOParams(kl_coef=0.0)
STEP = {"sigma": 0.7, "sigma_next": 0.45, "noise_level": 0.7, "sigma_max": 0.9}
DT = 0.45 - 0.7


def t(*values):
    return torch.tensor(values, dtype=torch.float32)


def rollout_and_update(seed=0, rows=3, moved=0.0):
    """A sampled step, the same step scored by a policy that moved by `moved`, and that policy's
    velocity."""
    g = torch.Generator().manual_seed(seed)
    v, x, noise, direction = (torch.randn(rows, 5, 7, generator=g) for _ in range(4))
    old = sde_step(v, x, **STEP, noise=noise)
    velocity = (v + moved * direction).requires_grad_()
    return old, sde_step(velocity, x, **STEP, x_next=old.x_next), velocity


def test_the_ratio_is_exactly_one_on_policy():
    old, new, velocity = rollout_and_update()
    params = GRPOParams(kl_coef=0.0, clip_range=1e-5)
    loss, metrics = grpo_loss(new.log_prob, old.log_prob, t(1.0, -2.0, 0.5), params)
    assert metrics["ratio_mean"] == 1
    assert metrics["ratio_max_dev"] == 0
    assert metrics["approx_kl"] == 0
    assert metrics["clip_fraction"] == 0
    assert loss.item() == pytest.approx(0.5 / 3)
    loss.backward()
    assert velocity.grad.abs().min() > 0


def test_the_guarded_ratio_is_exactly_one_on_policy():
    old, new, _ = rollout_and_update()
    params = GRPOParams(kl_coef=0.0, guard=True)
    loss, metrics = grpo_loss(
        new.log_prob, old.log_prob, t(1.0, -2.0, 0.5), params,
        mean=new.mean, mean_old=old.mean, std=new.std, dt=DT,
    )  # fmt: skip
    assert metrics["ratio_max_dev"] == 0
    assert loss.item() == pytest.approx(0.5 / 3 / 0.25)


def test_the_clipped_loss_worked_by_hand():
    # ratios 1.5, 1.5, 0.5, 0.5, 1.1 with clip 0.2; A 1, -1, 1, -1, 2: max(-1.5, -1.2) = -1.2;
    # max(1.5, 1.2) = 1.5; max(-0.5, -0.8) = -0.5; max(0.5, 0.8) = 0.8; -2.2.
    log_ratio = t(1.5, 1.5, 0.5, 0.5, 1.1).log()
    loss, metrics = grpo_loss(log_ratio - 2.0, torch.full((5,), -2.0), t(1, -1, 1, -1, 2), NO_KL)
    assert loss.item() == pytest.approx(-1.6 / 5, rel=1e-5)
    assert metrics["policy_loss"].item() == pytest.approx(-1.6 / 5, rel=1e-5)
    assert metrics["clip_fraction"].item() == pytest.approx(0.8)
    assert metrics["ratio_mean"].item() == pytest.approx(1.02, rel=1e-5)
    assert metrics["ratio_max_dev"].item() == pytest.approx(0.5, rel=1e-5)
    squares = sum(math.log(r) ** 2 for r in (1.5, 1.5, 0.5, 0.5, 1.1))
    assert metrics["approx_kl"].item() == pytest.approx(squares / 10, rel=1e-5)


def test_the_importance_weights_worked_by_hand():
    # Ratios as above; where the update begins, the steps are 0.5, 1.2, 4, 1 and 0.8 times as likely
    # as they were when they were sampled, 4 counts as the cap 2:
    # -1.2 * 0.5 + 1.5 * 1.2 - 0.5 * 2 + 0.8 * 1 - 2.2 * 0.8 = -0.76.
    log_ratio, begins = t(1.5, 1.5, 0.5, 0.5, 1.1).log(), torch.full((5,), -2.0)
    sampled = begins - t(0.5, 1.2, 4.0, 1.0, 0.8).log()
    params = GRPOParams(kl_coef=0.0, importance_cap=2.0)
    log_prob = (begins + log_ratio).requires_grad_()
    advantages = t(1, -1, 1, -1, 2)
    loss, metrics = grpo_loss(log_prob, begins, advantages, params, sampled_log_prob=sampled)
    assert loss.item() == pytest.approx(-0.76 / 5, rel=1e-5)
    assert metrics["importance_mean"].item() == pytest.approx(5.5 / 5, rel=1e-5)
    assert metrics["importance_max_dev"].item() == pytest.approx(1.0, rel=1e-5)
    assert metrics["ratio_mean"].item() == pytest.approx(1.02, rel=1e-5)
    (gradient,) = torch.autograd.grad(loss, log_prob)  # -A ratio weight / 5, none where clipped
    assert gradient.tolist() == pytest.approx([0, 1.5 * 1.2 / 5, -0.5 * 2 / 5, 0, -2.2 * 0.8 / 5])
    with pytest.raises(InputError, match="Missing: sampled_log_prob"):
        grpo_loss(log_prob, begins, advantages, params)


def test_of_one_policy_all_importance_weights_are_one():
    old, new, _ = rollout_and_update(moved=0.05)
    given = (new.log_prob, old.log_prob, t(1.0, -2.0, 0.5))
    plain, _ = grpo_loss(*given, NO_KL)
    capped = GRPOParams(kl_coef=0.0, importance_cap=1.0)
    loss, metrics = grpo_loss(*given, capped, sampled_log_prob=old.log_prob)
    assert torch.equal(loss, plain)
    assert metrics["importance_max_dev"] == 0


def test_clipped_rows_have_no_gradient():
    log_prob = t(1.5, 1.5, 0.5, 0.5).log().requires_grad_()
    loss, _ = grpo_loss(log_prob, torch.zeros(4), t(1, -1, 1, -1), NO_KL)
    loss.backward()
    torch.testing.assert_close(log_prob.grad, t(0.0, 1.5 / 4, -0.5 / 4, 0.0))


def test_advantages_are_clipped():
    loss, _ = grpo_loss(t(0, 0, 0), t(0, 0, 0), t(9, -7, 1), NO_KL)
    assert loss.item() == pytest.approx(-1 / 3)
    loss, _ = grpo_loss(
        t(0, 0, 0), t(0, 0, 0), t(9, -7, 1), GRPOParams(kl_coef=0.0, adv_clip_max=10.0)
    )
    assert loss.item() == pytest.approx(-1.0)


def test_the_gradient_makes_good_samples_likelier():
    old, new, velocity = rollout_and_update()
    loss, _ = grpo_loss(new.log_prob, old.log_prob, t(1.0, -1.0, 0.0), NO_KL)
    (grad,) = torch.autograd.grad(loss, velocity)
    x = torch.Generator().manual_seed(0)
    x = [torch.randn(3, 5, 7, generator=x) for _ in range(2)][1]
    moved = sde_step(velocity.detach() - grad, x, **STEP, x_next=old.x_next).log_prob - old.log_prob
    assert moved[0] > 0
    assert moved[1] < 0
    assert moved[2] == 0


def test_ratios_stay_near_one_because_the_log_prob_is_a_mean():
    g = torch.Generator().manual_seed(0)
    v, x, noise, direction = (torch.randn(3, 4096, 16, generator=g) for _ in range(4))
    old = sde_step(v, x, **STEP, noise=noise)
    new = sde_step(v + 0.01 * direction, x, **STEP, x_next=old.x_next)
    _, wide = grpo_loss(new.log_prob, old.log_prob, t(1, -1, 1), NO_KL)
    _, narrow = grpo_loss(
        new.log_prob, old.log_prob, t(1, -1, 1), GRPOParams(kl_coef=0.0, clip_range=1e-6)
    )
    assert 0 < wide["ratio_max_dev"] < 2e-4
    assert wide["clip_fraction"] == 0
    assert narrow["clip_fraction"] > 0


def test_the_kl_worked_by_hand():
    # (mu - mu_ref)^2 = 0.04; std_dev^2 = S^2 / -dt = 0.16 / 0.25 = 0.64; kl = 0.04 / 1.28 =
    # 0.03125.
    mean, ref = torch.full((2, 3), 1.2), torch.full((2, 3), 1.0)
    loss, metrics = grpo_loss(
        t(0, 0),
        t(0, 0),
        t(1, -1),
        GRPOParams(kl_coef=0.1),
        mean=mean,
        mean_ref=ref,
        std=0.4,
        dt=-0.25,
    )
    assert metrics["kl"].item() == pytest.approx(0.03125)
    assert loss.item() == pytest.approx(0.003125)


def test_the_kl_of_cps_uses_the_step_s_own_variance():
    mean, ref = torch.full((2, 3), 1.2), torch.full((2, 3), 1.0)
    params = GRPOParams(kl_coef=0.1, sampler="cps")
    _, metrics = grpo_loss(t(0, 0), t(0, 0), t(1, -1), params, mean=mean, mean_ref=ref, std=0.4)
    assert metrics["kl"].item() == pytest.approx(0.04 / 0.32)


def test_the_kl_of_dance_divides_by_its_noise_level():
    mean, ref = torch.full((2, 3), 1.2), torch.full((2, 3), 1.0)
    params = GRPOParams(kl_coef=0.1, sampler="dance", noise_level=0.8)
    dance = {"mean": mean, "mean_ref": ref, "std": 0.4, "dt": -0.25}
    _, metrics = grpo_loss(t(0, 0), t(0, 0), t(1, -1), params, **dance)
    assert metrics["kl"].item() == pytest.approx(0.04 / (2 * 0.8**2))


def test_the_kl_has_a_gradient_towards_the_reference():
    old, new, _ = rollout_and_update()
    ref = (new.mean.detach() + 1.0).requires_grad_()
    loss, _ = grpo_loss(
        new.log_prob, old.log_prob, torch.zeros(3), GRPOParams(kl_coef=0.1),
        mean=new.mean, mean_ref=ref, std=new.std, dt=DT,
    )  # fmt: skip
    grad_mean, grad_ref = torch.autograd.grad(loss, [new.mean, ref], allow_unused=True)
    assert grad_ref is None
    variance = new.std**2 / -DT
    torch.testing.assert_close(
        grad_mean, torch.full_like(grad_mean, -0.1) / variance / grad_mean.numel()
    )


def test_the_guard_worked_by_hand():
    # log ratio 0.01, mean distance 4e-4, S 0.4: bias 4e-4 / 0.32 = 0.00125, exponent 0.01125 * 0.4.
    # A 2, no clipping at 0.2: loss = -2 * e^0.0045 / 0.25 = -8.036081.
    mean, old = torch.full((2, 3), 1.02), torch.full((2, 3), 1.0)
    params = GRPOParams(kl_coef=0.0, guard=True)
    loss, metrics = grpo_loss(
        t(0.01, 0.01), t(0, 0), t(2, 2), params, mean=mean, mean_old=old, std=0.4, dt=-0.25
    )
    assert metrics["ratio_mean"].item() == pytest.approx(math.exp(0.0045), rel=1e-6)
    assert loss.item() == pytest.approx(-8.036081, rel=1e-5)
    assert metrics["approx_kl"].item() == pytest.approx(5e-5, rel=1e-4)


def test_the_guard_centres_the_ratio():
    old, new, _ = rollout_and_update(rows=400, moved=0.05)
    args = (new.log_prob, old.log_prob, torch.ones(400))
    _, plain = grpo_loss(*args, NO_KL)
    _, guarded = grpo_loss(
        *args,
        GRPOParams(kl_coef=0.0, guard=True),
        mean=new.mean,
        mean_old=old.mean,
        std=new.std,
        dt=DT,
    )
    assert abs(guarded["ratio_mean"] - 1) < 0.5 * abs(plain["ratio_mean"] - 1) + 1e-4


def test_steps_of_different_noise_levels_can_share_a_batch():
    log_prob, old, advantages = t(0.01, -0.02), t(0, 0), t(1, -1)
    mean, ref, mean_old = torch.rand(2, 3), torch.rand(2, 3), torch.rand(2, 3)
    params = GRPOParams(guard=True)
    stds, dts = t(0.3, 0.5), t(-0.1, -0.2)
    both, _ = grpo_loss(
        log_prob,
        old,
        advantages,
        params,
        mean=mean,
        mean_ref=ref,
        mean_old=mean_old,
        std=stds,
        dt=dts,
    )
    alone = []
    for i in range(2):
        row = slice(i, i + 1)
        means = {"mean": mean[row], "mean_ref": ref[row], "mean_old": mean_old[row]}
        loss, _ = grpo_loss(
            log_prob[row], old[row], advantages[row], params, **means, std=stds[i], dt=dts[i]
        )
        alone.append(loss)
    assert both.item() == pytest.approx(sum(alone).item() / 2, rel=1e-5)


def test_rows_do_not_see_each_other():
    old, new, velocity = rollout_and_update(moved=0.05)
    advantages, order = t(1.0, -2.0, 0.5), [2, 0, 1]
    kl = {"mean": new.mean, "mean_ref": torch.zeros_like(new.mean)}
    loss, _ = grpo_loss(
        new.log_prob, old.log_prob, advantages, GRPOParams(), **kl, std=new.std, dt=DT
    )
    (grad,) = torch.autograd.grad(loss, velocity, retain_graph=True)
    shuffled, _ = grpo_loss(
        new.log_prob[order], old.log_prob[order], advantages[order], GRPOParams(),
        **{k: v[order] for k, v in kl.items()}, std=new.std, dt=DT,
    )  # fmt: skip
    assert shuffled.item() == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(torch.autograd.grad(shuffled, velocity)[0], grad)


def test_missing_inputs_are_named():
    args = (t(0, 0), t(0, 0), t(1, -1))
    with pytest.raises(InputError, match="Missing: mean, mean_ref, std"):
        grpo_loss(*args, GRPOParams(kl_coef=0.1))
    with pytest.raises(InputError, match="Missing: dt"):
        grpo_loss(*args, GRPOParams(), mean=torch.ones(2, 3), mean_ref=torch.ones(2, 3), std=0.4)
    with pytest.raises(InputError, match="Missing: mean_old"):
        grpo_loss(
            *args, GRPOParams(kl_coef=0.0, guard=True), mean=torch.ones(2, 3), std=0.4, dt=-0.1
        )
    with pytest.raises(InputError, match=r"must all be \[B\]"):
        grpo_loss(t(0, 0), t(0, 0), t(1), NO_KL)
    with pytest.raises(InputError, match="scalars or"):
        grpo_loss(
            *args,
            GRPOParams(),
            mean=torch.ones(2, 3),
            mean_ref=torch.ones(2, 3),
            std=t(1, 1, 1),
            dt=-0.1,
        )


def test_without_a_kl_no_reference_is_needed():
    _, metrics = grpo_loss(t(0, 0), t(0, 0), t(1, -1), NO_KL)
    assert set(metrics) == {
        "policy_loss",
        "clip_fraction",
        "approx_kl",
        "ratio_mean",
        "ratio_max_dev",
    }
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    "change",
    [
        {"clip_range": 1e-3},
        {"kl_coef": 0.5},
        {"adv_clip_max": 0.5},
        {"guard": True},
        {"sampler": "cps"},
    ],
)
def test_every_parameter_of_the_loss_changes_it(change):
    old, new, _ = rollout_and_update(moved=0.2)
    extra = {
        "mean": new.mean,
        "mean_ref": new.mean * 0.9,
        "mean_old": old.mean,
        "std": new.std,
        "dt": DT,
    }
    losses = [
        grpo_loss(new.log_prob, old.log_prob, t(1.0, -2.0, 0.5), GRPOParams(**c), **extra)[0].item()
        for c in ({}, change)
    ]
    assert losses[0] != pytest.approx(losses[1], rel=1e-4)


def test_the_noise_level_and_the_sampler_change_the_step():
    g = torch.Generator().manual_seed(0)
    v, x, noise = (torch.randn(3, 5, 7, generator=g) for _ in range(3))
    landings = [
        sde_step(v, x, **STEP, noise=noise).x_next,
        sde_step(v, x, **{**STEP, "noise_level": 0.3}, noise=noise).x_next,
        cps_step(v, x, 0.7, 0.45, noise_level=0.7, noise=noise).x_next,
    ]
    assert not landings[0].allclose(landings[1])
    assert not landings[0].allclose(landings[2])


def test_all_members_of_a_group_share_a_window_and_groups_differ():
    starts = Counter(window_start(7, 3, group, 10, 2, 1.0) for group in range(800))
    assert window_start(7, 3, "case-11", 10, 2, 1.0) == window_start(7, 3, "case-11", 10, 2, 1.0)
    assert set(starts) == set(
        range(8)
    )  # steps 0..8 are trainable, so a window of two starts at 0..7
    assert min(starts.values()) > 60


def test_the_window_moves_with_the_seed_and_the_round():
    base = [window_start(7, 3, group, 10, 2, 1.0) for group in range(40)]
    assert base != [window_start(8, 3, group, 10, 2, 1.0) for group in range(40)]
    assert base != [window_start(7, 4, group, 10, 2, 1.0) for group in range(40)]


@pytest.mark.parametrize(
    ("num_steps", "size", "fraction"),
    [(2, 1, 1.0), (3, 2, 1.0), (10, None, 1.0), (10, 3, 0.5), (10, None, 0.5)],
)
def test_the_window_never_holds_the_last_step_nor_leaves_its_fraction(num_steps, size, fraction):
    limit = min(num_steps - 1, round(num_steps * fraction))
    for group in range(30):
        end = window_start(0, 0, group, num_steps, size, fraction) + window_length(
            num_steps, size, fraction
        )
        assert end <= limit
    if size is None:
        assert window_length(num_steps, size, fraction) == limit
        assert window_start(0, 0, 5, num_steps, size, fraction) == 0


@pytest.mark.parametrize("case", json.loads((GOLDEN / "window.json").read_text()))
def test_a_progressive_window_moves_as_mixgrpos(case):
    interval, num_steps = case["interval"], case["available"] + 1
    exploration = GRPOParams(
        window="progressive",
        window_size=case["window_size"],
        window_interval=interval,
        window_stride=case["stride"],
    )
    starts = [moving_start(r, num_steps, exploration) for r in range(case["rounds"])]
    assert starts == [case["starts"][r // interval] for r in range(case["rounds"])]


def test_a_progressive_window_is_one_for_all_groups_and_begins_again_after_its_last_place():
    exploration = GRPOParams(
        window="progressive", window_size=3, window_interval=2, window_stride=4,
        timestep_fraction=0.6,
    )  # fmt: skip
    rounds = [
        windows_of(["a", "b"], 7, round_index=r, num_steps=20, exploration=exploration)
        for r in range(12)
    ]
    assert {len(set(starts)) for starts in rounds} == {1}
    # 12 of 20 steps: a window of 3 has the places 0..9, and the last one is not left out.
    assert [starts[0] for starts in rounds] == [0, 0, 4, 4, 8, 8, 9, 9, 0, 0, 4, 4]
    with pytest.raises(ValueError, match="window_size must be a number with window 'progressive'"):
        GRPOParams(window="progressive", window_size=None)


@pytest.mark.parametrize(
    ("num_steps", "size", "fraction"), [(1, None, 1.0), (2, 2, 1.0), (10, 4, 0.3)]
)
def test_a_window_that_does_not_fit_is_refused(num_steps, size, fraction):
    with pytest.raises(InputError, match="the window must lie within"):
        window_start(0, 0, 0, num_steps, size, fraction)


@pytest.mark.parametrize(
    "wrong",
    [
        {"clip_range": 0},
        {"clip_range": 1},
        {"kl_coef": -0.1},
        {"adv_clip_max": 0},
        {"noise_level": 0},
        {"window_size": 0},
        {"sampler": "ode"},
        {"sampler": "cps", "noise_level": 1.2},
        {"sampler": "cps", "guard": True},
        {"timestep_fraction": 1.5},
        {"beta": 0.1},
    ],
)
def test_settings_out_of_bounds_are_refused(wrong):
    with pytest.raises(ValidationError):
        GRPOParams(**wrong)


def test_numbers_that_yaml_reads_as_text_are_numbers():
    assert GRPOParams(clip_range="1e-5").clip_range == 1e-5


def test_every_setting_says_what_it_is():
    assert all(field.description for field in GRPOParams.model_fields.values())


def test_dppo_leaves_out_rows_that_are_far_and_would_go_further():
    # Divergences 0.5^2 / (2 * 0.5^2) = 0.5, or 0.02; ratios 1.5 or 0.5; bound 0.1.
    far, near = 0.5, 0.1
    moved = t(far, far, far, far, near)[:, None].expand(5, 3)
    ratios, advantages = t(1.5, 0.5, 1.5, 0.5, 1.5), t(1.0, 1.0, -1.0, -1.0, 1.0)
    log_prob = ratios.log().requires_grad_()
    loss, metrics = grpo_loss(
        log_prob, torch.zeros(5), advantages,
        GRPOParams(kl_coef=0.0, trust_region="dppo", clip_range=0.1),
        mean=moved, mean_old=torch.zeros(5, 3), std=0.5,
    )  # fmt: skip
    assert loss.item() == pytest.approx((0.0 - 0.5 + 1.5 + 0.0 - 1.5) / 5)
    assert metrics["clip_fraction"].item() == pytest.approx(0.8)
    loss.backward()
    assert (log_prob.grad != 0).tolist() == [False, True, True, False, True]


def test_images_give_a_direction_only_from_a_start_in_common_and_not_beside_the_guard():
    GRPOParams(direction="image", noise="group", trust_region="dppo")
    with pytest.raises(ValidationError, match="noise must be 'group' with direction 'image'"):
        GRPOParams(direction="image")
    for given in ({"guard": True}, {"trust_region": "guard"}):
        with pytest.raises(ValidationError, match="direction must be 'noise' where the guard"):
            GRPOParams(direction="image", noise="group", **given)


def test_either_key_of_the_guard_bounds_alike_and_two_bounds_are_refused():
    for given in ({"guard": True}, {"trust_region": "guard"}):
        params = GRPOParams(**given)
        assert (params.bounds, params.keeps_means) == ("guard", True)
    assert (GRPOParams().bounds, GRPOParams().keeps_means) == ("clip", False)
    assert GRPOParams(trust_region="dppo").keeps_means
    with pytest.raises(ValidationError, match="guard must be false"):
        GRPOParams(guard=True, trust_region="dppo")
    with pytest.raises(ValidationError, match="trust_region must be clip or dppo"):
        GRPOParams(trust_region="guard", sampler="cps")
