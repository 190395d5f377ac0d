"""The benchmarks with a few pictures: they run, and what they show holds already there."""

import json

import pytest

from reward_server.bench.__main__ import main


def run(capsys, *arguments: str) -> dict:
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_accuracy_and_likelihood_order_the_pictures_and_confidence_does_not(capsys):
    found = run(capsys, "heldout", "--count", "40")
    for part in ("accuracy", "likelihood"):
        assert found["right"][part] > found["one_wrong"][part] > found["mirrored"][part]
    assert found["mirrored"]["accuracy"] > found["empty"]["accuracy"]
    assert found["one_wrong"]["confidence"] > 0.95 * found["right"]["confidence"]


@pytest.mark.slow
def test_a_killed_server_costs_no_score(capsys):
    found = run(capsys, "faults", "--count", "200", "--threads", "1")
    assert found["killed_on_the_way"] is True
    assert found["scored"] == found["read_right"] == 200
    assert found["zeros"] == 0


@pytest.mark.slow
def test_throughput_and_soak_give_their_figures(capsys):
    found = run(capsys, "throughput", "--count", "64")
    assert 0 < found["of_bare_loop"] < 1.5
    assert (
        found["single_image_requests"]["64"]["p50_ms"]
        > found["single_image_requests"]["1"]["p50_ms"]
    )
    soaked = run(capsys, "soak", "--count", "200")
    assert soaked["last"]["requests"] == 200
    assert soaked["last"]["threads"] == soaked["first"]["threads"]
