"""The real command with real servers: it finishes, and however it is stopped, it leaves nothing
running."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

ROOT = Path(__file__).parents[2]
PATIENCE_S = 600.0  # for a busy machine; idle, each step takes a few seconds


@pytest.fixture
def train(random_model, tmp_path):
    """Start the command; further settings win."""
    from calligrapher.tiny.world import write_bench

    write_bench(tmp_path / "train", num_cases=3, split="train", seed=1)
    write_bench(tmp_path / "evaluation", num_cases=2, split="evaluation", seed=1)
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
        "warmup.steps=2",
        "warmup.batch_size=2",
        "rollout.num_cases=3",
        "rollout.num_images_per_prompt=3",
        "rollout.num_inference_steps=4",
        "rollout.batch_size=1",
        "rollout.shard_size=1",
        "update.batch_size=4",
        "evaluate.every=1",
        "evaluate.num_cases=2",
        "evaluate.grid_cases=2",
    ]
    started = []

    def train(*more):
        command = [
            Path(sys.executable).with_name("calligrapher"),
            "train",
            ROOT / "params/tiny-nft.yaml",
        ]
        log = (tmp_path / "log.txt").open("ab")
        environment = os.environ | {
            "OMP_NUM_THREADS": "1",
            "PREFECT_HOME": str(tmp_path / "prefect"),
        }
        process = subprocess.Popen(
            [*command, *settings, *more],
            cwd=tmp_path,
            env=environment,
            stdout=log,
            stderr=log,
            # what a shell starts in the background ignores SIGINT, and so do its children
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        started.append(process)
        return process

    yield train
    for process in started:
        process.kill()
        process.wait()


def wait_for(condition, process=None):
    stop_at = time.monotonic() + PATIENCE_S
    while not condition():
        assert process is None or process.poll() is None, "the command ended early"
        assert time.monotonic() < stop_at
        time.sleep(0.02)


def family(process):
    """The command's descendants and the ports that they listen on."""
    children = psutil.Process(process.pid).children(recursive=True)
    connections = [c for child in children for c in child.net_connections("tcp")]
    return children, {c.laddr.port for c in connections if c.status == psutil.CONN_LISTEN}


def assert_nothing_left(children, ports):
    assert len(children) >= 2  # the reward server and Prefect's API
    assert ports
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []
    for port in ports:
        socket.create_server(("127.0.0.1", port)).close()


@pytest.mark.slow
def test_a_run_that_is_stopped_in_every_way_leaves_nothing_running_and_then_finishes(
    train, tmp_path
):
    partial = tmp_path / "runs/a/round-0000/rollout.partial"
    statuses = {}
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        before = len(list(partial.glob("shard-*")))
        process = train()
        wait_for(lambda before=before: len(list(partial.glob("shard-*"))) > before, process)
        # The reward server starts with the first shard.
        wait_for(lambda process=process: len(family(process)[0]) >= 2, process)
        children, ports = family(process)
        process.send_signal(number)
        wait_for(lambda process=process: process.poll() is not None)
        statuses[number] = process.returncode
        assert_nothing_left(children, ports)
    assert statuses[signal.SIGKILL] == -signal.SIGKILL
    assert statuses[signal.SIGTERM] in (-signal.SIGTERM, 128 + signal.SIGTERM)
    assert statuses[signal.SIGINT] == 130

    process = train()
    wait_for((tmp_path / "runs/a/round-0001/refresh").exists, process)
    children, ports = family(process)
    assert process.wait(PATIENCE_S) == 0, (tmp_path / "log.txt").read_text()[-3000:]
    assert_nothing_left(children, ports)
    summary = json.loads((tmp_path / "runs/a/summary.json").read_text())
    assert (summary["run"], summary["algorithm"], summary["rounds"], summary["images"]) == (
        "a",
        "nft",
        2,
        18,
    )
    assert len(summary["adapter_digest"]) == 64
    assert 0 <= summary["ocr_accuracy_after"]["low"] <= summary["ocr_accuracy_after"]["high"] <= 1
    assert list((tmp_path / "runs").rglob("*.partial")) == []
    pictures = {path.name for path in (tmp_path / "runs/a/report").iterdir()}
    assert {"before_after.png", "learning_curve.png", "grid"} <= pictures
