"""The sampler's steps: against public implementations, against torch.distributions, and bit for
bit."""

import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from diffusers import DPMSolverMultistepScheduler
from safetensors.torch import load_file
from torch.distributions import Normal

from calligrapher.errors import InputError
from calligrapher.sampling.schedule import sigma_schedule
from calligrapher.sampling.step import Step, cps_step, dance_step, dpm2_step, ode_step, sde_step

GOLDEN = Path(__file__).parents[2] / "golden"


def golden(name):
    tensors, found = load_file(GOLDEN / f"{name}.safetensors"), []
    for case in json.loads((GOLDEN / f"{name}.json").read_text()):
        prefix = f"{case['case']}."
        values = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
        values = {k: v.item() if v.numel() == 1 else v for k, v in values.items()}
        found.append(pytest.param(values, id=prefix[:-1]))
    return found


def inputs(rows=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(rows, 5, 7, generator=g) for _ in range(3)]


SDE = {"sigma": 0.7, "sigma_next": 0.45, "noise_level": 0.7, "sigma_max": 0.9}
CPS = {"sigma": 0.7, "sigma_next": 0.45, "noise_level": 0.7}
STEPS = [
    pytest.param(sde_step, SDE, id="sde"),
    pytest.param(dance_step, CPS, id="dance"),
    pytest.param(cps_step, CPS, id="cps"),
]


