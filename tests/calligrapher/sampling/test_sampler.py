"""The sampling loop on a made-up velocity field, where the answer is known."""

from types import SimpleNamespace

import pytest
import torch

from calligrapher.rl.grpo import GRPOParams
from calligrapher.sampling.calls import from_trunks
from calligrapher.sampling.exploration import fresh_noise
from calligrapher.sampling.sampler import sample, sample_seed
from calligrapher.sampling.schedule import sigma_schedule
from calligrapher.sampling.step import sde_step

LENGTH, CHANNELS = 6, 5


class TowardsTarget:
    """The velocity that ends every path at `target`: (x - target) / sigma."""

    def __init__(self, target=2.0):
        self.target, self.calls = target, []
        self.model = SimpleNamespace(transformer=SimpleNamespace(out_channels=CHANNELS))

    def velocity(self, x, sigma, conditioning, styled=None):
        self.calls.append(sigma.tolist())
        return (x - self.target) / sigma[:, None, None]


def conditioning(rows):
    masked = torch.zeros(rows, LENGTH, 3)
    return SimpleNamespace(masked=masked, rows=lambda index: conditioning(len(index)))


def test_the_ode_ends_at_the_target_with_one_call_a_step():
    policy = TowardsTarget()
    found = sample(policy, conditioning(3), [1, 2, 3], 7)
    assert found.window is None
    assert found.x0.shape == (3, LENGTH, CHANNELS)
    torch.testing.assert_close(found.x0, torch.full_like(found.x0, 2.0), atol=1e-5, rtol=0)
    assert [call[0] for call in policy.calls] == sigma_schedule(7, LENGTH)[:-1].tolist()


def test_a_row_depends_on_its_seed_alone():
    policy = TowardsTarget()
    grpo = GRPOParams(window_size=2)
    many = sample(policy, conditioning(3), [5, 6, 7], 4, window_starts=[0, 1, 0], exploration=grpo)
    alone = sample(policy, conditioning(1), [6], 4, window_starts=[1], exploration=grpo)
    assert torch.equal(many.window.trajectory[1:2], alone.window.trajectory)
    assert torch.equal(many.x0[1:2], alone.x0)


def test_the_window_holds_the_stochastic_steps_and_nothing_else():
    policy = TowardsTarget()
    found = sample(
        policy,
        conditioning(2),
        [1, 2],
        5,
        window_starts=[1, 2],
        exploration=GRPOParams(window_size=2),
    )
    sigmas = sigma_schedule(5, LENGTH)
    window = found.window
    assert torch.equal(window.sigmas, torch.stack([sigmas[1:4], sigmas[2:5]]))
    assert window.trajectory.shape == (2, 3, LENGTH, CHANNELS)
    assert window.log_prob.shape == (2, 2)
    for row in range(2):
        for j in range(2):
            x, x_next = window.trajectory[row, j : j + 1], window.trajectory[row, j + 1 : j + 2]
            sigma, sigma_next = window.sigmas[row, j].item(), window.sigmas[row, j + 1].item()
            velocity = (x - 2.0) / sigma
            step = sde_step(
                velocity, x, sigma, sigma_next, noise_level=0.7, sigma_max=sigmas[1], x_next=x_next
            )
            torch.testing.assert_close(window.log_prob[row, j], step.log_prob[0])
            torch.testing.assert_close(window.mean[row, j], step.mean[0])
            assert (x_next - step.mean).std() == pytest.approx(step.std.item(), rel=0.5)


def test_rows_that_start_from_one_noise_share_their_path_up_to_the_window():
    grpo = GRPOParams(window_size=2)
    found = sample(
        TowardsTarget(),
        conditioning(3),
        [5, 6, 7],
        5,
        starts_from=[9, 9, 8],
        window_starts=[1, 1, 1],
        exploration=grpo,
    )
    begin = found.window.trajectory[:, 0]
    assert torch.equal(begin[0], begin[1])
    assert not torch.equal(begin[0], begin[2])
    assert not torch.equal(found.window.trajectory[0, 1], found.window.trajectory[1, 1])


