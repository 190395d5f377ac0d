"""Advantages: against Flow-GRPO, against cases worked by hand, and with images that have no
score."""

import json
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from calligrapher.errors import InputError
from calligrapher.rl.advantage import (
    AdvantageParams,
    group_advantages,
    kept,
    letter_advantages,
    solved,
    standardized_advantages,
    zero_spread,
)

CASES = json.loads((Path(__file__).parents[2] / "golden" / "advantage.json").read_text())
STANDARDIZED = json.loads((Path(__file__).parents[2] / "golden" / "standardized.json").read_text())
NAN = float("nan")


def f64(rows):
    return torch.tensor(rows, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES, ids=["global_std", "group_std"])
def test_advantages_equal_flow_grpo(case):
    found = group_advantages(f64(case["rewards"]), global_std=case["global_std"])
    torch.testing.assert_close(found, f64(case["advantages"]), rtol=1e-9, atol=1e-9)


def test_a_group_worked_by_hand():
    # Group 0: mean 0.5, population std sqrt(0.5 / 3) = 0.408248; group 1: mean 0.2, std 0.081650.
    found = group_advantages(f64([[0.0, 0.5, 1.0], [0.1, 0.2, 0.3]]), global_std=False)
    a, b = 0.5 / (0.408248290 + 1e-4), 0.1 / (0.081649658 + 1e-4)
    torch.testing.assert_close(found, f64([[-a, 0.0, a], [-b, 0.0, b]]), rtol=1e-6, atol=1e-12)


def test_the_global_std_worked_by_hand():
    # All: mean 0.35, squared deviations .1225 .0225 .4225 .0625 .0225 .0025, std sqrt(0.655 / 6) =
    # 0.330404.
    found = group_advantages(f64([[0.0, 0.5, 1.0], [0.1, 0.2, 0.3]]), global_std=True)
    s = 0.330403793 + 1e-4
    torch.testing.assert_close(
        found, f64([[-0.5 / s, 0.0, 0.5 / s], [-0.1 / s, 0.0, 0.1 / s]]), rtol=1e-6, atol=1e-12
    )


def test_the_round_as_baseline_worked_by_hand():
    found = group_advantages(f64([[0.0], [0.5], [1.0]]), global_std=True, baseline="round")
    a = 0.5 / (0.408248290 + 1e-4)
    torch.testing.assert_close(found, f64([[-a], [0.0], [a]]), rtol=1e-6, atol=1e-12)
    assert (
        group_advantages(f64([[0.7, 0.7], [0.7, 0.7]]), global_std=True, baseline="round")
        .eq(0)
        .all()
    )


@pytest.mark.parametrize("global_std", [True, False])
def test_a_group_without_spread_gets_exactly_zero(global_std):
    # 0.1 + 0.2 != 0.3 in floating point: the mean of such a group differs from its members by
    # rounding.
    rewards = f64([[0.1 + 0.2, 0.3, 0.3], [0.2, 0.4, 0.9]])
    found = group_advantages(rewards, global_std=global_std)
    assert found[0].tolist() == [0.0, 0.0, 0.0]
    assert found[1].abs().min() > 0
    assert zero_spread(rewards).tolist() == [True, False]


@pytest.mark.parametrize("global_std", [True, False])
def test_an_image_without_a_score_leaves_the_others_as_if_it_were_not_there(global_std):
    rewards = f64([[0.2, NAN, 0.6, 0.7], [0.1, 0.3, NAN, 0.9]])
    found = group_advantages(rewards, global_std=global_std, valid=rewards.isfinite())
    without = group_advantages(f64([[0.2, 0.6, 0.7], [0.1, 0.3, 0.9]]), global_std=global_std)
    assert found[0, 1] == 0
    assert found[1, 2] == 0
    torch.testing.assert_close(found[rewards.isfinite()], without.flatten())
    assert kept(rewards, rewards.isfinite()).equal(rewards.isfinite())


def test_a_group_with_fewer_than_two_scores_is_not_kept():
    rewards = f64([[NAN, 0.9, NAN], [NAN, NAN, NAN], [0.1, 0.2, 0.3]])
    valid = rewards.isfinite()
    found = group_advantages(rewards, global_std=True, valid=valid)
    assert found[:2].eq(0).all()
    assert found[2].tolist()[0] < 0
    assert kept(rewards, valid).tolist() == [[False] * 3, [False] * 3, [True] * 3]


