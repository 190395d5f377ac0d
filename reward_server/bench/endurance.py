"""A server over many requests: memory, threads, descriptors; and what a killed one loses."""

import os
import random
import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path

from reward_server.bench.pictures import items, pid_of
from reward_server.client import RewardClient
from reward_server.processes.process import LOCAL_PORTS, ServerProcess, local_server

_CLIENTS = 8


def soak(count: int, threads: int) -> dict:
    """Return MiB, threads and descriptors of a server after the first, middle and last step."""
    sent = items(64)
    step = max(count // 20, 1)
    samples: list[dict] = []
    with local_server(ocr_threads=threads, flags=["--answer-cache=0"]) as url:
        pid = pid_of(url)
        with (
            ThreadPoolExecutor(_CLIENTS) as pool,
            RewardClient([url], chunk_size=1, concurrency=_CLIENTS) as client,
        ):
            started = time.perf_counter()
            for done in range(step, count + 1, step):
                results = pool.map(
                    lambda place: client.score_batch([sent[place % 64]])[0], range(step)
                )
                assert all(result.ocr_accuracy is not None for result in results)
                samples.append({"requests": done, **_resources(pid)})
            seconds = time.perf_counter() - started
    return {
        "seconds": seconds,
        "first": samples[0],
        "middle": samples[len(samples) // 2],
        "last": samples[-1],
    }


def faults(count: int, threads: int) -> dict:
    """Three servers score for a client; its own one is killed on the way."""
    sent = items(count)
    flags = [f"--ocr-threads={threads}", "--answer-cache=0"]
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        servers = []
        for port in random.SystemRandom().sample(LOCAL_PORTS, 3):
            servers.append(ServerProcess(flags, port=port, log_path=Path(folder) / f"{port}.log"))
            stack.callback(servers[-1].stop)
        for server in servers:
            server.wait_healthy()
        client = stack.enter_context(
            RewardClient([server.url for server in servers], chunk_size=4, concurrency=4)
        )
        client.score_batch(sent[:4])
        killer = threading.Timer(0.5, os.kill, (servers[0].pid, signal.SIGKILL))
        killer.start()
        started = time.perf_counter()
        results = client.score_batch(sent)
        seconds = time.perf_counter() - started
        killer.cancel()
        accuracies = [result.ocr_accuracy for result in results]
        return {
            "images": count,
            "seconds": seconds,
            "killed_on_the_way": servers[0].exit_status() is not None,
            "scored": sum(accuracy is not None for accuracy in accuracies),
            "read_right": sum(
                result.ocr_text == item.text for result, item in zip(results, sent, strict=True)
            ),
            "zeros": accuracies.count(0.0),
        }


def _resources(pid: int) -> dict[str, int]:
    status = dict(
        line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines()
    )
    return {
        "rss_mib": int(status["VmRSS"].split()[0]) // 1024,
        "threads": int(status["Threads"]),
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }
