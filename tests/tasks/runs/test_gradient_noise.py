"""The cosines to expect between the gradients of two rounds, as scripts/gradient_noise.py has
them."""

import pytest
import torch
from gradient_noise import expected_cosine, group_gradients, level_table, table

from tasks.artifacts.run_dir import RunDir


def test_the_expected_cosine_is_signal_over_signal_and_the_mean_of_the_noise():
    gradients = torch.tensor([[1.0, 1.0], [1.0, -1.0], [1.0, 0.0]])
    # Products of different ones: 0, 1, 1, so |E g|^2 = 2/3; E |g|^2 = 5/3; noise 1, halved by two.
    assert expected_cosine(gradients, 2)[0] == pytest.approx(2 / 3 / (2 / 3 + 1 / 2))
    # Each left out in turn leaves |E g|^2 1, 1, 0 of E |g|^2 3/2, 3/2, 2.
    left = torch.tensor([1 / 1.25, 1 / 1.25, 0.0])
    error = (2 / 3 * (left - left.mean()).square().sum()).sqrt().item()
    assert expected_cosine(gradients, 2)[1] == pytest.approx(error)


def test_the_same_gradient_in_every_group_is_all_signal():
    assert expected_cosine(torch.ones(5, 3), 1) == pytest.approx((1.0, 0.0))


def test_the_expected_cosine_is_what_rounds_show():
    torch.manual_seed(0)
    groups, size, rounds = 12, 50, 300
    rounds_of = 0.2 + torch.randn(rounds, groups, size)
    expected, error = expected_cosine(rounds_of.flatten(0, 1), groups)
    means = rounds_of.mean(1)
    measured = torch.cosine_similarity(means[0::2], means[1::2]).mean().item()
    assert expected == pytest.approx(0.04 / (0.04 + 1 / 12), abs=0.02)
    assert measured == pytest.approx(expected, abs=0.03)
    assert 0 < error < 0.02


def test_pure_noise_is_expected_to_agree_with_nothing():
    torch.manual_seed(0)
    expected, error = expected_cosine(torch.randn(400, 50), 12)
    assert abs(expected) < 3 * error < 0.2


def test_each_groups_gradient_falls_apart_into_the_parts_of_the_adapter(train, make_resources):
    folder, _ = train("a", rounds=1)
    resources = make_resources(rounds=1)
    gradients, _ = group_gradients(resources, RunDir(folder), 0)
    assert {len(gradient) for gradient in gradients.values()} == {3}
    whole, *parts = table(gradients, 3).splitlines()[1:]
    assert [part.split()[1] for part in parts] == ["MLP", "QFormer", "keys", "values"]
    weights = sum(weight.numel() for weight in resources.model.policy.parameters.values())
    assert int(whole.split()[1]) == weights == sum(int(part.split()[2]) for part in parts)
    norms = [float(part.split()[3]) ** 2 for part in parts]
    assert sum(norms) == pytest.approx(float(whole.split()[2]) ** 2, rel=0.02)


@pytest.mark.parametrize(
    ("algorithm", "settings", "shared", "levels"),
    [
        ("grpo", {"window_size": None, "noise": "group", "kl_coef": 0.0}, False, 2),
        ("grpo", {"window_size": None, "noise": "group", "kl_coef": 0.0}, True, 2),
        ("nft", {"num_train_sigmas": None, "noise": "group", "kl_coef": 0.0}, False, 3),
    ],
)
def test_a_groups_gradient_falls_apart_into_its_noise_levels(
    algorithm, settings, shared, levels, train, make_resources
):
    changes = {"rounds": 1, algorithm: settings, "rollout": {"shared_trunk": shared}}
    folder, _ = train("a", algorithm, **changes)
    gradients, at = group_gradients(make_resources(algorithm, **changes), RunDir(folder), 0)
    assert len(at) == levels
    assert list(at) == sorted(at, reverse=True)
    whole = torch.cat(list(gradients.values()), dim=1)
    assert whole.abs().max() > 0
    torch.testing.assert_close(sum(at.values()), whole)
    assert len(level_table(at, 3).splitlines()) == 1 + levels


@pytest.mark.parametrize("algorithm", ["grpo", "nft"])
def test_the_backgrounds_pull_which_all_groups_share_does_not_pass_for_signal(
    algorithm, train, make_resources
):
    found = []
    for name, coef in (("weak", 0.1), ("strong", 10.0)):
        held = {"background_coef": coef, "background_rows": 2, "timestep_fraction": 0.5}
        changes = {"rounds": 1, algorithm: held | {"kl_coef": 0.0}}
        if algorithm == "grpo":
            changes["grpo"]["window_size"] = 1
        folder, _ = train(name, algorithm, **changes)
        gradients, _ = group_gradients(make_resources(algorithm, **changes), RunDir(folder), 0)
        found.append(torch.cat(list(gradients.values()), dim=1))
    assert found[0].abs().max() > 0
    assert torch.equal(*found)
