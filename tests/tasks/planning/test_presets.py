"""A params file for a machine: commented, whole, and of a size that fits."""

import re

import pytest

from calligrapher.errors import ParamsError
from flows.cli import init
from tasks.params.files import shipped_params
from tasks.params.run_params import load_params
from tasks.planning.gpu_fit import GPUS, needed
from tasks.planning.presets import ALGORITHMS, MACHINES, write_preset


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
    assert needed(params) <= GPUS[MACHINES[machine].gpu]
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
    assert f"for {MACHINES[machine].words}." in text.splitlines()[0]
    with pytest.raises(ParamsError, match=r"mine.yaml must not be there yet"):
        write_preset(file, machine, algorithm)


def test_a_gpu_that_holds_the_model_in_no_way_that_is_known_gets_no_file(tmp_path):
    with pytest.raises(ParamsError, match=r"of which a GPU has 23.5 GiB; 40.2 are the least"):
        write_preset(tmp_path / "mine.yaml", "24", "nft")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_eight_small_gpus_share_the_model_out(tmp_path):
    write_preset(tmp_path / "mine.yaml", "8x24", "nft")
    params = load_params(tmp_path / "mine.yaml")
    assert params.launch.strategy == "fsdp2"
    assert needed(params) <= GPUS["4090"]


def test_the_command_offers_the_machines_and_algorithms_that_there_are():
    assert tuple(MACHINES) == init.MACHINES
    assert tuple(ALGORITHMS) == init.ALGORITHMS
