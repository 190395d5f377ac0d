"""The three objectives on a policy small enough to work out: velocity = W x, dropped with the
style."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from calligrapher.model.policy import Conditioning, Policy
from calligrapher.rl.background import Background
from calligrapher.rl.forward_process import train_sigmas
from calligrapher.rl.grpo import GRPOParams
from calligrapher.rl.nft import NFTParams, nft_loss
from calligrapher.rl.rows import TrainRows, noised
from calligrapher.rl.seeds import seeded as named
from calligrapher.rl.supervised import supervised
from calligrapher.sampling.exploration import Window
from calligrapher.sampling.sampler import sample
from calligrapher.sampling.schedule import sigma_schedule

ROWS, LENGTH, CHANNELS, STEPS = 3, 4, 5, 6
KEY = "0/update/0/0"
PLACES = torch.tensor([[4, 0], [4, 1], [7, 0]])  # group and member


class HandMade(nn.Module):
    """Counts its calls and remembers the last `styled`."""

    def __init__(self, scale):
        super().__init__()
        self.adapter = nn.Linear(CHANNELS, CHANNELS, bias=False)
        self.adapter.weight.data = scale * torch.eye(CHANNELS)
        self.transformer = nn.Module()
        self.transformer.out_channels = CHANNELS
        self.calls, self.styled, self.seen = 0, None, []

    def forward(self, x, sigma, conditioning, styled=None):
        self.calls += 1
        self.styled = styled
        self.seen.append((x, sigma))
        velocity = self.adapter(x)
        return velocity if styled is None else velocity * styled[:, None, None]


def policy(scale=0.5):
    return Policy(HandMade(scale))


def conditioning(rows=ROWS):
    return Conditioning(
        torch.zeros(rows, 1, 1),
        torch.zeros(rows, 1),
        torch.zeros(rows, 1),
        torch.zeros(rows, LENGTH, 1),
        torch.zeros(LENGTH, 3),
    )


def rows(advantages=(1.0, 0.0, -2.0), window=None):
    x0 = torch.randn(ROWS, LENGTH, CHANNELS, generator=torch.Generator().manual_seed(1))
    return TrainRows(x0, conditioning(), torch.tensor(advantages), window, PLACES)


def seeded(seed=7):
    return torch.Generator().manual_seed(seed)


def nft(p, batch, params, *, old, reference, num_steps=STEPS):
    return params.losses(p, batch, KEY, num_steps=num_steps, old=old, reference=reference)


def grpo(p, batch, params, reference):
    return params.losses(p, batch, KEY, num_steps=STEPS, old=None, reference=reference)


def run(losses):
    """Back-propagate every loss; the sum of the losses and the metrics of each."""
    total, metrics = 0.0, []
    for loss, found in losses:
        loss.backward()
        total += loss.item()
        metrics.append(found)
    return total, metrics


def gradient(p):
    return p.parameters["adapter.weight"].grad


def test_supervised_is_the_squared_distance_to_noise_minus_x0():
    p, batch = policy(0.5), rows()
    total, metrics = run(supervised(p, batch, seeded(), style_dropout=0.0))
    generator = seeded()
    sigma = torch.sigmoid(torch.randn(ROWS, generator=generator))[:, None, None]
    torch.rand(ROWS, generator=generator)
    noise = torch.randn(batch.x0.shape, generator=generator)
    x = (1 - sigma) * batch.x0 + sigma * noise
    expected = ((0.5 * x - (noise - batch.x0)) ** 2).mean().item()
    assert total == pytest.approx(expected, rel=1e-5)
    assert metrics[0]["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert p.model.styled.tolist() == [1, 1, 1]
    assert gradient(p).abs().max() > 0


def test_style_dropout_takes_the_style_from_that_share_of_the_rows():
    p, taken = policy(), []
    for seed in range(60):
        run(supervised(p, rows(), seeded(seed), style_dropout=0.25))
        taken += p.model.styled.tolist()
    assert set(taken) == {0.0, 1.0}
    assert taken.count(0.0) / len(taken) == pytest.approx(0.25, abs=0.08)


def test_noised_lies_between_x0_and_the_noise():
    x0 = torch.ones(2, LENGTH, CHANNELS)
    noise = torch.randn(x0.shape, generator=seeded())
    x = noised(x0, torch.tensor([0.0, 1.0]), noise)
    assert torch.equal(x[0], x0[0])
    torch.testing.assert_close(x[1], noise[1])


@pytest.mark.parametrize(
    ("kl_coef", "own_reference", "calls"),
    [(0.0, False, 2), (0.0, True, 2), (0.1, False, 2), (0.1, True, 3)],
)
def test_nft_runs_no_forward_that_it_does_not_need(kl_coef, own_reference, calls):
    p = policy()
    old = p.snapshot()
    reference = {n: w + 0.1 for n, w in old.items()} if own_reference else None
    params = NFTParams(kl_coef=kl_coef, num_train_sigmas=2)
    _, metrics = run(params.losses(p, rows(), KEY, num_steps=STEPS, old=old, reference=reference))
    assert p.model.calls == 2 * calls
    for found in metrics:
        assert ("kl" in found) == (kl_coef > 0)
        if kl_coef > 0:
            assert (found["kl"] > 0) == own_reference


def test_nft_averages_nft_loss_over_the_noise_levels():
    p, batch, params = policy(0.5), rows(), NFTParams(kl_coef=0.2, num_train_sigmas=3)
    old = {"adapter.weight": 0.3 * torch.eye(CHANNELS)}
    reference = {"adapter.weight": 0.4 * torch.eye(CHANNELS)}
    total, metrics = run(
        params.losses(p, batch, KEY, num_steps=STEPS, old=old, reference=reference)
    )
    sigmas_KB = torch.stack(
        [
            train_sigmas(sigma_schedule(STEPS, LENGTH), params, named(KEY, group, member, "sigmas"))
            for group, member in PLACES.tolist()
        ],
        dim=1,
    )
    expected = []
    for k, sigma in enumerate(sigmas_KB):
        streams = [named(KEY, group, member, k) for group, member in PLACES.tolist()]
        noise = torch.stack([torch.randn(LENGTH, CHANNELS, generator=s) for s in streams])
        x = noised(batch.x0, sigma, noise)
        loss, _ = nft_loss(
            0.5 * x,
            batch.advantages,
            params,
            velocity_old=0.3 * x,
            velocity_ref=0.4 * x,
            x0=batch.x0,
            x=x,
            sigma=sigma,
        )
        expected.append(loss.item())
    assert len(expected) == len(metrics) == 3
    assert total == pytest.approx(sum(expected) / 3, rel=1e-5)


def test_nft_without_advantages_has_no_gradient_at_the_old_policy():
    p = policy()
    run(
        NFTParams(kl_coef=0.0).losses(
            p,
            rows((0.0, 0.0, 0.0)),
            KEY,
            num_steps=STEPS,
            old=p.snapshot(),
            reference=p.snapshot(),
        )
    )
    assert torch.equal(gradient(p), torch.zeros(CHANNELS, CHANNELS))


@pytest.mark.parametrize(("noise", "shared"), [("row", False), ("group", True)])
def test_nft_draws_noise_and_levels_for_each_row_or_once_for_each_group(noise, shared):
    p, params = policy(), NFTParams(kl_coef=0.0, num_train_sigmas=2, noise=noise)
    same = TrainRows(
        torch.zeros(3, LENGTH, CHANNELS), conditioning(), torch.zeros(3), places=PLACES
    )
    run(params.losses(p, same, KEY, num_steps=50, old=p.snapshot(), reference=p.snapshot()))
    for x, sigma in p.model.seen:
        assert torch.equal(x[0], x[1]) == shared
        assert not torch.equal(x[1], x[2])
        if shared:
            assert sigma[0] == sigma[1]
    assert not torch.equal(p.model.seen[0][0], p.model.seen[2][0])


def seen_in_batches(noise, batches):
    """Return what the policy saw of each row and noise level: (row, k) -> (x, sigma)."""
    p, params = policy(), NFTParams(kl_coef=0.0, num_train_sigmas=2, noise=noise)
    places = torch.tensor([(group, member) for group in (2, 5) for member in range(4)])
    x0 = torch.zeros(8, LENGTH, CHANNELS)
    everything = TrainRows(x0, conditioning(8), torch.zeros(8), places=places)
    seen = {}
    for index in batches:
        p.model.seen.clear()
        old = p.snapshot()
        picked = everything.pick(index)
        run(params.losses(p, picked, KEY, num_steps=50, old=old, reference=None))
        for k, (x, sigma) in enumerate(p.model.seen[::2]):
            for i, row in enumerate(index):
                seen[row, k] = (x[i], sigma[i].item())
    return seen


@pytest.mark.parametrize("size", [8, 4, 3, 2, 1])
def test_the_noise_of_a_group_is_one_draw_whatever_the_batches(size):
    whole = seen_in_batches("group", [list(range(8))])
    seen = seen_in_batches("group", [list(range(8))[at : at + size] for at in range(0, 8, size)])
    for k in range(2):
        for first in (0, 4):
            draws = {seen[row, k][0].sum().item() for row in range(first, first + 4)}
            levels = {seen[row, k][1] for row in range(first, first + 4)}
            assert len(draws) == len(levels) == 1
        assert seen[0, k][0].sum() != seen[4, k][0].sum()
    assert all(torch.equal(seen[at][0], whole[at][0]) for at in whole)


@pytest.mark.parametrize("noise", ["row", "group"])
def test_an_image_without_a_score_shifts_nobody_elses_draw(noise):
    whole = seen_in_batches(noise, [[0, 1, 2], [3, 4, 5], [6, 7]])
    without = seen_in_batches(noise, [[1, 2, 3], [4, 5, 6], [7]])
    assert len(without) == 14
    for at, (x, sigma) in without.items():
        assert torch.equal(x, whole[at][0])
        assert sigma == whole[at][1]


@pytest.mark.parametrize("noise", ["row", "group"])
def test_nft_in_accumulated_batches_has_the_gradient_of_one_large_batch(noise):
    found = {}
    for size in (6, 3, 4, 1):
        p, params = policy(), NFTParams(kl_coef=0.1, num_train_sigmas=2, noise=noise)
        x0 = torch.randn(6, LENGTH, CHANNELS, generator=seeded(1))
        places = torch.tensor([(group, member) for group in (0, 1) for member in range(3)])
        advantages = torch.tensor([1.0, -0.5, -0.5, 2.0, -1.0, -1.0])
        everything = TrainRows(x0, conditioning(6), advantages, places=places)
        old = {"adapter.weight": 0.3 * torch.eye(CHANNELS)}
        for at in range(0, 6, size):
            index = list(range(6))[at : at + size]
            losses = params.losses(
                p, everything.pick(index), KEY, num_steps=STEPS, old=old, reference=None
            )
            run((loss * len(index) / 6, metrics) for loss, metrics in losses)
        found[size] = gradient(p)
    assert found[6].abs().max() > 0.01
    for size in (3, 4, 1):
        torch.testing.assert_close(found[size], found[6], atol=1e-6, rtol=1e-6)


def rollout(p, params, starts=(0, 2, 1)):
    """Rows that `p` has sampled with a window of its own for each."""
    found = sample(
        p, conditioning(), [1, 2, 3], STEPS, window_starts=list(starts), exploration=params
    )
    p.model.calls = 0
    return TrainRows(found.x0, conditioning(), torch.tensor([1.0, -0.5, 2.0]), found.window)


@pytest.mark.parametrize("sampler", ["sde", "dance", "cps"])
@pytest.mark.parametrize("guard", [False, True])
def test_grpo_of_the_policy_that_sampled_has_ratio_one(sampler, guard):
    if guard and sampler == "cps":
        pytest.skip("guard undoes a variance, which cps has none of")
    p, params = policy(), GRPOParams(window_size=2, kl_coef=0.1, sampler=sampler, guard=guard)
    _, metrics = run(
        params.losses(p, rollout(p, params), KEY, num_steps=STEPS, old=None, reference=p.snapshot())
    )
    assert len(metrics) == 2
    for found in metrics:
        assert found["ratio_mean"].item() == 1.0
        assert found["approx_kl"].item() == 0.0
        assert found["kl"].item() == 0.0
    assert gradient(p).abs().max() > 0


@pytest.mark.parametrize("guard", [False, True])
def test_recomputed_log_probs_make_the_ratio_one_whatever_the_rollout_wrote_down(guard):
    p, settings = policy(), {"window_size": 2, "kl_coef": 0.1, "guard": guard}
    batch = rollout(p, GRPOParams(**settings))
    w = batch.window
    off = Window(w.trajectory, w.log_prob + 1e-3, w.mean + 1e-2, w.sigmas)
    batch = TrainRows(batch.x0, batch.conditioning, batch.advantages, off)
    old = p.snapshot()
    for again, calls in ((False, 4), (True, 4)):  # old serves as the reference, too
        p.model.calls = 0
        params = GRPOParams(recompute_log_prob=again, **settings)
        reference = None if again else old
        losses = params.losses(p, batch, KEY, num_steps=STEPS, old=old, reference=reference)
        _, metrics = run(losses)
        assert {found["ratio_max_dev"].item() == 0.0 for found in metrics} == {again}
        assert [found["kl"].item() for found in metrics] == [0.0, 0.0]
        assert p.model.calls == calls


def test_recomputed_log_probs_are_those_of_the_policy_that_sampled():
    p, params = policy(), GRPOParams(window_size=2, kl_coef=0.0, recompute_log_prob=True)
    batch, old = rollout(p, params), p.snapshot()
    p.parameters["adapter.weight"].data += 0.01
    found = [
        run(given.losses(p, batch, KEY, num_steps=STEPS, old=old, reference=None))
        for given in (params, GRPOParams(window_size=2, kl_coef=0.0))
    ]
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-6)
    assert found[0][1][0]["ratio_max_dev"].item() > 1e-4


def test_rows_that_an_older_policy_sampled_are_weighed_and_the_ratio_begins_at_one():
    p, params = policy(), GRPOParams(window_size=2, kl_coef=0.0, importance_cap=1.0)
    batch = rollout(p, params)
    p.parameters["adapter.weight"].data += 0.01
    now = p.snapshot()
    assert params.needs_old
    _, found = run(params.losses(p, batch, KEY, num_steps=STEPS, old=now, reference=None))
    anew = GRPOParams(window_size=2, kl_coef=0.0)
    _, plain = run(anew.losses(p, batch, KEY, num_steps=STEPS, old=None, reference=None))
    for weighed, unweighed in zip(found, plain, strict=True):
        assert weighed["ratio_max_dev"].item() == 0.0
        assert unweighed["ratio_max_dev"].item() > 1e-4
        # What is the ratio without it is the weight with it, but for those above the cap.
        assert 0 < 1 - weighed["importance_mean"].item() < unweighed["ratio_max_dev"].item()


@pytest.mark.parametrize(("kl_coef", "calls"), [(0.0, 1), (0.1, 2)])
def test_grpo_runs_the_reference_only_for_a_kl(kl_coef, calls):
    p, params = policy(), GRPOParams(window_size=2, kl_coef=kl_coef)
    run(
        params.losses(p, rollout(p, params), KEY, num_steps=STEPS, old=None, reference=p.snapshot())
    )
    assert p.model.calls == 2 * calls


def test_the_kl_of_grpo_pulls_towards_the_reference():
    p, params = policy(0.5), GRPOParams(window_size=2, kl_coef=1.0)
    batch = rollout(p, params)
    batch = TrainRows(batch.x0, batch.conditioning, torch.zeros(ROWS), batch.window)
    reference = {"adapter.weight": 0.4 * torch.eye(CHANNELS)}
    before, _ = run(params.losses(p, batch, KEY, num_steps=STEPS, old=None, reference=reference))
    assert before > 0
    p.parameters["adapter.weight"].data -= 1e-3 * gradient(p) / gradient(p).norm()
    after, _ = run(params.losses(p, batch, KEY, num_steps=STEPS, old=None, reference=reference))
    assert after < before


def test_the_kl_of_velocities_is_their_squared_distance_whatever_the_noise_level():
    p, params = policy(0.5), GRPOParams(window_size=2, kl_coef=1.0, kl_space="velocity")
    batch = rollout(p, params)
    _, metrics = run(grpo(p, batch, params, {"adapter.weight": 0.4 * torch.eye(CHANNELS)}))
    for j, found in enumerate(metrics):
        squared = (0.1 * batch.window.trajectory[:, j]).square().mean().item()
        assert found["kl"].item() == pytest.approx(squared, rel=1e-4)
        assert (found["loss"] - found["policy_loss"]).item() == pytest.approx(squared, rel=1e-3)


def test_grpo_raises_the_probability_of_what_was_good():
    p, params = policy(), GRPOParams(window_size=2, kl_coef=0.0)
    batch = rollout(p, params)
    batch = TrainRows(batch.x0, batch.conditioning, torch.tensor([1.0, 0.0, 0.0]), batch.window)
    before, _ = run(params.losses(p, batch, KEY, num_steps=STEPS, old=None, reference=p.snapshot()))
    p.parameters["adapter.weight"].data -= 1e-3 * gradient(p) / gradient(p).norm()
    after, metrics = run(
        params.losses(p, batch, KEY, num_steps=STEPS, old=None, reference=p.snapshot())
    )
    assert after < before
    assert sum(found["ratio_mean"].item() for found in metrics) / 2 > 1


def seen_together(size=1, **settings):
    """Settings, and rows of which the last two are of one group, sampled with a shared trunk."""
    params = GRPOParams(noise="group", window_size=size, **settings)
    found = sample(
        policy(),
        conditioning(),
        [1, 2, 3],
        STEPS,
        starts_from=[9, 8, 8],
        window_starts=[0, 1, 1],
        exploration=params,
        shared_trunk=True,
    )
    outside = torch.arange(LENGTH * CHANNELS).reshape(1, LENGTH, CHANNELS).repeat(ROWS, 1, 1) % 3
    batch = replace(
        rows((1.0, -0.5, 2.0), replace(found.window, trunks=torch.tensor([4, 7, 7]))),
        background=Background(found.x0 + 1, outside == 0),
        credit=torch.randn(found.x0.shape, generator=seeded()),
    )
    return params, batch


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("anew", [False, True])
def test_what_a_group_sees_together_is_run_once_and_has_the_gradient_of_all_rows(size, anew):
    params, together = seen_together(
        size, kl_coef=0.3, background_coef=0.5, recompute_log_prob=anew
    )
    apart = replace(together, window=replace(together.window, trunks=None))
    found = {}
    for name, batch in (("apart", apart), ("together", together)):
        p = policy(0.7)  # a step away from the policy that sampled
        old, reference = policy().snapshot(), policy(0.2).snapshot()
        _, metrics = run(
            params.losses(
                p, batch, KEY, num_steps=STEPS, old=old if anew else None, reference=reference
            )
        )
        sizes = [len(x) for x, _ in p.model.seen]
        found[name] = gradient(p), metrics, sizes
    # Each step runs the reference and the trained policy, and the old one where it is asked anew.
    policies = 2 + anew
    assert found["apart"][2] == [3] * policies * size
    assert found["together"][2] == [2] * policies + [3] * policies * (size - 1)
    assert found["apart"][0].abs().max() > 0.01
    torch.testing.assert_close(found["together"][0], found["apart"][0], atol=1e-6, rtol=1e-6)
    for one, other in zip(found["together"][1], found["apart"][1], strict=True):
        assert {"kl", "background"} <= one.keys()
        for name, value in one.items():
            torch.testing.assert_close(value, other[name], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("sampler", ["sde", "dance", "cps"])
@pytest.mark.parametrize("places", [False, True])
def test_the_pull_of_an_image_that_is_its_noise_is_the_published_gradient(sampler, places):
    # Advantages beyond the clip among them, of rows and of places.
    params, batch = seen_together(sampler=sampler, kl_coef=0.0, adv_clip_max=0.75)
    if not places:
        batch = replace(batch, credit=None)
    explored = batch.window.trajectory[:, 1] - batch.window.mean[:, 0]
    found = {}
    for direction in ("noise", "image"):
        p = policy()
        along = params.model_copy(update={"direction": direction})
        _, (metrics,) = run(
            along.losses(
                p,
                replace(batch, deviation=explored),
                KEY,
                num_steps=STEPS,
                old=None,
                reference=None,
            )
        )
        assert metrics["ratio_max_dev"] == 0
        found[direction] = gradient(p)
    assert found["noise"].abs().max() > 1e-4
    torch.testing.assert_close(found["image"], found["noise"], rtol=1e-5, atol=1e-7)


def test_an_image_better_than_its_group_draws_what_the_step_expects_towards_it():
    params, batch = seen_together(direction="image", sampler="cps", kl_coef=0.0)
    towards = torch.zeros(ROWS, LENGTH, CHANNELS)
    towards[1] = 1.0
    batch = replace(batch, advantages=torch.tensor([0.0, 2.0, 0.0]), credit=None, deviation=towards)
    batch = replace(batch, background=None)
    p = policy()

    def expected():
        with torch.no_grad():
            x, sigma = batch.window.trajectory[1, 0], batch.window.sigmas[1, 0]
            return (x - sigma * p.velocity(x[None], sigma[None], conditioning(1))[0]).mean()

    before = expected()
    run(params.losses(p, batch, KEY, num_steps=STEPS, old=None, reference=None))
    (weight,) = p.parameters.values()
    weight.data -= 0.1 * weight.grad
    assert expected() > before


def test_rows_of_one_trunk_stay_together_when_they_are_picked():
    params, batch = seen_together()
    picked = batch.pick([2, 0])
    assert picked.window.trunks.tolist() == [7, 4]
    apart = replace(batch, deviation=batch.x0 + 1).pick([2, 0])
    assert torch.equal(apart.deviation, batch.x0[[2, 0]] + 1)
    p = policy()
    _, (metrics,) = run(
        params.losses(p, batch.pick([1, 2]), KEY, num_steps=STEPS, old=None, reference=p.snapshot())
    )
    assert [len(x) for x, _ in p.model.seen] == [1, 1]
    assert metrics["ratio_max_dev"] == 0


def test_picked_rows_keep_what_belongs_to_them():
    window = Window(
        torch.arange(ROWS * 2.0).reshape(ROWS, 2, 1, 1),
        torch.arange(3.0)[:, None],
        torch.arange(3.0).reshape(3, 1, 1, 1),
        torch.arange(6.0).reshape(3, 2),
    )
    picked = rows(window=window).pick([2, 0])
    assert len(picked) == 2
    assert picked.advantages.tolist() == [-2.0, 1.0]
    assert picked.window.trajectory.flatten().tolist() == [4, 5, 0, 1]
    assert picked.window.log_prob.flatten().tolist() == [2, 0]
    assert picked.window.mean.flatten().tolist() == [2, 0]
    assert picked.window.sigmas.tolist() == [[4, 5], [0, 1]]
    assert torch.equal(picked.x0, rows().x0[[2, 0]])
    assert picked.conditioning.prompt.shape[0] == 2
