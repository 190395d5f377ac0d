"""What the service does per second, for long, and when servers die: `python -m reward_server.bench WHAT`.

    throughput   images/s beside a bare loop over the engine and one blocking request at a time; latencies
    soak         memory, threads and descriptors of the server over many requests
    faults       one of three servers is killed while it scores
    heldout      OCR components of right, slightly wrong, mirrored and empty pictures

Each prints one JSON object. `--quick` shortens all of them to a smoke test.
"""

import argparse
import io
import json
import os
import random
import signal
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from reward_server.client import RewardClient, RewardItem
from reward_server.launch import local_server
from reward_server.process import LOCAL_PORTS, ServerProcess

_LETTERS = "abcdefghknoprstuwxyz"


def picture(text: str, size: tuple[int, int] = (96, 32)) -> Image.Image:
    """One line of text in the middle of a picture of `size` (width, height)."""
    image = Image.new("RGB", size, (240, 236, 225))
    font = ImageFont.load_default(size=round(size[1] * 0.62))
    ImageDraw.Draw(image).text((size[0] / 2, size[1] / 2), text, font=font, fill=(25, 30, 70), anchor="mm")
    return image


def words(count: int, seed: int = 0) -> list[str]:
    """Random words of five letters."""
    rng = random.Random(seed)
    return ["".join(rng.choices(_LETTERS, k=5)) for _ in range(count)]


def items(count: int) -> list[RewardItem]:
    """Pictures of random words with a mask over all of each, encoded."""
    mask = _png(Image.new("L", (96, 32), 255))
    return [
        RewardItem(_png(picture(word)), f"The text is '{word}'.", mask=mask, text=word)
        for word in words(count)
    ]


def throughput(options: argparse.Namespace) -> dict:
    """Images per second of a bare loop, of the service under load, and of the original pattern."""
    count, threads = (32 if options.quick else options.images), options.threads
    bare = _bare_loop(count, threads)
    sent = items(count)
    found: dict = {"images": count, "threads": threads, "bare_images_per_s": bare}
    with local_server(ocr_threads=threads) as url:
        _load(url, sent[:32], clients=4, chunk=8)  # warm up
        best = max(
            _load(url, sent, clients=16, chunk=8)["images_per_s"] for _ in range(1 if options.quick else 3)
        )
        found["service_images_per_s"] = best
        found["single_image_requests"] = {
            clients: _load(url, sent, clients=clients, chunk=1) for clients in (1, 4, 16, 64)
        }
    found["original_images_per_s"] = _original_pattern(sent)
    found["of_bare_loop"] = best / max(bare.values())
    found["times_original"] = best / found["original_images_per_s"]
    return found


