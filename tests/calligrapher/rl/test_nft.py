"""The NFT loss: value and gradient against DiffusionNFT, and the properties that make it learn."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file

from calligrapher.errors import InputError
from calligrapher.rl.forward_process import train_sigmas
from calligrapher.rl.nft import NFTParams, nft_loss, reward_weight
from calligrapher.sampling.schedule import sigma_schedule

GOLDEN = Path(__file__).parents[2] / "golden"
CASES = json.loads((GOLDEN / "nft.json").read_text())
TENSORS = load_file(GOLDEN / "nft.safetensors")
MODES = ["normal", "positive_only", "negative_only", "one_only", "binary"]
ADVANTAGES = [-7.0, -1.2, 0.0, 0.8, 6.0]


def batch(rows=5, seed=0):
    g = torch.Generator().manual_seed(seed)
    v, old, ref, x0, noise = (torch.randn(rows, 3, 7, generator=g) for _ in range(5))
    sigma = torch.rand(rows, generator=g) * 0.8 + 0.1
    s = sigma.view(-1, 1, 1)
    return {
        "velocity": v.requires_grad_(),
        "velocity_old": old,
        "velocity_ref": ref,
        "x0": x0,
        "x": (1 - s) * x0 + s * noise,
        "sigma": sigma,
        "advantages": torch.tensor((ADVANTAGES * rows)[:rows]),
    }


def loss_and_grad(inputs, params):
    v = inputs["velocity"].detach().clone().requires_grad_()
    loss, metrics = nft_loss(**{**inputs, "velocity": v}, params=params)
    loss.backward()
    return loss.detach(), v.grad, metrics


@pytest.mark.parametrize("case", CASES, ids=[f"{c['case']}-{c['adv_mode']}" for c in CASES])
def test_value_and_gradient_equal_diffusion_nft(case):
    t = {name: TENSORS[f"{case['case']}.{name}"] for name in (
        "v", "v_old", "v_ref", "x0", "x_t", "t", "advantages", "total", "policy", "kl", "grad_v"
    )}  # fmt: skip
    inputs = {
        "velocity": t["v"],
        "velocity_old": t["v_old"],
        "velocity_ref": t["v_ref"],
        "x0": t["x0"],
    }
    inputs |= {"x": t["x_t"], "sigma": t["t"], "advantages": t["advantages"]}
    params = NFTParams(**{k: v for k, v in case.items() if k != "case"})
    loss, grad, metrics = loss_and_grad(inputs, params)
    assert loss.item() == pytest.approx(t["total"].item(), rel=2e-4)
    assert metrics["policy_loss"].item() == pytest.approx(t["policy"].item(), rel=2e-4)
    assert metrics["kl"].item() == pytest.approx(t["kl"].item(), rel=2e-4)
    assert (grad - t["grad_v"]).norm() / t["grad_v"].norm() < 1e-5
    torch.testing.assert_close(grad, t["grad_v"], rtol=1e-3, atol=1e-7)


def test_the_goldens_cover_every_mode():
    assert {case["adv_mode"] for case in CASES} == set(MODES)


def test_a_row_worked_by_hand():
    # beta 0.5, v 1, v_old 0: v_pos 0.5, v_neg -0.5. x 1, sigma 0.5: x0_pos 0.75, x0_neg 1.25.
    # x0 0.25: errors 0.5 and 1, so L = 0.25 / 0.5 = 0.5 and 1 / 1 = 1. A 2.5: r = 0.75.
    # policy = (0.75 * 0.5 + 0.25 * 1) / 0.5 * 5 = 6.25.
    values = {"velocity": 1.0, "velocity_old": 0.0, "velocity_ref": 0.5, "x0": 0.25, "x": 1.0}
    full = {name: torch.full((2, 3), value) for name, value in values.items()}
    loss, metrics = nft_loss(
        **full,
        sigma=torch.full((2,), 0.5),
        advantages=torch.full((2,), 2.5),
        params=NFTParams(kl_coef=0.1),
    )
    assert metrics["policy_loss"].item() == pytest.approx(6.25)
    assert metrics["kl"].item() == pytest.approx(0.25)
    assert loss.item() == pytest.approx(6.275)
    assert metrics["old_distance"].item() == pytest.approx(1.0)
    assert metrics["r_mean"].item() == pytest.approx(0.75)
    assert metrics["positive_share"].item() == 1.0


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("normal", [0.0, 0.38, 0.5, 0.58, 1.0]),
        ("positive_only", [0.5, 0.5, 0.5, 0.58, 1.0]),
        ("negative_only", [0.0, 0.38, 0.5, 0.5, 0.5]),
        ("one_only", [0.5, 0.5, 0.5, 0.6, 0.6]),
        ("binary", [0.4, 0.4, 0.5, 0.6, 0.6]),
    ],
)
def test_each_mode_maps_advantages_to_weights_worked_by_hand(mode, expected):
    found = reward_weight(torch.tensor(ADVANTAGES, dtype=torch.float64), NFTParams(adv_mode=mode))
    assert found.tolist() == pytest.approx(expected, abs=1e-7)


def test_every_mode_gives_another_gradient():
    inputs = batch()
    grads = [loss_and_grad(inputs, NFTParams(adv_mode=mode))[1] for mode in MODES]
    for i, a in enumerate(grads):
        for b in grads[i + 1 :]:
            assert (a - b).abs().max() > 1e-3


@pytest.mark.parametrize("nft_beta", [0.1, 0.3, 0.5, 1.0])
def test_an_average_image_gives_exactly_zero_policy_gradient_on_policy(nft_beta):
    inputs = batch()
    inputs["velocity_old"] = inputs["velocity"].detach().clone()
    inputs["advantages"] = torch.zeros(5)
    _, grad, metrics = loss_and_grad(inputs, NFTParams(nft_beta=nft_beta, kl_coef=0.0))
    assert torch.count_nonzero(grad) == 0
    assert metrics["old_distance"] == 0
    assert metrics["positive_share"] == 0


@pytest.mark.parametrize(("advantage", "closer"), [(2.0, True), (-2.0, False)])
def test_good_images_pull_the_prediction_to_them_and_bad_ones_push_it_away(advantage, closer):
    inputs = batch()
    inputs["velocity_old"] = inputs["velocity"].detach().clone()
    inputs["advantages"] = torch.full((5,), advantage)
    v, s = inputs["velocity"].detach(), inputs["sigma"].view(-1, 1, 1)
    _, grad, _ = loss_and_grad(inputs, NFTParams(kl_coef=0.0))

    def distance(velocity):
        return (inputs["x"] - s * velocity - inputs["x0"]).flatten(1).norm(dim=1)

    moved = distance(v - grad)
    assert ((moved < distance(v)) if closer else (moved > distance(v))).all()


@pytest.mark.parametrize("name", ["velocity_old", "velocity_ref", "x0", "x"])
def test_only_the_trained_velocity_gets_a_gradient(name):
    inputs = batch()
    inputs[name] = inputs[name].clone().requires_grad_()
    loss, metrics = nft_loss(**inputs, params=NFTParams())
    loss.backward()
    assert inputs[name].grad is None
    assert inputs["velocity"].grad is not None
    assert not any(value.requires_grad for value in metrics.values())


def test_rows_do_not_see_each_other():
    inputs, params = batch(), NFTParams()
    order = [3, 0, 4, 2, 1]
    loss, grad, _ = loss_and_grad(inputs, params)
    shuffled_loss, shuffled_grad, _ = loss_and_grad(
        {k: v[order] for k, v in inputs.items()}, params
    )
    assert shuffled_loss.item() == pytest.approx(loss.item(), rel=1e-6)
    assert torch.equal(shuffled_grad, grad[order])
    alone = [loss_and_grad({k: v[i : i + 1] for k, v in inputs.items()}, params) for i in range(5)]
    assert sum(a[0].item() for a in alone) / 5 == pytest.approx(loss.item(), rel=1e-6)
    torch.testing.assert_close(torch.cat([a[1] for a in alone]) / 5, grad)


def test_the_kl_pulls_to_the_reference():
    inputs = batch()
    inputs["velocity_old"], inputs["advantages"] = (
        inputs["velocity"].detach().clone(),
        torch.zeros(5),
    )
    _, grad, _ = loss_and_grad(inputs, NFTParams(kl_coef=0.1))
    difference = inputs["velocity"].detach() - inputs["velocity_ref"]
    torch.testing.assert_close(grad, 0.1 * 2 * difference / difference.numel())


def test_without_a_kl_no_reference_is_needed():
    inputs = batch()
    with_reference, grad, _ = loss_and_grad(inputs, NFTParams(kl_coef=0.0))
    inputs["velocity_ref"] = None
    without, grad_without, metrics = loss_and_grad(inputs, NFTParams(kl_coef=0.0))
    assert with_reference == without
    assert torch.equal(grad, grad_without)
    assert "kl" not in metrics
    with pytest.raises(InputError, match="needs velocity_ref"):
        nft_loss(**inputs, params=NFTParams(kl_coef=0.01))


@pytest.mark.parametrize("change", [{"nft_beta": 0.8}, {"kl_coef": 0.5}, {"adv_clip_max": 3.0}])
def test_every_number_changes_the_gradient(change):
    inputs = batch()
    before, after = (loss_and_grad(inputs, NFTParams(**c))[1] for c in ({}, change))
    assert (before - after).abs().max() > 1e-3


def test_half_precision_velocities_are_computed_in_float32():
    inputs = batch()
    half = {**inputs, "velocity": inputs["velocity"].detach().bfloat16().requires_grad_()}
    loss, _ = nft_loss(**half, params=NFTParams())
    full, _ = nft_loss(
        **{**half, "velocity": half["velocity"].detach().float()}, params=NFTParams()
    )
    assert loss.item() == full.item()
    loss.backward()
    assert half["velocity"].grad.dtype == torch.bfloat16


def test_a_perfect_prediction_does_not_divide_by_zero():
    inputs = batch()
    s = inputs["sigma"].view(-1, 1, 1)
    inputs["velocity"] = inputs["velocity_old"] = (inputs["x"] - inputs["x0"]) / s
    loss, grad, _ = loss_and_grad(inputs, NFTParams(kl_coef=0.0))
    assert loss.isfinite()
    assert grad.isfinite().all()


@pytest.mark.parametrize("name", ["sigma", "advantages"])
def test_columns_of_the_wrong_length_are_refused(name):
    inputs = batch()
    inputs[name] = inputs[name][:, None]
    with pytest.raises(InputError, match=r"must be \[5\]"):
        nft_loss(**inputs, params=NFTParams())


def test_training_sigmas_are_different_for_each_row_and_never_the_last():
    schedule = sigma_schedule(10, 1024)
    generator = torch.Generator().manual_seed(0)
    drawn = [train_sigmas(schedule, NFTParams(), generator) for _ in range(6)]
    for row in drawn:
        assert sorted(row.tolist(), reverse=True) == schedule[:-1].tolist()
    assert not torch.equal(drawn[0], drawn[1])
    again = train_sigmas(schedule, NFTParams(), torch.Generator().manual_seed(0))
    assert torch.equal(drawn[0], again)


def test_fewer_training_sigmas_come_from_the_noisy_share_of_the_schedule():
    schedule = sigma_schedule(10, 1024)
    params = NFTParams(num_train_sigmas=3, timestep_fraction=0.5)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([train_sigmas(schedule, params, generator) for _ in range(50)])
    assert drawn.shape == (50, 3)
    assert set(drawn.flatten().tolist()) == set(schedule[:5].tolist())
    with pytest.raises(InputError, match="at most 5"):
        train_sigmas(schedule, NFTParams(num_train_sigmas=6, timestep_fraction=0.5), generator)


@pytest.mark.parametrize(("number", "word"), [(0, "fixed"), (1, "slow"), (2, "fast")])
def test_the_old_policy_can_be_named_by_its_former_number(number, word):
    assert NFTParams(old_policy=number).old_policy == word
    assert NFTParams(old_policy=word).old_policy == word


@pytest.mark.parametrize(
    "wrong",
    [
        {"old_policy": 3},
        {"old_policy": True},
        {"nft_beta": 0},
        {"nft_beta": 1.1},
        {"kl_coef": -1},
        {"adv_clip_max": 0},
        {"adv_mode": "all"},
        {"num_train_sigmas": 0},
        {"timestep_fraction": 0},
        {"beta": 0.5},
    ],
)
def test_settings_out_of_bounds_are_refused(wrong):
    with pytest.raises(ValidationError):
        NFTParams(**wrong)


def test_every_setting_says_what_it_is():
    assert all(field.description for field in NFTParams.model_fields.values())


def test_stratified_noise_levels_are_one_from_each_part_of_the_schedule():
    schedule = torch.tensor([1.0, 0.8, 0.5, 0.3, 0.0])
    params = NFTParams(sigmas="stratified", num_train_sigmas=3, timestep_fraction=0.75)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([train_sigmas(schedule, params, generator) for _ in range(300)])
    # Three steps in three parts: each level lies between two of the schedule, evenly.
    for part, (low, high) in enumerate(((0.8, 1.0), (0.5, 0.8), (0.3, 0.5))):
        assert low <= drawn[:, part].min() < low + 0.02
        assert high - 0.02 < drawn[:, part].max() <= high
        assert drawn[:, part].mean().item() == pytest.approx((low + high) / 2, abs=0.02)
    more = NFTParams(sigmas="stratified", num_train_sigmas=6)
    levels = train_sigmas(schedule, more, generator)
    assert len(levels) == 6
    assert (levels > 0).all()
    more.fits(4)


def test_the_old_policy_follows_at_a_constant_rate_and_after_so_many_rounds():
    params = NFTParams(old_policy=0.9, old_policy_interval=3)
    assert [params.old_policy_decay(7, n) for n in range(6)] == [1.0, 1.0, 0.9, 1.0, 1.0, 0.9]
    assert [NFTParams(old_policy=n).old_policy for n in (0, 1, 2)] == ["fixed", "slow", "fast"]
    for value in (1.5, 0.0, -0.1):
        with pytest.raises(ValueError, match="old_policy"):
            NFTParams(old_policy=value)
