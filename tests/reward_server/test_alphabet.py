"""The bundled recogniser's alphabet, without the engine."""

import string

import pytest

from reward_server.alphabet import bundled_alphabet


@pytest.mark.parametrize("match", ["loose", "exact"])
def test_the_bundled_alphabet_has_all_of_printable_ascii(match):
    printable = string.ascii_letters + string.digits + string.punctuation + " "
    assert bundled_alphabet(match).missing(printable) == []


def test_what_the_bundled_alphabet_lacks_is_named_once_in_order():
    assert bundled_alphabet().missing("Москва 2026 Москва") == list("москва")
    assert bundled_alphabet("exact").missing("Москва") == list("Москва")
    assert bundled_alphabet().missing("Málaga 東京") == []
