"""Each check of the doctor: right on the embedded model, and the fault that makes it wrong."""

import shutil
import socket
from collections import namedtuple

import psutil
import pytest

from calligrapher.errors import (
    CalligrapherError,
    CheckpointError,
    ParamsError,
    RewardError,
)
from tasks.doctor import checks
from tasks.params.run_params import RunParams

Room = namedtuple("Room", "total used free")


@pytest.fixture
def params(values):
    return RunParams.model_validate(values())


def test_a_check_that_fails_is_a_line_and_what_needs_it_is_not_tried():
    def broken():
        raise OSError("no\nsuch thing")

    asked = [
        checks.Check("a", broken),
        checks.Check("b", lambda: "fine"),
        checks.Check("c", lambda: "unreachable", after=("a",)),
    ]
    assert [finding.line() for finding in checks.examine(asked)] == [
        "FAIL a: OSError: no such thing",
        "ok b: fine",
        "FAIL c: not tried: mend a first.",
    ]


def test_a_package_of_another_version_is_named(monkeypatch):
    checks.versions()
    found = checks.importlib.metadata.version
    monkeypatch.setattr(
        checks.importlib.metadata, "version", lambda n: "1.0" if n == "torch" else found(n)
    )
    with pytest.raises(CalligrapherError, match=r"torch==\S+ \(got 1.0\)"):
        checks.versions()


def test_memory_that_does_not_suffice_is_told(params, monkeypatch):
    assert "2 x cpu" in checks.devices(params, 2)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: namedtuple("M", "available")(1000))
    with pytest.raises(ParamsError, match=r"2 ranks on cpu must have .* fewer ranks"):
        checks.devices(params, 2)


def test_a_weights_file_cut_short_is_named(values, random_model, tmp_path):
    shutil.copytree(random_model, tmp_path / "model")
    given = values(model={"base": str(tmp_path / "model/flux-fill")})
    params = RunParams.model_validate(given)
    assert "style tokens" in checks.weights(params, tmp_path)
    part = next((tmp_path / "model/flux-fill/transformer").glob("*.safetensors"))
    part.write_bytes(part.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=f"{part.name} must be whole"):
        checks.weights(params, tmp_path)


def test_a_dataset_that_is_not_there_is_told(values, tmp_path):
    params = RunParams.model_validate(values(data={"train": str(tmp_path / "nowhere")}))
    with pytest.raises(CalligrapherError, match="nowhere"):
        checks.data(params, tmp_path)


def test_a_disk_without_room_is_told(params, tmp_path, monkeypatch):
    assert "GiB needed" in checks.disk(params, tmp_path / "runs")
    monkeypatch.setattr(shutil, "disk_usage", lambda place: Room(9, 8, 1))
    with pytest.raises(ParamsError, match=r"must have .* GiB free"):
        checks.disk(params, tmp_path / "runs")


def test_a_reward_server_that_is_not_there_is_told(values):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
    params = RunParams.model_validate(values(reward={"server_urls": [url]}))
    with pytest.raises(RewardError, match="must name reward servers that answer"):
        checks.rewards(params, 1)


def test_the_server_of_each_rank_is_looked_for_where_host_and_port_say(values):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    params = RunParams.model_validate(values(reward={"server_port": port, "timeout_s": 1}))
    with pytest.raises(RewardError, match="must name reward servers that answer"):
        checks.rewards(params, 1)
    with socket.create_server(("127.0.0.1", port)):
        taken = values(reward={"server_port": port}, launch={"reward_gpu_ids": [0]})
        with pytest.raises((ParamsError, RewardError), match=r"GPUs of this machine|must be free"):
            checks.rewards(RunParams.model_validate(taken), 1)
    assert "starts its own on a free port" in checks.rewards(RunParams.model_validate(values()), 1)


def test_a_port_is_opened_to_see_that_it_can_be(monkeypatch):
    assert "can be opened" in checks.ports()

    def refused(address):
        raise OSError(98, "Address already in use")

    monkeypatch.setattr(socket, "create_server", refused)
    with pytest.raises(CalligrapherError, match=r"must be free\. Got: Address already in use"):
        checks.ports()
