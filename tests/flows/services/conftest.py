"""Tests here change the environment's proxies."""

import urllib.request

import pytest


@pytest.fixture(autouse=True)
def urlopen_without_memory():
    """`urlopen` reads the proxies at its first call and keeps them: let it read them anew."""
    urllib.request.install_opener(None)
    yield
    urllib.request.install_opener(None)
