import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from calligrapher.errors import RunLockedError
from tasks.artifacts.run_dir import RunDir

HOLD = """
import sys, time
from tasks.artifacts.run_dir import RunDir

with RunDir(sys.argv[1]).lock():
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    command = [sys.executable, "-c", HOLD, tmp_path / "run"]
    process = subprocess.Popen(
        command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_second_process_is_refused_and_told_who_works_on_the_run(tmp_path, holder):
    with pytest.raises(
        RunLockedError, match=rf"run must be free\. Process {holder.pid} on .* \(since 20.*\)"
    ):
        RunDir(tmp_path / "run").lock().__enter__()


def test_a_killed_process_holds_nothing(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    with RunDir(tmp_path / "run").lock():
        pass


def test_one_process_cannot_take_the_lock_twice_but_can_take_it_again(tmp_path):
    run_dir = RunDir(tmp_path / "run")
    with run_dir.lock(), pytest.raises(RunLockedError, match=f"Process {os.getpid()}"):
        run_dir.lock().__enter__()
    with run_dir.lock():
        pass


def test_two_runs_do_not_hinder_each_other(tmp_path, holder):
    with RunDir(tmp_path / "other").lock():
        pass


def test_a_forked_worker_that_outlives_its_parent_does_not_hold_the_run(tmp_path):
    code = (
        "import os, sys, time; from tasks.artifacts.run_dir import RunDir\n"
        "with RunDir(sys.argv[1]).lock():\n"
        "    pid = os.fork()\n"
        "    if pid == 0: print(os.getpid(), flush=True); time.sleep(30); os._exit(0)\n"
        "    time.sleep(30)\n"
    )
    command = [sys.executable, "-c", code, tmp_path / "run"]
    parent = subprocess.Popen(
        command, cwd=Path(__file__).parents[3], stdout=subprocess.PIPE, text=True
    )
    worker = int(parent.stdout.readline())  # it runs, so it has let go of the lock
    parent.kill()
    parent.wait()
    try:
        with RunDir(tmp_path / "run").lock():
            pass
    finally:
        os.kill(worker, signal.SIGKILL)
        parent.stdout.close()
