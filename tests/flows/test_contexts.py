from contextlib import contextmanager

import pytest

from flows import contexts as setup
from tasks.params.run_params import RunParams
from tasks.resources.rewards import RewardScorer


@pytest.fixture
def params():
    return RunParams.model_validate({
        "rounds": 1,
        "model": {"base": "tiny"},
        "data": {"train": "x"},
        "rollout": {"num_cases": 2, "num_images_per_prompt": 2},
        "reward": {"vlm_weight": 0},
        "evaluate": {"every": 0},
        "nft": {},
    })  # fmt: skip


class Client:
    def info(self):
        return {"scorers": {"ocr": {"weights": "abc"}}, "limits": {}}


@pytest.fixture
def started(monkeypatch):
    """The runs' folders for which a reward server was started."""
    started = []

    @contextmanager
    def counted(params, folder):
        started.append(folder.name)
        yield ["http://127.0.0.1:9"]
        started.append("stopped")

    monkeypatch.setattr(setup, "reward_urls", counted)
    return started


def test_the_reward_server_of_a_run_starts_when_it_is_needed_and_stops_with_it(
    params, started, tmp_path
):
    with setup.lazy_scorer(params, tmp_path / "one", tmp_path / "data") as scorer:
        assert started == []
        assert scorer.client is scorer.client
        assert started == ["one"]
    assert started == ["one", "stopped"]


def test_what_a_server_scores_with_is_known_without_starting_it_again(params, started, tmp_path):
    note = setup.identity_note(params, tmp_path / "data")
    first = RewardScorer(params.reward, [], None, identity_note=note)
    first.client = Client()
    assert first.identity() == {"scorers": {"ocr": {"weights": "abc"}}}
    with setup.lazy_scorer(params, tmp_path / "two", tmp_path / "data") as scorer:
        assert scorer.identity() == {"scorers": {"ocr": {"weights": "abc"}}}
    assert started == []


def test_another_version_of_an_engine_is_another_note(params, tmp_path, monkeypatch):
    before = setup.identity_note(params, tmp_path)
    monkeypatch.setattr(setup, "version", lambda name: "0")
    assert setup.identity_note(params, tmp_path) != before


def test_servers_that_the_params_name_are_asked_every_time(params, started, tmp_path):
    reward = params.reward.model_copy(update={"server_urls": ["http://127.0.0.1:9"]})
    named = params.model_copy(update={"reward": reward})
    for _ in range(2):
        with setup.lazy_scorer(named, tmp_path / "one", tmp_path / "data") as scorer:
            scorer.client = Client()
            scorer.identity()
    assert not (tmp_path / "data").exists()
