import json
import os
import sys

import psutil
import pytest

from calligrapher.errors import CalligrapherError
from flows.services import servers as services
from flows.services.daemons import Daemons

PARENT = """
import subprocess, sys, time
subprocess.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
time.sleep(99)
"""


@pytest.fixture
def daemons(tmp_path):
    daemons = Daemons(tmp_path, os.environ)
    yield daemons
    daemons.stop_all()


def pid(daemons, name):
    return json.loads((daemons.folder / f"{name}.json").read_bytes())["pid"]


def test_what_was_started_is_stopped_with_its_children_and_nothing_else(daemons):
    bystander = psutil.Popen([sys.executable, "-c", "import time; time.sleep(99)"])
    daemons.start("one", [sys.executable, "-c", PARENT])
    daemons.start("two", [sys.executable, "-c", PARENT])
    parents = [psutil.Process(pid(daemons, name)) for name in ("one", "two")]
    while not all(parent.children() for parent in parents):
        pass
    family = parents + [child for parent in parents for child in parent.children()]
    assert daemons.stop_all() == ["two", "one"]
    _, alive = psutil.wait_procs(family, timeout=30)
    assert alive == []
    assert bystander.is_running()
    bystander.kill()
    bystander.wait()


def test_starting_again_leaves_the_running_one(daemons):
    daemons.start("one", [sys.executable, "-c", PARENT])
    first = pid(daemons, "one")
    daemons.start("one", [sys.executable, "-c", PARENT])
    assert pid(daemons, "one") == first


def test_a_process_that_got_an_old_pid_is_not_ours(daemons):
    (daemons.folder / "one.json").write_text(json.dumps({"pid": os.getpid(), "born": 1.0}))
    assert not daemons.running("one")
    assert daemons.stop_all() == []


def test_a_settings_file_of_someone_else_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "prefect.toml").write_text("[api]\nurl = 'http://elsewhere/api'\n")
    with pytest.raises(CalligrapherError, match="must not be there"):
        services.start(tmp_path / "runs", 1, 2)
    assert services.stop(tmp_path / "runs") == ["nothing was running"]
    assert "elsewhere" in (tmp_path / "prefect.toml").read_text()
