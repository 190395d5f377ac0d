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
    def counted(params, folder, size):
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


@pytest.mark.parametrize("siglip", [None, "tiny", "/models/siglip"])
def test_the_runs_own_server_gets_the_models_siglip_where_style_is_weighed(
    params, tmp_path, monkeypatch, siglip
):
    from calligrapher.tiny.pack import DATA
    from reward_server.processes import launch

    flags = []

    @contextmanager
    def local_server(**how):
        flags.extend(how["flags"])
        yield "http://own:1"

    monkeypatch.setattr(launch, "local_server", local_server)
    model = params.model.model_copy(update={"siglip": siglip})
    for weight in (0.0, 0.5):
        reward = params.reward.model_copy(update={"style_weight": weight})
        weighed = params.model_copy(update={"reward": reward, "model": model})
        with setup.reward_urls(weighed, tmp_path / "run") as urls:
            assert urls == ["http://own:1"]
    folder = "/models/siglip" if siglip == "/models/siglip" else DATA / "siglip"
    assert flags == [f"--siglip-path={folder}"]


def test_another_siglip_is_another_note_where_style_is_weighed(params, tmp_path):
    def note(weight, siglip):
        (tmp_path / siglip).mkdir(exist_ok=True)
        (tmp_path / siglip / "config.json").write_text(siglip)
        model = params.model.model_copy(update={"siglip": str(tmp_path / siglip)})
        reward = params.reward.model_copy(update={"style_weight": weight})
        changed = params.model_copy(update={"model": model, "reward": reward})
        return setup.identity_note(changed, tmp_path)

    assert note(0.0, "a") == note(0.0, "b") == setup.identity_note(params, tmp_path)
    assert len({note(0.5, "a"), note(0.5, "b"), note(0.0, "a")}) == 3


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
