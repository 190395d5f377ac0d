"""Who started this process, and what is refused before anything is started."""

import pytest
from scripted import Script

from calligrapher.errors import ParamsError, RewardError
from tasks.launch.places import Launched, check_places, visible
from tasks.params.run_params import RunParams

MEETING = {"MASTER_ADDR": "node-1", "MASTER_PORT": "29500"}
TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"} | MEETING
SRUN = {"SLURM_PROCID": "5", "SLURM_NTASKS": "8", "SLURM_LOCALID": "2", "SLURM_STEP_NODELIST": "n"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, None),
        (TORCHRUN, (3, 4, 1)),
        (SRUN | MEETING, (5, 8, 2)),
        (TORCHRUN | {"WORLD_SIZE": "1", "RANK": "0"}, None),
        ({k: v for k, v in SRUN.items() if k != "SLURM_STEP_NODELIST"}, None),  # the batch script
    ],
)
def test_the_launcher_of_the_user_is_told_by_the_environment(environment, expected):
    launched = Launched.from_environment(environment)
    told = launched and (launched.rank, launched.size, launched.local_rank)
    assert told == expected


@pytest.mark.parametrize("meeting", [{}, {"MASTER_ADDR": "a"}, MEETING | {"MASTER_PORT": "0"}])
def test_ranks_without_a_meeting_place_are_told_how_to_name_one(meeting):
    with pytest.raises(ParamsError, match="MASTER_ADDR and MASTER_PORT must say where"):
        Launched.from_environment(SRUN | meeting)


def test_gpus_count_what_this_process_sees():
    assert visible([0, 2], {}) == "0,2"
    assert visible([0, 2], {"CUDA_VISIBLE_DEVICES": "5,6,7"}) == "5,7"


@pytest.fixture
def check(values):
    def check(launched=None, **sections):
        check_places(RunParams.model_validate(values("nft", **sections)), launched)

    return check


def test_ranks_are_chosen_by_one_launcher_alone(check):
    launched = Launched(0, 2, 0, "127.0.0.1", 29500)
    with pytest.raises(ParamsError, match="must be left out under a launcher of your own"):
        check(launched, launch={"num_processes": 2})


def test_a_gpu_that_is_not_there_is_refused(check, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(ParamsError, match=r"gpu_ids must name GPUs .* Got 7; there are: 0, 1\."):
        check(launch={"gpu_ids": [1, 7]})
    with pytest.raises(ParamsError, match=r"at most the number of GPUs, 2: .* Got 3\."):
        check(launch={"num_processes": 3}, model={"device": "auto"})


def test_every_port_must_be_a_reward_server_s(check):
    servers = [Script(), Script()]
    try:
        ranks = {"num_processes": 2}
        urls = [server.url for server in servers]
        check(launch=ranks, reward={"server_urls": urls})
        servers[1].info = {"hello": "world"}
        with pytest.raises(RewardError, match=r"whose /info holds \['hello'\] and no scorers"):
            check(launch=ranks, reward={"server_urls": urls})
        with pytest.raises(RewardError, match=r"Nothing listens at http://127\.0\.0\.1:9"):
            check(launch=ranks, reward={"server_urls": [urls[0], "http://127.0.0.1:9"]})
        port = servers[0].server.server_port
        check(reward={"server_port": port})
        servers[0].info_status = 404
        with pytest.raises(RewardError) as caught:
            check(reward={"server_port": port})
        assert "reward.server_host and reward.server_port" in caught.value.__notes__[0]
    finally:
        for server in servers:
            server.close()


def test_a_taken_port_of_a_server_to_be_started_is_refused(check, monkeypatch):
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    server = Script()
    try:
        with pytest.raises(RewardError, match="must be free for the reward server of GPU 1"):
            check(launch={"reward_gpu_ids": [1]}, reward={"server_port": server.server.server_port})
    finally:
        server.close()
