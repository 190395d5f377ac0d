import pytest

from calligrapher.rl.awm import AWMParams
from calligrapher.rl.grpo import GRPOParams
from calligrapher.rl.kl import adapted
from calligrapher.rl.nft import NFTParams


@pytest.mark.parametrize(
    ("kl", "factor"),
    [(0.04, 1.0), (0.044, 1.01), (0.036, 0.99), (0.048, 1.02), (4.0, 1.02), (0.0, 0.98)],
)
def test_the_weight_moves_by_a_tenth_of_the_error_and_by_two_percent_at_most(kl, factor):
    assert adapted(0.5, kl, 0.04) == pytest.approx(0.5 * factor, rel=1e-12)


@pytest.mark.parametrize("section", [GRPOParams, NFTParams, AWMParams])
def test_every_algorithm_steers_from_its_kl_coef_on(section):
    constant, steered = section(kl_coef=0.5), section(kl_coef=0.5, kl_target=0.04)
    assert constant.kl_coef_of_round(0.7, 0.1) is None
    assert steered.kl_coef_of_round(None, 0.1) == 0.5
    assert steered.kl_coef_of_round(0.7, 0.038) == pytest.approx(0.7 * 0.995)
    assert steered.kl_coef_of_round(0.7, None) == 0.7, "no step was taken"
    with pytest.raises(ValueError, match="kl_coef must be greater than 0 with a kl_target"):
        section(kl_coef=0.0, kl_target=0.04)