@pytest.mark.parametrize("valid", [[[False, False]], [[True, False]]])
@pytest.mark.parametrize("baseline", ["group", "round"])
def test_a_round_without_comparisons_is_all_zero(valid, baseline):
    valid = torch.tensor(valid)
    found = group_advantages(f64([[0.3, NAN]]), global_std=True, valid=valid, baseline=baseline)
    assert found.tolist() == [[0.0, 0.0]]
    assert not kept(f64([[0.3, NAN]]), valid, baseline=baseline).any()


def test_a_valid_reward_that_is_no_number_is_refused():
    with pytest.raises(InputError, match=r"Got nan at \[group, member\] \[1, 0\]"):
        group_advantages(f64([[0.1, 0.2], [NAN, 0.3]]), global_std=True)
    with pytest.raises(InputError, match="must be finite"):
        group_advantages(f64([[0.1, float("inf")]]), global_std=False)


def test_groups_and_members_keep_their_places():
    rewards = torch.rand(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = group_advantages(rewards, global_std=False)
    assert torch.equal(group_advantages(rewards[[2, 0, 1]], global_std=False), found[[2, 0, 1]])
    torch.testing.assert_close(found.sum(1), torch.zeros(3, dtype=torch.float64), rtol=0, atol=1e-9)
    assert found.argmax(1).equal(rewards.argmax(1))


def test_float32_rewards_are_computed_in_float64():
    rewards = torch.rand(3, 4, generator=torch.Generator().manual_seed(0))
    found = group_advantages(rewards, global_std=True)
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, group_advantages(rewards.double(), global_std=True))


def test_every_parameter_changes_the_advantages():
    rewards = f64([[0.0, 0.5, 1.0], [0.1, 0.2, 0.3]])
    settings = [
        AdvantageParams(),
        AdvantageParams(global_std=False),
        AdvantageParams(baseline="round"),
    ]
    found = [
        group_advantages(rewards, global_std=p.global_std, baseline=p.baseline) for p in settings
    ]
    assert not found[0].equal(found[1])
    assert not found[0].equal(found[2])


@pytest.mark.parametrize(
    "wrong", [{"baseline": "round", "global_std": False}, {"baseline": "epoch"}, {"clip": 5}]
)
def test_settings_that_mean_nothing_are_refused(wrong):
    with pytest.raises(ValidationError):
        AdvantageParams(**wrong)


def test_rewards_of_another_shape_are_refused():
    with pytest.raises(InputError, match=r"\[groups, members\]"):
        group_advantages(f64([0.1, 0.2]), global_std=True)
    with pytest.raises(InputError, match="shaped like rewards"):
        group_advantages(
            f64([[0.1, 0.2]]), global_std=True, valid=torch.ones(1, 3, dtype=torch.bool)
        )


def test_a_group_without_two_scores_has_no_spread_that_could_be_zero():
    rewards = f64([[0.5, NAN, NAN], [NAN, NAN, NAN], [0.5, NAN, 0.5], [0.5, 0.6, NAN]])
    assert zero_spread(rewards, rewards.isfinite()).tolist() == [False, False, True, False]
    assert zero_spread(f64([[0.5], [0.7]])).tolist() == [False, False]


def test_standardized_components_equal_trl():
    found = standardized_advantages(f64(STANDARDIZED["components"]), f64(STANDARDIZED["weights"]))
    # TRL divides its counts in float32.
    torch.testing.assert_close(found, f64(STANDARDIZED["advantages"]), rtol=1e-7, atol=1e-7)


def test_standardized_components_worked_by_hand():
    # Two members: each component is +-d / (d sqrt(2) + 1e-4) around its mean, whatever its spread.
    wide, narrow = [[0.0, 1.0], [0.2, 0.4]], [[0.03, 0.01], [0.01, 0.03]]
    found = standardized_advantages(f64([wide, narrow]), f64([1.0, 1.0]), global_std=False)

    def a(d):
        return d / (d * 2**0.5 + 1e-4)

    x, y = a(0.5) - a(0.01), a(0.1) + a(0.01)
    torch.testing.assert_close(found, f64([[-x, x], [-y, y]]), rtol=1e-9, atol=1e-12)
    # As a sum the narrow component has no say: here it decides, and alone.
    assert a(0.01) == pytest.approx(a(0.5), rel=0.01)


def test_a_component_without_spread_in_a_group_says_nothing_there():
    other = [[0.1, 0.5, 0.9], [0.3, 0.2, 0.9]]
    flat = [[0.1 + 0.2, 0.3, 0.3], [0.3, 0.3, 0.3]]
    weights = f64([1.0, 5.0])
    both = standardized_advantages(f64([other, flat]), weights)
    alone = standardized_advantages(f64([other]), weights[:1])
    torch.testing.assert_close(both, alone, rtol=1e-12, atol=1e-12)
    nothing = standardized_advantages(f64([flat]), weights[:1])
    assert nothing.eq(0).all()


