"""What one run costs the others, and which runs are evaluated at all."""

from contextlib import contextmanager
from pathlib import Path

import pytest

from calligrapher.errors import CalligrapherError
from flows.contexts import reward_urls
from flows.evaluate import each, evaluate, with_servers_beside_a_training
from tasks.artifacts.layout import MANIFEST, PARAMS
from tasks.params.run_params import RunParams


def test_a_run_that_cannot_be_evaluated_does_not_keep_the_others_from_it(caplog):
    def work(folder):
        if folder.name == "b":
            raise TypeError("no held-out data")
        return {"run": folder.name}

    results, failures = each([Path("a"), Path("b"), Path("c")], work)
    assert results == [{"run": "a"}, {"run": "c"}]
    assert failures == ["b: no held-out data"]
    assert "b cannot be evaluated" in caplog.text


def test_a_run_without_a_checkpoint_is_left_out():
    assert each([Path("a"), Path("b")], lambda folder: None) == ([], [])


def test_a_folder_that_is_no_round_costs_only_its_own_run(tmp_path):
    update = tmp_path / "a" / "round-copy" / "update"
    update.mkdir(parents=True)
    (update / MANIFEST).touch()
    for name in ("a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / PARAMS).touch()
    with pytest.raises(CalligrapherError, match=r"No run could be evaluated: a: .*'copy'"):
        evaluate.fn(runs_dir=str(tmp_path))


def params_with(launch, **reward):
    return RunParams.model_validate({
        "rounds": 1,
        "model": {"base": "tiny"},
        "data": {"train": "x"},
        "rollout": {"num_cases": 2, "num_images_per_prompt": 2},
        "reward": {"vlm_weight": 0, **reward},
        "evaluate": {"every": 0},
        "launch": launch,
        "nft": {},
    })  # fmt: skip


def test_an_evaluation_leaves_gpus_and_ports_of_the_runs_servers_to_its_training(
    monkeypatch, tmp_path
):
    from reward_server.processes import launch

    @contextmanager
    def own(**given):
        yield "http://127.0.0.1:18000"

    def on_gpus(*given, **named):
        raise AssertionError("the training's GPUs and ports must be left alone")

    monkeypatch.setattr(launch, "local_server", own)
    monkeypatch.setattr(launch, "local_fleet", on_gpus)
    training = params_with({"gpu_ids": [0, 1], "reward_gpu_ids": [2, 3]}, server_port=8000)
    with pytest.raises(AssertionError, match="left alone"), reward_urls(training, tmp_path, 2):
        pass
    with reward_urls(with_servers_beside_a_training(training), tmp_path) as urls:
        assert urls == ["http://127.0.0.1:18000"]


def test_an_evaluation_asks_the_servers_that_run_without_the_run():
    there = params_with({"gpu_ids": [0, 1]}, server_port=8100)
    assert with_servers_beside_a_training(there) is there
