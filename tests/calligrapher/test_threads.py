"""How threads wait, and what is noted of the machine."""

import os
import subprocess
import sys

import torch

from calligrapher.threads import machine, wait_asleep


def test_what_the_user_says_of_waiting_threads_stays(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_asleep()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"
    monkeypatch.delenv("OMP_WAIT_POLICY")
    wait_asleep()
    assert os.environ["OMP_WAIT_POLICY"] == "PASSIVE"


def test_the_command_lets_threads_sleep_before_torch_is_there():
    code = (
        "import os, sys\nfrom flows.cli.main import main\n"
        "assert 'torch' not in sys.modules\n"
        "try:\n    main(['--version'])\nexcept SystemExit:\n    pass\n"
        "print(os.environ['OMP_WAIT_POLICY'])"
    )
    environment = {k: v for k, v in os.environ.items() if k != "OMP_WAIT_POLICY"}
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment
    )
    assert process.stdout.splitlines()[-1:] == ["PASSIVE"], process.stderr


def test_the_machine_is_its_threads_and_its_processor():
    assert machine()["threads"] == str(torch.get_num_threads())
    assert torch.backends.cpu.get_cpu_capability() in machine()["cpu"]
    assert len(machine()["cpu"]) > 10
