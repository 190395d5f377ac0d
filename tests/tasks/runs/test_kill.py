"""SIGKILL at any moment, then the same command: the result is that of a run that was never
killed."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
STAGES = ("warmup", "rollout", "score", "advantage", "update", "refresh", "evaluate")


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_a_run_that_is_killed_in_every_stage_ends_as_one_that_never_was(algorithm):
    command = [
        sys.executable,
        "tests/scripts/kill_proof.py",
        "--runs=1",
        f"--algorithm={algorithm}",
    ]
    proof = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert proof.returncode == 0, proof.stdout + proof.stderr[-3000:]
    found = json.loads(proof.stdout)
    assert found["kills"] == 16
    assert all(found["hits"][stage] >= 1 for stage in STAGES)
    (run,) = found["runs"]
    assert run.pop("work_folders_left_by_kills") >= 3
    assert run == {
        "algorithm": algorithm,
        "same_digest": True,
        "leftovers": [],
        "twice": [],
        "damaged": [],
    }
