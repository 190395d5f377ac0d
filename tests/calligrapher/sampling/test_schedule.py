"""Noise levels: the known numbers of FLUX's shifted schedule."""

import pytest
import torch

from calligrapher.sampling.schedule import sigma_schedule, time_shift_mu, trained_steps


@pytest.mark.parametrize(
    ("tokens", "mu"), [(256, 0.5), (1024, 0.63), (1536, 0.716667), (4096, 1.15)]
)
def test_the_shift_grows_with_the_number_of_tokens(tokens, mu):
    assert time_shift_mu(tokens) == pytest.approx(mu, abs=5e-7)


def test_the_known_ten_sigmas_of_1024_tokens():
    known = [1, 0.94413, 0.8825, 0.81416, 0.73797, 0.65249, 0.5559, 0.44589, 0.31945, 0.17261, 0]
    assert sigma_schedule(10, 1024).tolist() == pytest.approx(known, abs=5.1e-6)


def test_one_shifted_sigma_by_hand():
    # 2 steps, mu 0.5: s = 0.5 -> e^0.5 / (e^0.5 + 1) = 0.622459.
    assert sigma_schedule(2, 256).tolist() == pytest.approx([1, 0.622459, 0], abs=1e-6)


@pytest.mark.parametrize("steps", [1, 3, 28])
def test_a_schedule_falls_from_one_to_zero(steps):
    sigmas = sigma_schedule(steps, 48)
    assert sigmas.dtype == torch.float32
    assert len(sigmas) == steps + 1
    assert (sigmas[0], sigmas[-1]) == (1, 0)
    assert (sigmas.diff() < 0).all()


def test_more_tokens_stay_noisy_for_longer():
    assert (sigma_schedule(8, 4096)[1:-1] > sigma_schedule(8, 256)[1:-1]).all()


def test_a_schedule_without_steps_is_refused():
    with pytest.raises(ValueError, match=r"num_steps must be at least 1\. Got 0"):
        sigma_schedule(0, 256)


@pytest.mark.parametrize(
    ("steps", "fraction", "trained"),
    [(10, 1.0, 10), (10, 0.6, 6), (8, 0.99, 8), (8, 0.01, 1), (1, 0.5, 1)],
)
def test_the_noisiest_part_of_the_schedule_is_trained_and_never_nothing(steps, fraction, trained):
    assert trained_steps(steps, fraction) == trained
