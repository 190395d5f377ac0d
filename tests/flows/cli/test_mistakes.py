"""A user's mistake is exit status 2 and one message, before anything is started."""

import shutil
from contextlib import contextmanager

import pytest
import yaml
from PIL import Image

from flows.cli.main import main
from flows.services import prefect_api
from reward_server.processes import launch


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    from calligrapher.tiny.world import write_bench

    folder = tmp_path_factory.mktemp("drawn")
    write_bench(folder / "train", num_cases=4, split="train", seed=1)
    return folder / "train"


@pytest.fixture
def nothing_starts(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("nothing may be started before the mistakes are told")

    monkeypatch.setattr(prefect_api, "prefect_api", refuse)
    monkeypatch.setattr(launch, "local_server", refuse)


@pytest.fixture
def train(random_model, drawn, tmp_path, nothing_starts, capsys):
    """`train("a.b=1", section={...})` -> (exit status, words); its cases lie in `train.cases`."""
    cases = tmp_path / "cases"
    shutil.copytree(drawn, cases)

    def train(*settings, **sections):
        values = {
            "rounds": 1,
            "model": {
                "base": str(random_model / "flux-fill"),
                "siglip": str(random_model / "siglip"),
                "initial_adapter": str(random_model / "calligrapher.bin"),
                "width": 96,
                "height": 32,
                "max_sequence_length": 24,
            },
            "data": {"train": str(cases)},
            "rollout": {"num_cases": 2, "num_images_per_prompt": 2},
            "reward": {"vlm_weight": 0},
            "evaluate": {"every": 0},
            "nft": {},
        } | sections
        (tmp_path / "params.yaml").write_text(yaml.safe_dump(values))
        status = main(
            ["train", str(tmp_path / "params.yaml"), f"runs_dir={tmp_path}/runs", *settings]
        )
        said = capsys.readouterr().err
        assert "Traceback" not in said
        assert not (tmp_path / "runs" / "params").exists()
        return status, said

    train.cases = cases
    return train


SETTINGS = {
    "a missing folder of cases": (
        ["data.train=/nowhere/cases"],
        ["/nowhere/cases", "bench folder"],
    ),
    "a missing model": (["model.base=/nowhere/flux"], ["model.base", "/nowhere/flux"]),
    "a missing SigLIP": (["model.siglip=/nowhere/siglip"], ["model.siglip", "/nowhere/siglip"]),
    "a missing adapter": (
        ["model.initial_adapter=/nowhere.bin"],
        ["model.initial_adapter", "/nowhere.bin"],
    ),
    "a width that the VAE cannot have": (["model.width=50"], ["model.width", "Got 50", "48, 56"]),
    "a height that the VAE cannot have": (["model.height=33"], ["model.height", "Got 33"]),
    "an unknown key": (["nft.nft_betta=1"], ["nft.nft_betta", "nft.nft_beta"]),
    "an old flag": (["train_batch_size=4"], ["train_batch_size", "update.batch_size"]),
    "a setting without a value": (["rounds"], ["KEY=VALUE", "'rounds'"]),
    "a VLM's weight without a VLM": (
        ["reward.vlm_weight=0.3"],
        ["reward.vlm_weight", "Got 0.3", "VLM"],
    ),
    "groups of one": (
        ["rollout.num_images_per_prompt=1"],
        ["num_images_per_prompt", "every advantage"],
    ),
    "more cases than there are": (["rollout.num_cases=5"], ["rollout.num_cases", "5 for 4 cases"]),
    "too long a text": (
        ["model.max_sequence_length=18"],
        ["cases", "model.max_sequence_length", "test1-"],
    ),
    "a device of another machine": (["model.device=cuda:99"], ["model.device", "cuda:99"]),
    "no file of params for held-out cases": (
        ["evaluate.every=1"],
        ["data.evaluation", "evaluate.every"],
    ),
    "a name that is empty, as an unset variable of the shell": (["run="], ["run must", "Got ''"]),
    "a name that leads elsewhere": (["run=../x"], ["run must be a name", "../x"]),
    "a name of what all runs share": (["run=data"], ["run must be a name", "'data'"]),
    "a layer for LoRA that the transformer has not": (
        ["model.lora.targets=[to_q, to_x]"],
        ["model.lora", "FluxTransformer2DModel", "Got to_x", "to_out.0"],
    ),
    "a layer for LoRA that the adapter has not": (
        ["model.lora.adapter_targets=[to_q]"],
        ["model.lora", "StyleAdapter", "Got to_q", "to_k_ip"],
    ),
    "a seed that no generator takes": (
        ["seed=99999999999999999999999"],
        ["seed must be less than 9223372036854775808. Got 99999999999999999999999."],
    ),
    "a word in place of a number": (["rounds=true"], ["rounds must be a whole number. Got 'true'"]),
    "a store that MLflow has not": (
        ["tracking.uri=foo://user:secret@bar"],
        ["tracking.uri must be", "sqlite", "Got foo://, which"],
    ),
    "both algorithms": (["grpo={}"], ["Got nft and grpo"]),
}


@pytest.mark.parametrize("mistake", SETTINGS)
def test_a_wrong_setting_is_told(train, mistake):
    settings, words = SETTINGS[mistake]
    status, said = train(*settings)
    assert status == 2
    for word in words:
        assert word in said
    assert len(said.strip().splitlines()) <= 6  # a list of texts may have a line for each


def test_an_unknown_key_in_the_file_is_told_with_the_file(train, tmp_path):
    status, said = train(nft={"nft_betta": 1.0})
    assert status == 2
    assert "nft.nft_betta" in said
    assert str(tmp_path / "params.yaml") in said


def test_a_missing_file_of_params_is_told(nothing_starts, capsys):
    assert main(["train", "/nowhere/params.yaml"]) == 2
    assert "/nowhere/params.yaml" in capsys.readouterr().err


def test_a_malformed_line_of_the_list_is_told_with_its_number(train):
    listing = train.cases / "self_bench.txt"
    listing.write_text(listing.read_text().replace("2-", "two-", 1))
    status, said = train()
    assert status == 2
    assert str(listing) in said
    assert "line 2" in said
    assert "must read N-text" in said


def test_a_mask_of_another_size_is_told(train):
    Image.new("L", (40, 32), 255).save(train.cases / "test3_mask.png")
    status, said = train()
    assert status == 2
    assert "test3_mask.png must be as large as its source, 96x32. Found 40x32." in said


def test_a_missing_picture_is_told(train):
    (train.cases / "test4_ref.png").unlink()
    status, said = train()
    assert status == 2
    assert "test4_ref.png" in said


def test_all_broken_samples_are_told_at_once(train):
    for number in (1, 2):
        (train.cases / f"test{number}_source.png").write_bytes(b"no picture")
    status, said = train()
    assert status == 2
    assert "test1_source.png" in said
    assert "test2_source.png" in said


def test_8_bit_adam_without_its_package_is_told(train):
    status, said = train("update.use_8bit_adam=true")
    assert status == 2
    assert "update.use_8bit_adam" in said


def test_what_cannot_start_is_told_and_not_a_traceback(train, monkeypatch):
    from calligrapher.errors import CalligrapherError

    def broken():
        raise CalligrapherError("Prefect's API must start.")

    monkeypatch.setattr(prefect_api, "prefect_api", broken)
    assert train() == (2, "CalligrapherError: Prefect's API must start.\n")


def test_ctrl_c_is_told_how_to_go_on(train, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr(prefect_api, "prefect_api", interrupted)
    status, said = train()
    assert status == 130
    assert "same command goes on" in said


def test_a_reward_server_that_does_not_start_is_a_reward_error(tmp_path, monkeypatch):
    from calligrapher.errors import RewardError
    from flows.contexts import reward_urls
    from tasks.params.run_params import RunParams

    @contextmanager
    def broken(**how):
        raise launch.ServerStartError("the reward server on port 1 ended with status 1.")
        yield

    monkeypatch.setattr(launch, "local_server", broken)
    params = RunParams.model_validate(
        {
            "rounds": 1,
            "model": {"base": "tiny"},
            "data": {"train": "x"},
            "rollout": {"num_cases": 2, "num_images_per_prompt": 2},
            "reward": {"vlm_weight": 0},
            "evaluate": {"every": 0},
            "nft": {},
        }
    )
    with pytest.raises(RewardError, match="port 1 ended"), reward_urls(params, tmp_path):
        pass
