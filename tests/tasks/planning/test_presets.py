"""A params file for a machine: commented, whole, and of a size that fits."""

import re

import pytest

from calligrapher.errors import ParamsError
from flows.cli import init
from tasks.params.files import shipped_params
from tasks.params.run_params import load_params
from tasks.planning.gpu_fit import GPUS, needed
from tasks.planning.presets import ALGORITHMS, Machine, write_preset


def keys(text):
    return [line.split(":")[0] for line in text.splitlines() if re.match(r" {0,2}\w+:", line)]


@pytest.mark.parametrize(
    ("machine", "algorithm", "told"),
    [("48", "nft", "40.2 GiB of a GPU's 44.3"), ("8x80", "grpo", "70.1 GiB of a GPU's 79.1")],
)
def test_a_file_fits_its_machine_and_has_every_key_with_a_comment(
    tmp_path, machine, algorithm, told
):
    file = tmp_path / "mine.yaml"
    assert f"it needs {told}" in write_preset(file, machine, algorithm)
    text, shipped = file.read_text(), (shipped_params() / f"{algorithm}.yaml").read_text()
    assert keys(text) == keys(shipped)
    bare = [line for line in text.splitlines() if re.match(r"  \w+:", line) and "#" not in line]
    assert bare == []
    params = load_params(file)
    assert needed(params) <= Machine.named(machine).gib
    assert params.algorithm == algorithm
    assert params.reward.server_urls == []
    if machine == "48":
        assert not params.model.train_adapter
        assert params.model.lora is not None
        assert not params.update.use_8bit_adam
    else:
        assert params.launch.gpu_ids == [0, 1, 2, 3]
        assert params.launch.reward_gpu_ids == [4, 5, 6, 7]
        assert params.reward.vlm_weight == 0.3
    assert f"for {Machine.named(machine).words}." in text.splitlines()[0]
    with pytest.raises(ParamsError, match=r"mine.yaml must not be there yet"):
        write_preset(file, machine, algorithm)


def test_a_gpu_that_holds_the_model_in_no_way_that_is_known_gets_no_file(tmp_path):
    told = r"Got 24, of which a GPU has 23.5 GiB; 40.2 are the least .* Nearest: 8x24 or 48\."
    with pytest.raises(ParamsError, match=told):
        write_preset(tmp_path / "mine.yaml", "24", "nft")
    assert list(tmp_path.iterdir()) == []


def test_an_odd_number_of_large_gpus_has_one_more_that_trains_than_scores(tmp_path):
    write_preset(tmp_path / "mine.yaml", "3x141", "nft")
    launch = load_params(tmp_path / "mine.yaml").launch
    assert (launch.gpu_ids, launch.reward_gpu_ids) == ([0, 1], [2])
    assert launch.allow_fewer_servers
    assert launch.strategy == "ddp"


def test_two_gpus_that_are_each_too_small_share_the_model_out_and_score_on_the_cpu(tmp_path):
    assert "30.8 GiB of a GPU's 39.3" in write_preset(tmp_path / "mine.yaml", "2x40", "nft")
    params = load_params(tmp_path / "mine.yaml")
    assert params.launch.strategy == "fsdp2"
    assert (params.launch.gpu_ids, params.launch.reward_gpu_ids) == ([0, 1], [])
    assert params.reward.vlm_weight == 0


@pytest.mark.parametrize("name", ["7", "0x80", "x8", "80x8", "17x80", "8x", "h100"])
def test_what_is_no_machine_is_refused_with_those_that_there_are(tmp_path, name):
    with pytest.raises(ParamsError, match=rf"one of 24, 40, 48, 80, 141.* Got '{name}'"):
        write_preset(tmp_path / "mine.yaml", name, "nft")


@pytest.mark.slow
def test_eight_small_gpus_share_the_model_out(tmp_path):
    write_preset(tmp_path / "mine.yaml", "8x24", "nft")
    params = load_params(tmp_path / "mine.yaml")
    assert params.launch.strategy == "fsdp2"
    assert needed(params) <= GPUS["4090"]


def test_the_command_offers_machines_and_algorithms_that_there_are():
    assert [str(Machine.named(name)) for name in init.MACHINES] == list(init.MACHINES)
    assert tuple(ALGORITHMS) == init.ALGORITHMS
