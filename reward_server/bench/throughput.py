"""Images per second of the service beside a bare loop and the original pattern; latencies by clients."""

import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime
import requests

from reward_server.bench.pictures import SIZE, items, picture, words
from reward_server.client import RewardClient, RewardItem, encode_png
from reward_server.ocr import OCRScorer
from reward_server.ocr_models import padded_width
from reward_server.ocr_weights import LINE_HEIGHT, REC_FILE, bundled
from reward_server.process import LOCAL_PORTS, ServerProcess, local_server

_ROUNDS = 2  # the best of these counts, for the service as for what it is compared with


def throughput(count: int, threads: int) -> dict:
    """Images per second of a bare loop, of the service under load, and of the original pattern."""
    bare = _bare_loop(count, threads)
    sent = items(count)
    with local_server(ocr_threads=threads) as url:
        _load(url, sent[:32], clients=4, chunk=8)  # warm up
        service = max(_load(url, sent, clients=16, chunk=8)["images_per_s"] for _ in range(_ROUNDS))
        single = {clients: _load(url, sent, clients=clients, chunk=1) for clients in (1, 4, 16, 64)}
    original = _original_pattern(sent)
    return {
        "images": count,
        "threads": threads,
        "bare_images_per_s": bare,
        "service_images_per_s": service,
        "original_images_per_s": original,
        "of_bare_loop": service / max(bare.values()),
        "times_original": service / original,
        "single_image_requests": single,
    }


def _bare_loop(count: int, threads: int) -> dict[str, float]:
    """Images/s of the engine alone: pictures side by side as the scorer reads them, and batches in a forward.

    The batches are forwards only (no resizing, decoding or comparing), on one session with all threads and on
    one single-threaded session per thread.
    """
    targets = words(count)
    crops = [np.asarray(picture(word)) for word in targets]
    scorer = OCRScorer(num_threads=threads)
    scorer.score(crops[:8], targets[:8])
    rates = {"the scorer in a loop": _best_rate(lambda: scorer.score(crops, targets), count)}
    scorer.close()
    for batch in (1, 4, 8, 16):
        for sessions in (1, threads):
            rates[f"forwards of {batch}, {sessions} side by side"] = _forwards(
                count, batch, sessions, threads
            )
    return rates


def _forwards(count: int, batch: int, sessions: int, threads: int) -> float:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads // sessions
    weights = str(bundled(REC_FILE))
    run = [
        onnxruntime.InferenceSession(weights, options, providers=["CPUExecutionProvider"]).run
        for _ in range(sessions)
    ]
    pixels = np.random.default_rng(0).random((batch, 3, LINE_HEIGHT, padded_width(*SIZE)), dtype=np.float32)
    rounds = max(1, count // (batch * sessions))

    def work(number: int, times: int) -> None:
        for _ in range(times):
            run[number](None, {"x": pixels})

    with ThreadPoolExecutor(sessions) as pool:
        list(pool.map(work, range(sessions), [1] * sessions))  # warm up
        return _best_rate(
            lambda: list(pool.map(work, range(sessions), [rounds] * sessions)), rounds * batch * sessions
        )


def _load(url: str, sent: Sequence[RewardItem], *, clients: int, chunk: int) -> dict[str, float]:
    """Clients that each send their share in requests of `chunk`, one after the other; rate and latency."""
    latencies: list[float] = []

    def work(share: Sequence[RewardItem]) -> None:
        with RewardClient([url], chunk_size=chunk, concurrency=1) as client:
            for start in range(0, len(share), chunk):
                started = time.perf_counter()
                results = client.score_batch(share[start : start + chunk])
                latencies.append(time.perf_counter() - started)
                assert all(result.ocr_accuracy is not None for result in results)

    with ThreadPoolExecutor(clients) as pool:
        shares = [sent[place::clients] for place in range(clients)]
        rate = _rate(lambda: list(pool.map(work, shares)), len(sent))
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return {
        "images_per_s": rate,
        "p50_ms": cuts[49] * 1e3,
        "p95_ms": cuts[94] * 1e3,
        "p99_ms": cuts[98] * 1e3,
    }


def _original_pattern(sent: Sequence[RewardItem]) -> float:
    """Images/s of one blocking request at a time to a server that recognises in its event loop."""
    with tempfile.TemporaryDirectory() as folder:
        port = random.SystemRandom().choice(LOCAL_PORTS)
        server = ServerProcess(
            [], port=port, log_path=Path(folder) / "log", module="reward_server.bench.original"
        )
        try:
            server.wait_healthy()
            bodies = [_original_body(item) for item in sent]
            requests.post(server.url + "/score", json=bodies[0], timeout=60)

            def run() -> None:
                for body in bodies:
                    requests.post(server.url + "/score", json=body, timeout=60).raise_for_status()

            return _best_rate(run, len(bodies))
        finally:
            server.stop()


def _original_body(item: RewardItem) -> dict:
    return {"image": encode_png(item.image), "prompt": item.prompt}


def _best_rate(run: Callable[[], object], count: int) -> float:
    return max(_rate(run, count) for _ in range(_ROUNDS))


def _rate(run: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    run()
    return count / (time.perf_counter() - started)
