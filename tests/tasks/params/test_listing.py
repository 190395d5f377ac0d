"""What the params files may hold, told key by key."""

import pytest

from calligrapher.errors import ParamsError
from tasks.params.errors import valid_keys
from tasks.params.listing import find_keys
from tasks.params.run_params import RunParams


def test_every_key_has_a_meaning_and_says_what_it_may_be():
    keys = find_keys()
    assert [k.name for k in keys] == [k for k, s in valid_keys(RunParams).items() if s is None]
    assert [key.name for key in keys if not (key.meaning and key.values)] == []


@pytest.mark.parametrize(
    ("name", "default", "values"),
    [
        ("rounds", None, "whole number, at least 1"),
        ("nft.nft_beta", "0.5", "number, more than 0, at most 1"),
        ("nft.num_train_sigmas", "null", "whole number or null, at least 1"),
        ("nft.noise", "row", "row | group"),
        ("model.offload_text_encoder_two", "false", "true or false"),
        ("update.betas", "[0.9, 0.999]", "list of number, at least 0, less than 1"),
        ("reward.server_urls", "[]", "list of text"),
        ("reward.max_unscored_share", "0.1", "number, at least 0, at most 1"),
    ],
)
def test_a_key_is_told_as_it_is_checked(name, default, values):
    (key,) = find_keys(name)
    assert (key.default, key.values) == (default, values)
    assert key.text().startswith(f"{name}  ({values}; ")


def test_a_section_is_all_of_its_keys_and_no_other():
    assert {key.name.split(".")[0] for key in find_keys("reward")} == {"reward"}
    assert [key.name for key in find_keys("model.lora")] == [
        f"model.lora.{name}" for name in ("rank", "alpha", "targets", "adapter_targets")
    ]
    with pytest.raises(ParamsError, match=r"'ro' must be a key or a section"):
        find_keys("ro")


def test_a_slip_is_answered_with_the_nearest_key():
    with pytest.raises(ParamsError, match=r"Nearest: nft\.nft_beta\."):
        find_keys("nft.nft_bet")
