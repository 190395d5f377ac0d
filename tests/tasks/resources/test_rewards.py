"""Rewards: which components are weighed, how they add up, and whom the servers are asked for."""

from reward_server.components import NAMES, WEIGHT_OF
from tasks.params.run_params import RewardParams
from tasks.resources.rewards import reward_of


def test_every_weight_of_the_params_has_its_component():
    keys = {name for name in RewardParams.model_fields if name.endswith("_weight")}
    assert set(WEIGHT_OF.values()) == keys


def test_a_reward_is_the_weighted_sum_of_what_counts():
    params = RewardParams(ocr_weight=0.5, likelihood_weight=0, vlm_weight=0.25, style_weight=2)
    row = dict.fromkeys(NAMES) | {"ocr_accuracy": 0.5, "vlm_score": 1.0, "style_score": -0.25}
    assert params.weights == {"ocr_accuracy": 0.5, "vlm_score": 0.25, "style_score": 2}
    assert reward_of(params, row, {}) == {"reward": 0.25 + 0.25 - 0.5, "reason": None}
    missing = reward_of(params, row | {"vlm_score": None}, {"vlm_score": "it slept"})
    assert missing == {"reward": None, "reason": "vlm_score: it slept"}
