"""Two policies, one in the noisy steps and one in the clean ones."""

from contextlib import contextmanager

import pytest
import torch
from drift_by_step import mixed


class Told:
    """A policy whose velocity is the name of the weights in use."""

    used = "trained"

    @contextmanager
    def use(self, weights):
        before, self.used = self.used, weights
        yield
        self.used = before

    def velocity(self, x, sigma):
        return self.used


def test_the_last_noisy_level_is_the_ones_and_all_cleaner_ones_are_the_others():
    policy = Told()
    with mixed(policy, "noisy", "clean", 0.75):
        levels = (1.0, 0.75 - 1e-7, 0.74, 0.0)
        found = [policy.velocity(None, torch.full((3,), level)) for level in levels]
    assert found == ["noisy", "noisy", "clean", "clean"]


def test_the_policy_is_itself_again_also_after_an_error():
    policy = Told()
    with pytest.raises(ZeroDivisionError), mixed(policy, "noisy", "clean", 0.5):
        _ = 1 / 0
    assert policy.velocity(None, torch.ones(1)) == "trained"
