"""A run under the user's own launcher: rank 0 is the parent, the others serve it."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from calligrapher.tiny.world import write_bench

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.slow


LAUNCHERS = {
    "torchrun": "torch.distributed.run --standalone --nproc_per_node 2",
    "accelerate": "accelerate.commands.launch --multi_gpu --num_machines 1 --num_processes 2"
    " --mixed_precision no --dynamo_backend no",
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_run_under_a_users_launcher_ends_with_status_0_and_a_summary(
    launcher, random_model, tmp_path
):
    for split, count in (("train", 3), ("evaluation", 2)):
        write_bench(tmp_path / split, num_cases=count, split=split, seed=1)
    settings = [
        f"runs_dir={tmp_path}/runs",
        "run=a",
        "rounds=2",
        f"model.base={random_model}/flux-fill",
        f"model.siglip={random_model}/siglip",
        f"model.initial_adapter={random_model}/calligrapher.bin",
        "model.lora.rank=2",
        f"data.train={tmp_path}/train",
        f"data.evaluation={tmp_path}/evaluation",
        "warmup.steps=1",
        "warmup.batch_size=2",
        "rollout.num_cases=3",
        "rollout.num_images_per_prompt=2",
        "rollout.num_inference_steps=4",
        "rollout.batch_size=1",
        "rollout.shard_size=1",
        "update.batch_size=4",
        "evaluate.every=0",
        "reward.disable_reward_model=true",
        "tracking.enabled=false",
    ]
    command = ["-m", "flows.cli", "train", str(ROOT / "params/tiny-nft.yaml"), *settings]
    done = subprocess.run(
        [sys.executable, "-m", *LAUNCHERS[launcher].split(), *command],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PREFECT_HOME": str(tmp_path / "prefect")},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    assert json.loads((tmp_path / "runs/a/summary.json").read_text())["adapter_digest"]
    update = json.loads((tmp_path / "runs/a/round-0001/update/artifact.json").read_text())
    assert update["code"]["ranks"] == "2", update["code"]
    assert "round-0001/update" in (tmp_path / "runs/a/logs/rank-1.log").read_text()