def test_an_image_that_lacks_a_component_is_left_out_of_all_of_them():
    components = f64([[[0.1, 0.5, 0.9, 0.0], [0.3, 0.2, 0.9, 0.5]]] * 2)
    components[1, 0, 3] = NAN
    valid = ~components.isnan().any(0)
    found = standardized_advantages(components, f64([1.0, 0.5]), valid=valid, global_std=False)
    assert found[0, 3] == 0
    smaller = standardized_advantages(components[:, :1, :3], f64([1.0, 0.5]), global_std=False)
    torch.testing.assert_close(found[:1, :3], smaller, rtol=1e-12, atol=1e-12)
    lonely = torch.tensor([[True, False, False, False], [True, True, True, True]])
    found = standardized_advantages(components.nan_to_num(0.0), f64([1.0, 0.5]), valid=lonely)
    assert found[0].eq(0).all()
    assert found[1].abs().min() > 0


def test_a_group_is_solved_when_it_is_high_and_narrow():
    rewards = f64([[1.9, 1.95], [1.7, 1.7], [1.6, 2.0], [2.0, NAN], [NAN, NAN]])
    found = solved(rewards, 2.0, ~rewards.isnan())
    assert found.tolist() == [True, False, False, True, False]


def test_standardized_advantages_compare_within_groups():
    with pytest.raises(ValidationError, match=r"advantage\.baseline must be 'group'"):
        AdvantageParams(baseline="round", combine="standardized")


LETTERS = [
    f64([[0.9, 0.1], [0.1, 0.9], [0.5, 0.5]]),  # a word of two letters
    f64([[0.2, 0.4, 0.6], [0.4, 0.4, 0.2], [0.9, 0.4, 0.1]]),
]
EVERYBODY = torch.ones(2, 3, dtype=torch.bool)


def test_letters_worked_by_hand():
    # Each column of the first word: mean 0.5, std 0.4 with Bessel's correction, and 0.05 more.
    first, second = letter_advantages(
        LETTERS, 2.0, torch.empty(0, 2, 3), torch.empty(0), global_std=False, valid=EVERYBODY
    )
    a = 2.0 * 0.4 / 0.45
    torch.testing.assert_close(first, f64([[a, -a], [-a, a], [0, 0]]))
    assert second[:, 1].eq(0).all()  # all alike: nothing to learn there
    assert second[:, 0].argsort().tolist() == [0, 1, 2]


def test_what_a_whole_picture_is_worth_is_added_to_each_of_its_letters():
    style, weight = f64([[0.1, 0.5, 0.9], [0.3, 0.3, 0.9]]), torch.tensor([0.5])
    alone = letter_advantages(
        LETTERS, 2.0, torch.empty(0, 2, 3), torch.empty(0), global_std=False, valid=EVERYBODY
    )
    both = letter_advantages(LETTERS, 2.0, style[None], weight, global_std=False, valid=EVERYBODY)
    whole = standardized_advantages(style[None], weight, global_std=False)
    for one, added, own in zip(alone, both, whole, strict=True):
        torch.testing.assert_close(added, one + own[:, None])


def test_letters_of_a_round_add_up_to_nothing_in_each_group_and_have_one_spread():
    style = f64([[0.1, 0.5, 0.9], [0.3, 0.3, 0.9]])
    found = letter_advantages(LETTERS, 1.0, style[None], torch.ones(1), valid=EVERYBODY)
    for one in found:
        torch.testing.assert_close(one.sum(0), torch.zeros(one.shape[1], dtype=torch.float64))
    assert torch.cat([one.flatten() for one in found]).std().item() == pytest.approx(1, abs=1e-3)


def test_images_without_a_score_enter_no_letter():
    valid = torch.tensor([[True, True, False], [True, False, False]])
    damaged = [one.clone() for one in LETTERS]
    damaged[0][2] = NAN
    first, second = letter_advantages(
        damaged, 1.0, torch.empty(0, 2, 3), torch.empty(0), global_std=False, valid=valid
    )
    # mean 0.5, std 0.8 / sqrt(2)
    a = 0.4 / (0.8 / 2**0.5 + 0.05)
    torch.testing.assert_close(first, f64([[a, -a], [-a, a], [0, 0]]))
    assert second.eq(0).all()  # nobody to be compared with


def test_letters_need_components_that_are_compared_within_groups():
    with pytest.raises(ValidationError, match="combine must be 'standardized'"):
        AdvantageParams(per_letter=True)
    assert AdvantageParams(per_letter=True, combine="standardized").per_letter