def _bare_loop(count: int, threads: int) -> dict[str, float]:
    """Images/s of the engine alone on decoded crops: pictures side by side, and batches in one forward."""
    import onnxruntime

    from reward_server.ocr import OCRScorer
    from reward_server.ocr_models import padded_width
    from reward_server.ocr_weights import REC_FILE, bundled

    targets = words(count)
    crops = [np.asarray(picture(word)) for word in targets]
    scorer = OCRScorer(num_threads=threads)
    scorer.score(crops[:8], targets[:8])
    rates = {"one picture per forward": _rate(lambda: scorer.score(crops, targets), count)}
    scorer.close()
    session_options = onnxruntime.SessionOptions()
    session_options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        str(bundled(REC_FILE)), session_options, providers=["CPUExecutionProvider"]
    )
    for batch in (1, 4, 8, 16):  # the forward alone: no resizing, decoding or comparing
        pixels = np.random.default_rng(0).random((batch, 3, 48, padded_width(96, 32)), dtype=np.float32)
        session.run(None, {"x": pixels})
        rounds = max(1, count // batch)
        run = lambda pixels=pixels, rounds=rounds: [session.run(None, {"x": pixels}) for _ in range(rounds)]  # noqa: E731
        rates[f"forward of {batch}"] = _rate(run, rounds * batch)
    return rates


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
    import requests

    with tempfile.TemporaryDirectory() as folder:
        port = random.SystemRandom().choice(LOCAL_PORTS)
        server = ServerProcess(
            [], port=port, log_path=Path(folder) / "log", module="reward_server.bench_original"
        )
        try:
            server.wait_healthy()
            bodies = [_original_body(item) for item in sent]
            requests.post(server.url + "/score", json=bodies[0], timeout=60)

            def run() -> None:
                for body in bodies:
                    requests.post(server.url + "/score", json=body, timeout=60).raise_for_status()

            return _rate(run, len(bodies))
        finally:
            server.stop()


def _original_body(item: RewardItem) -> dict:
    from reward_server.client import encode_png

    return {"image": encode_png(item.image), "prompt": item.prompt}


def soak(options: argparse.Namespace) -> dict:
    """RSS (MiB), threads and descriptors of the server process at the start, on the way and at the end."""
    count = 200 if options.quick else options.requests
    sent = items(64)
    samples: list[dict] = []
    with local_server(ocr_threads=options.threads) as url:
        pid = _pid(url)
        with ThreadPoolExecutor(8) as pool, RewardClient([url], chunk_size=1, concurrency=8) as client:
            started, done = time.perf_counter(), 0
            while done < count:
                step = min(max(count // 20, 50), count - done)
                list(pool.map(lambda place: client.score_batch([sent[place % 64]]), range(step)))
                done += step
                samples.append({"requests": done, **_resources(pid)})
            seconds = time.perf_counter() - started
    return {"requests": count, "seconds": seconds, "first": samples[0], "middle": samples[len(samples) // 2],
            "last": samples[-1]}  # fmt: skip


def faults(options: argparse.Namespace) -> dict:
    """Three servers score 300 pictures for a client; its own one is killed on the way."""
    count = 30 if options.quick else options.images
    sent = items(count)
    with tempfile.TemporaryDirectory() as folder:
        ports = random.SystemRandom().sample(LOCAL_PORTS, 3)
        servers = [ServerProcess([], port=port, log_path=Path(folder) / f"{port}.log") for port in ports]
        try:
            for server in servers:
                server.wait_healthy()
            with RewardClient([server.url for server in servers], chunk_size=4, concurrency=4) as client:
                client.score_batch(sent[:4])
                started = time.perf_counter()
                killer = threading.Timer(0.5, os.kill, (servers[0].pid, signal.SIGKILL))
                killer.start()
                results = client.score_batch(sent)
                seconds = time.perf_counter() - started
                killer.cancel()
            expected = [result.ocr_text for result in results]
            return {
                "images": count,
                "seconds": seconds,
                "killed_on_the_way": servers[0].exit_status() is not None,
                "scored": sum(result.ocr_accuracy is not None for result in results),
                "mean_accuracy": statistics.mean(result.ocr_accuracy or 0.0 for result in results),
                "empty_readings": expected.count(""),
            }
        finally:
            for server in servers:
                server.stop()


def heldout(options: argparse.Namespace) -> dict:
    """Mean components of 200 pictures: right, one letter of five wrong, mirrored, empty."""
    from reward_server.ocr import OCRScorer

    rng = random.Random(7)
    scorer = OCRScorer(num_threads=options.threads)
    targets = words(5 if options.quick else 50, seed=1)

    def spoiled(word: str) -> str:
        place = rng.randrange(len(word))
        return word[:place] + rng.choice([one for one in _LETTERS if one != word[place]]) + word[place + 1 :]

    kinds: dict[str, Callable[[str], Image.Image]] = {
        "right": lambda word: picture(word, (112, 36)),
        "one_wrong": lambda word: picture(spoiled(word), (112, 36)),
        "mirrored": lambda word: ImageOps.mirror(picture(word, (112, 36))),
        "empty": lambda word: picture("", (112, 36)),
    }
    table = {}
    for kind, paint in kinds.items():
        scores = scorer.score([paint(word) for word in targets], targets)
        table[kind] = {
            part: statistics.mean(getattr(score, part) for score in scores)
            for part in ("accuracy", "likelihood", "confidence")
        }
    scorer.close()
    return {"pictures_per_kind": len(targets), **table}


def _rate(run: Callable[[], object], count: int) -> float:
    started = time.perf_counter()
    run()
    return count / (time.perf_counter() - started)


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


def _pid(url: str) -> int:
    import requests

    return requests.get(url + "/health", timeout=10).json()["pid"]


def _resources(pid: int) -> dict[str, int]:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "rss_mib": int(status["VmRSS"].split()[0]) // 1024,
        "threads": int(status["Threads"]),
        "descriptors": len(list(Path(f"/proc/{pid}/fd").iterdir())),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark and print its JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m reward_server.bench",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("what", choices=["throughput", "soak", "faults", "heldout"])
    parser.add_argument(
        "--threads", type=int, default=2, help="OCR threads of the server, and of the bare loop"
    )
    parser.add_argument("--images", type=int, default=512, help="pictures (throughput, faults)")
    parser.add_argument("--requests", type=int, default=20_000, help="requests (soak)")
    parser.add_argument("--quick", action="store_true", help="a few pictures only")
    options = parser.parse_args(argv)
    run = {"throughput": throughput, "soak": soak, "faults": faults, "heldout": heldout}[options.what]
    sys.stdout.write(json.dumps(run(options), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
