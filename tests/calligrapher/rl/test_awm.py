"""Advantage Weighted Matching: against a public trainer's figures, and worked out by hand."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from calligrapher.errors import InputError
from calligrapher.model.policy import Conditioning, Policy
from calligrapher.rl.awm import AWMParams, awm_loss, surrogate
from calligrapher.rl.rows import TrainRows

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "awm.json").read_text())


def f64(values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("case", GOLDEN["cases"], ids=lambda case: case["weighting"])
def test_surrogate_loss_and_gradient_equal_the_public_trainer(case):
    velocity = f64(GOLDEN["velocity"]).requires_grad_()
    target, sigma, weighting = f64(GOLDEN["target"]), f64(GOLDEN["sigma"]), case["weighting"]
    params = AWMParams(clip_range=GOLDEN["clip_range"], kl_coef=GOLDEN["kl_coef"], adv_clip_max=5.0)
    log_prob = surrogate(velocity, target, sigma, weighting)
    loss, metrics = awm_loss(
        log_prob,
        f64(GOLDEN["advantages"]),
        params,
        old_log_prob=surrogate(f64(GOLDEN["old"]), target, sigma, weighting),
        velocity=velocity,
        velocity_ref=f64(GOLDEN["reference"]),
    )
    loss.backward()
    torch.testing.assert_close(log_prob.double(), f64(case["log_prob"]), rtol=1e-6, atol=1e-7)
    assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
    torch.testing.assert_close(velocity.grad, f64(case["gradient"]), rtol=1e-4, atol=1e-6)
    outside = [abs(r - 1) > GOLDEN["clip_range"] for r in case["ratio"]]
    assert metrics["clip_fraction"].item() == pytest.approx(sum(outside) / len(outside))


def test_without_a_clip_range_the_gradient_is_that_of_a_ratio_of_one():
    velocity = f64(GOLDEN["velocity"])
    found = []
    for clip_range in (None, 0.5):
        v = velocity.clone().requires_grad_()
        params = AWMParams(clip_range=clip_range, kl_coef=0.0)
        log_prob = surrogate(v, f64(GOLDEN["target"]), f64(GOLDEN["sigma"]), "t2")
        old = log_prob if clip_range else None
        loss, _ = awm_loss(
            log_prob,
            f64(GOLDEN["advantages"]),
            params,
            old_log_prob=old,
            velocity=v,
            velocity_ref=None,
        )
        loss.backward()
        found.append(v.grad)
    torch.testing.assert_close(*found, rtol=1e-6, atol=1e-9)


def test_a_velocity_that_hits_its_target_is_as_likely_as_can_be():
    target, sigma = f64(GOLDEN["target"]), f64(GOLDEN["sigma"])
    for weighting in ("uniform", "t", "t2", "huber", "ghuber"):
        assert surrogate(target, target, sigma, weighting).abs().max() == 0
        assert surrogate(target + 1.0, target, sigma, weighting).max() < 0
    # An error of 1 everywhere: -1, -t, -t^2, -t, -4 t.
    wrong = {w: surrogate(target + 1.0, target, sigma, w) for w in ("uniform", "t2", "ghuber")}
    torch.testing.assert_close(wrong["uniform"], -torch.ones(4))
    torch.testing.assert_close(wrong["t2"], -(sigma**2).float())
    torch.testing.assert_close(wrong["ghuber"], (-4 * sigma * (1 - 1e-10**0.25)).float())


class Scaled(torch.nn.Module):
    """velocity = w x; counts its calls."""

    def __init__(self, scale):
        super().__init__()
        self.adapter = torch.nn.Linear(1, 1, bias=False)
        self.adapter.weight.data.fill_(scale)
        self.calls = 0

    def forward(self, x, sigma, conditioning, styled=None):
        self.calls += 1
        return self.adapter.weight.view(()) * x


def rows(advantages):
    x0 = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(1))
    nothing = torch.zeros(3, 1)
    conditioning = Conditioning(
        nothing[:, None], nothing, nothing, torch.zeros(3, 4, 1), torch.zeros(4, 3)
    )
    places = torch.tensor([[4, 0], [4, 1], [7, 0]])
    return TrainRows(x0, conditioning, torch.tensor(advantages), None, places)


@pytest.mark.parametrize(
    ("settings", "own_reference", "calls"),
    [
        ({"kl_coef": 0.0}, False, 1),
        ({"kl_coef": 0.0, "clip_range": 0.1}, False, 2),
        ({"kl_coef": 0.1, "clip_range": 0.1}, False, 2),  # one forward is old and reference
        ({"kl_coef": 0.1, "clip_range": 0.1}, True, 3),
        ({"kl_coef": 0.1}, True, 2),
    ],
)
def test_no_policy_is_run_that_the_loss_does_not_ask_for(settings, own_reference, calls):
    policy, params = Policy(Scaled(0.5)), AWMParams(num_train_sigmas=2, **settings)
    assert params.needs_old == ("clip_range" in settings)
    old = policy.snapshot() if params.needs_old else None
    reference = policy.snapshot() if own_reference else None
    losses = params.losses(
        policy, rows([1.0, -1.0, 0.5]), "0/update/0/0", num_steps=6, old=old, reference=reference
    )
    total = 0.0
    for loss, metrics in losses:
        loss.backward()
        total += loss.item()
        assert ("kl" in metrics) == (params.kl_coef > 0)
        assert ("ratio_mean" in metrics) == params.needs_old
        if params.needs_old:
            assert metrics["ratio_max_dev"] == 0, "trained is old here"
    assert policy.model.calls == 2 * calls


def test_the_gradient_raises_the_likelihood_of_what_is_better_than_its_group():
    for advantage in (1.0, -1.0):
        policy = Policy(Scaled(0.5))
        params = AWMParams(kl_coef=0.0, weighting="uniform")

        def likelihood(policy=policy, params=params):
            with torch.no_grad():
                at = list(params.noised_rows(rows([0.0] * 3), "k", 6))
                x0 = rows([0.0] * 3).x0
                found = [
                    surrogate(policy.velocity(a.x, a.sigma, None), a.noise - x0, a.sigma, "uniform")
                    for a in at
                ]
            return torch.stack(found).mean().item()

        before = likelihood()
        for loss, _ in params.losses(
            policy, rows([advantage] * 3), "k", num_steps=6, old=None, reference=None
        ):
            loss.backward()
        weight = policy.parameters["adapter.weight"]
        weight.data -= 1e-3 * weight.grad
        assert (likelihood() > before) == (advantage > 0)


def test_what_the_settings_ask_for_must_be_given():
    log_prob, advantages = torch.zeros(2), torch.ones(2)
    velocity = torch.zeros(2, 3)
    with pytest.raises(InputError, match="needs velocity_ref"):
        awm_loss(
            log_prob,
            advantages,
            AWMParams(kl_coef=0.1),
            old_log_prob=None,
            velocity=velocity,
            velocity_ref=None,
        )
    with pytest.raises(InputError, match="needs old_log_prob"):
        awm_loss(
            log_prob,
            advantages,
            AWMParams(kl_coef=0.0, clip_range=0.1),
            old_log_prob=None,
            velocity=velocity,
            velocity_ref=None,
        )
    with pytest.raises(ValidationError):
        AWMParams(weighting="t**2")