@pytest.mark.parametrize("case", golden("sde"))
def test_the_sde_step_equals_flow_grpo(case):
    step = sde_step(
        case["v"],
        case["x"],
        case["sigma"],
        case["sigma_next"],
        noise_level=case["noise_level"],
        sigma_max=case["sigma_max"],
        x_next=case["x_next"],
    )
    torch.testing.assert_close(step.mean, case["mean"], rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(step.log_prob, case["log_prob"], rtol=2e-4, atol=1e-5)
    expected = case["std_dev_t"] * math.sqrt(case["sigma"] - case["sigma_next"])
    assert step.std.item() == pytest.approx(expected, rel=2e-4)


@pytest.mark.parametrize("case", golden("cps"))
def test_the_cps_step_equals_flow_grpo(case):
    level = math.asin(case["std"] / case["sigma_next"]) / (math.pi / 2)
    assert level == pytest.approx(round(level, 1), abs=1e-5)
    step = cps_step(
        case["v"],
        case["x"],
        case["sigma"],
        case["sigma_next"],
        noise_level=round(level, 1),
        x_next=case["x_next"],
    )
    torch.testing.assert_close(step.mean, case["mean"], rtol=2e-4, atol=1e-5)
    torch.testing.assert_close(step.log_prob, case["log_prob"], rtol=2e-4, atol=1e-5)
    assert step.std.item() == pytest.approx(case["std"], rel=2e-4)


@pytest.mark.parametrize("case", golden("dance"))
def test_the_dance_step_equals_dance_grpo(case):
    level = case["std"] / math.sqrt(case["sigma"] - case["sigma_next"])
    assert level == pytest.approx(round(level, 1), abs=1e-5)
    step = dance_step(
        case["v"],
        case["x"],
        case["sigma"],
        case["sigma_next"],
        noise_level=round(level, 1),
        x_next=case["x_next"],
    )
    torch.testing.assert_close(step.mean, case["mean"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(step.log_prob, case["log_prob"], rtol=1e-5, atol=1e-5)
    assert step.std.item() == pytest.approx(case["std"], rel=1e-5)


def test_the_sde_log_prob_is_the_mean_of_a_normal_distribution():
    v, x, noise = inputs()
    step = sde_step(v, x, **SDE, noise=noise)
    expected = Normal(step.mean, step.std).log_prob(step.x_next).flatten(1).mean(1)
    torch.testing.assert_close(step.log_prob, expected, rtol=1e-5, atol=1e-6)
    assert step.log_prob.shape == (3,)


def test_the_sde_step_worked_by_hand():
    # sigma = 0.5: std_dev = sqrt(0.5 / 0.5) * 0.8 = 0.8, dt = -0.25, S = 0.8 * 0.5 = 0.4, drift =
    # 0.64 mean = 2 * (1 - 0.16) + 1 * (1 + 0.32) * -0.25 = 1.68 - 0.33 = 1.35; x_next = 1.35 + 0.4
    # * 0.5 = 1.55 log_prob = -0.125 - ln 0.4 - ln sqrt(2 pi) = -0.125 + 0.916291 - 0.918939 =
    # -0.127648
    x, v, noise = (torch.full((2, 3), value) for value in (2.0, 1.0, 0.5))
    step = sde_step(v, x, 0.5, 0.25, noise_level=0.8, sigma_max=0.9, noise=noise)
    assert step.std.item() == pytest.approx(0.4)
    torch.testing.assert_close(step.mean, torch.full((2, 3), 1.35))
    torch.testing.assert_close(step.x_next, torch.full((2, 3), 1.55))
    torch.testing.assert_close(step.log_prob, torch.full((2,), -0.127648), rtol=0, atol=1e-5)


def test_the_dance_step_worked_by_hand():
    # sigma 0.5 -> 0.25 at level 0.8: std = 0.8 * 0.5 = 0.4, x0_hat = 1.5, drift = 0.32 / 0.25 * (2
    # - 0.75) = 1.6, mean = 2 - 0.25 * (1 + 1.6) = 1.35, as Flow-GRPO's at sigma 0.5.
    x, v, noise = (torch.full((2, 3), value) for value in (2.0, 1.0, 0.5))
    step = dance_step(v, x, 0.5, 0.25, noise_level=0.8, noise=noise)
    assert step.std.item() == pytest.approx(0.4)
    torch.testing.assert_close(step.mean, torch.full((2, 3), 1.35))
    torch.testing.assert_close(step.log_prob, torch.full((2,), -0.127648), rtol=0, atol=1e-5)
    # At sigma 1: drift = 0.32 * 2, mean = 2 - 0.25 * 1.64 = 1.59.
    step = dance_step(v, x, 1.0, 0.75, noise_level=0.8, noise=noise)
    torch.testing.assert_close(step.mean, torch.full((2, 3), 1.59))


def test_the_cps_step_worked_by_hand():
    # sigma 0.5 -> 0.25 at level 1/3: std = 0.25 * sin(30 deg) = 0.125; x0_hat = 2 - 0.5 = 1.5,
    # x1_hat = 2.5 mean = 1.5 * 0.75 + 2.5 * sqrt(0.0625 - 0.015625) = 1.125 + 2.5 * 0.216506 =
    # 1.666266
    x, v, noise = (torch.full((2, 3), value) for value in (2.0, 1.0, 0.5))
    step = cps_step(v, x, 0.5, 0.25, noise_level=1 / 3, noise=noise)
    torch.testing.assert_close(step.mean, torch.full((2, 3), 1.666266))
    torch.testing.assert_close(step.log_prob, torch.full((2,), -(0.0625**2)))


def test_the_ode_step_worked_by_hand():
    x, v = torch.full((2, 3), 2.0, dtype=torch.bfloat16), torch.full((2, 3), 1.0)
    step = ode_step(v, x, torch.tensor(0.5), 0.25)
    assert step.dtype == torch.float32
    torch.testing.assert_close(step, torch.full((2, 3), 1.75))


@pytest.mark.filterwarnings("ignore:__array__:DeprecationWarning")  # of their scheduler
@pytest.mark.parametrize("num_steps", [2, 6, 20])
def test_dpm2_steps_equal_those_of_diffusers(num_steps):
    sigmas = sigma_schedule(num_steps, 1024)
    theirs = DPMSolverMultistepScheduler(
        use_flow_sigmas=True, prediction_type="flow_prediction", flow_shift=1.0
    )
    theirs.set_timesteps(num_steps)
    theirs.sigmas = sigmas
    x = other = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(0))
    before = None
    for i, timestep in enumerate(theirs.timesteps):
        sigma, sigma_next = sigmas[i].item(), sigmas[i + 1].item()
        # A field whose x0_hat bends, so that the second order counts.
        velocity, expected = (torch.sin(3 * at + 2 * sigma) for at in (x, other))
        x, x0_hat = dpm2_step(velocity, x, sigma, sigma_next, before=before)
        before = x0_hat, sigma
        other = theirs.step(expected, timestep, other).prev_sample
        torch.testing.assert_close(x, other, rtol=2e-5, atol=2e-5)


def test_the_dpm2_step_worked_by_hand():
    # lambda of 0.8, 0.5, 0.2: -ln 4, 0, ln 4. Equal lengths: D = 4 + (4 - 3) / 2.
    x, velocity = torch.full((1, 1), 5.0), torch.full((1, 1), 2.0)
    x_next, x0_hat = dpm2_step(velocity, x, 0.5, 0.2, before=(torch.full((1, 1), 3.0), 0.8))
    assert x0_hat.item() == 4.0
    assert x_next.item() == pytest.approx(0.4 * 5.0 + 0.6 * 4.5)
    # Euler's where lambda is infinite, and in the first step.
    for before, sigma_next in (((x0_hat, 1.0), 0.2), ((x0_hat, 0.8), 0.0), (None, 0.2)):
        x_next, _ = dpm2_step(velocity, x, 0.5, sigma_next, before=before)
        torch.testing.assert_close(x_next, ode_step(velocity, x, 0.5, sigma_next))


def test_at_sigma_one_the_noise_is_noise_level():
    v, x, noise = inputs()
    step = sde_step(v, x, 1.0, 0.9, noise_level=0.7, sigma_max=0.9, noise=noise)
    assert step.std.item() == pytest.approx(0.7)


@pytest.mark.parametrize(("function", "settings"), STEPS)
def test_scoring_a_sampled_step_gives_the_same_bits(function, settings):
    v, x, noise = inputs()
    sampled = function(v, x, **settings, noise=noise)
    scored = function(v, x, **settings, x_next=sampled.x_next)
    tensors = {**settings, **{k: torch.tensor(settings[k]) for k in ("sigma", "sigma_next")}}
    from_tensors = function(v, x, **tensors, x_next=sampled.x_next)
    for field in dataclasses.fields(Step):
        assert torch.equal(getattr(sampled, field.name), getattr(scored, field.name))
        torch.testing.assert_close(getattr(from_tensors, field.name), getattr(scored, field.name))


@pytest.mark.parametrize(("function", "settings"), STEPS)
def test_the_log_prob_has_a_gradient_though_the_sample_came_from_the_same_velocity(
    function, settings
):
    v, x, noise = inputs()
    v.requires_grad_()
    step = function(v, x, **settings, noise=noise)
    assert not step.x_next.requires_grad
    step.log_prob.sum().backward()
    assert v.grad.abs().min() > 0


@pytest.mark.parametrize(("function", "settings"), STEPS)
def test_rows_do_not_see_each_other(function, settings):
    v, x, noise = inputs()
    order = [2, 0, 1]
    whole = function(v, x, **settings, noise=noise)
    shuffled = function(v[order], x[order], **settings, noise=noise[order])
    assert torch.equal(whole.log_prob[order], shuffled.log_prob)
    assert torch.equal(whole.x_next[order], shuffled.x_next)


def test_half_precision_inputs_are_computed_in_float32():
    v, x, noise = inputs()
    v, x = v.bfloat16(), x.bfloat16()
    step = sde_step(v, x, **SDE, noise=noise)
    assert {step.x_next.dtype, step.mean.dtype, step.std.dtype, step.log_prob.dtype} == {
        torch.float32
    }
    assert torch.equal(step.mean, sde_step(v.float(), x.float(), **SDE, noise=noise).mean)


def test_cps_keeps_the_noise_of_the_schedule():
    # On the exact path x = (1 - sigma) x0 + sigma e, old and new noise add up to sigma_next in
    # variance.
    x0, e = torch.zeros(2, 3), torch.ones(2, 3)
    step = cps_step(e - x0, 0.7 * e, **CPS, noise=torch.zeros(2, 3))
    torch.testing.assert_close(step.mean**2 + step.std**2, torch.full((2, 3), 0.45**2))


@pytest.mark.parametrize(("function", "settings"), STEPS)
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"noise_level": 0.0}, "noise_level must be above 0"),
        ({"sigma": 0.3}, "a step must go down"),
        ({"sigma_next": -0.1}, "a step must go down"),
        ({"noise": None}, "Got neither"),
        ({"x_next": torch.zeros(3, 5, 7)}, "Got both"),
        ({"noise": torch.zeros(3, 5, 1)}, "must be shaped like x"),
    ],
)
def test_a_step_that_cannot_be_taken_is_refused(function, settings, change, message):
    v, x, noise = inputs()
    with pytest.raises(InputError, match=message):
        function(v, x, **{**settings, "noise": noise, **change})


def test_the_cps_noise_level_ends_at_one_and_the_sde_needs_a_second_sigma():
    v, x, noise = inputs()
    with pytest.raises(InputError, match="at most 1"):
        cps_step(v, x, 0.7, 0.45, noise_level=1.1, noise=noise)
    with pytest.raises(InputError, match="sigma_max must lie between"):
        sde_step(v, x, 1.0, 0.0, noise_level=0.7, sigma_max=0.0, noise=noise)