def test_a_shared_trunk_gives_the_same_bits_in_fewer_rows():
    # The made-up velocity is reckoned for each number, so no sum depends on the batch.
    settings = {
        "starts_from": [9, 9, 9, 8, 8, 7],
        "window_starts": [3, 3, 3, 0, 0, 1],
        "exploration": GRPOParams(window_size=2),
    }
    found, policies = [], [TowardsTarget(), TowardsTarget()]
    for shared, policy in zip((False, True), policies, strict=True):
        found.append(
            sample(policy, conditioning(6), list(range(6)), 7, **settings, shared_trunk=shared)
        )
    assert torch.equal(found[0].x0, found[1].x0)
    for name in ("trajectory", "log_prob", "mean", "sigmas"):
        assert torch.equal(*(getattr(each.window, name) for each in found))
    rows = [[len(call) for call in policy.calls] for policy in policies]
    # Two trunks' first step, the one's other two; windows, whose first step sees three images; what
    # is left of 5, 4 and 2 steps.
    assert rows == [[6] * 7, [2, 1, 1, 3, 6, 2, 3, 3, 6, 6]]
    levels = sigma_schedule(7, LENGTH)
    # As the update sees them.
    assert policies[1].calls[3] == levels[[3, 0, 1]].tolist()
    assert policies[1].calls[4] == levels[[4, 4, 4, 1, 1, 2]].tolist()


def test_rows_of_one_seed_are_one_trunk_only_where_their_windows_are_one():
    assert from_trunks([9, 9, 9], [1, 1, 2], 1, 4) == [
        [([0, 1], 0), ([2], 0)],
        [([2], 1)],
        [([0, 1], 1), ([2], 2)],
        [([0], 2), ([1], 2)],
        [([0], 3), ([1], 3), ([2], 3)],
    ]


@pytest.mark.parametrize("sampler", ["sde", "dance", "cps"])
def test_exploring_moves_the_path_but_ode_steps_after_the_window_bring_it_home(sampler):
    grpo = GRPOParams(window_size=1, sampler=sampler)
    plain = sample(TowardsTarget(), conditioning(1), [1], 4)
    found = sample(TowardsTarget(), conditioning(1), [1], 4, window_starts=[0], exploration=grpo)
    step_without_noise = sample(TowardsTarget(), conditioning(1), [1], 4).x0
    assert torch.equal(plain.x0, step_without_noise)
    torch.testing.assert_close(found.x0, plain.x0, atol=1e-5, rtol=0)
    assert (found.window.trajectory[:, 1] - found.window.mean[:, 0]).abs().max() > 0.1


def test_seeds_differ_by_run_round_case_and_member():
    seeds = {
        sample_seed(run, round, case, member)
        for run in (0, 1)
        for round in (0, 1)
        for case in ("test1-A", "test2-A")
        for member in (0, 1)
    }
    assert len(seeds) == 16
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert sample_seed(0, 0, "test1-A", 0) == 5043918836779147815


def test_fresh_noise_takes_the_place_of_the_old_in_all_steps_but_the_last():
    policy, steps = TowardsTarget(), 5
    found = sample(policy, conditioning(2), [3, 4], steps, exploration=fresh_noise(1.0, steps))
    sigmas = sigma_schedule(steps, LENGTH)
    assert found.window.sigmas[0].tolist() == sigmas[:-1].tolist()
    for b, seed in enumerate((3, 4)):
        stream = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(LENGTH, CHANNELS, generator=stream) for _ in range(steps)]
        for i, noise in enumerate(drawn):  # the first is what sampling starts from
            expected = (1 - sigmas[i]) * 2.0 + sigmas[i] * noise
            torch.testing.assert_close(found.window.trajectory[b, i], expected)
    torch.testing.assert_close(found.x0, torch.full_like(found.x0, 2.0), atol=1e-5, rtol=0)
    forgetful = sample(
        policy,
        conditioning(2),
        [3, 4],
        steps,
        exploration=fresh_noise(1.0, steps),
        keep_window=False,
    )
    assert forgetful.window is None
    assert torch.equal(forgetful.x0, found.x0)
    assert fresh_noise(0.0, steps) is fresh_noise(1.0, 1) is None
