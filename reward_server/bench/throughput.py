"""Images per second beside a bare loop and the original pattern; latencies by clients."""

import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import requests

from reward_server.alphabet import Alphabet
from reward_server.bench.pictures import SIZE, items, picture, pid_of, png, scenes, words
from reward_server.client import RewardClient, RewardItem, encode_png, sending
from reward_server.processes.process import LOCAL_PORTS, ServerProcess, local_server
from reward_server.scorers.base import Item
from reward_server.scorers.ocr.ctc import likelihood_per_character
from reward_server.scorers.ocr.models import load_recogniser, padded_width
from reward_server.scorers.ocr.scorer import OCRScorer
from reward_server.scorers.ocr.weights import LINE_HEIGHT
from reward_server.service.images import bounding_box
from reward_server.text import ocr_accuracy

_TURNS = 3
_FLAGS = ["--answer-cache=0"]  # the pictures are the same in every turn
_RATE, _CPU = "images_per_s", "cpu_ms_per_image"


def sizes(count: int, threads: int) -> dict:
    """Images per second of the service and of a bare loop, for pictures of several sizes.

    The line that is read is the same on all; what grows is the picture around it. Client and server
    encode and decode pictures that are in memory, or, as in a training, pictures that are PNG files
    already; each has the one mask and the one reference that its group shares. The bare loop is the
    server's OCR itself on decoded pictures. `sent_whole`: where a client sends all of each picture
    and not only the part that is looked at.
    """
    scorer = OCRScorer(num_threads=threads, mode="auto")
    found: dict[str, dict] = {}
    with local_server(ocr_threads=threads, flags=_FLAGS) as url:
        pid = pid_of(url)
        for side, encoded in (
            (SIZE, False),
            ((512, 512), False),
            ((512, 512), True),
            ((1024, 1024), True),
        ):
            sent = scenes(count, side)
            if encoded:
                sent = [replace(one, image=png(one.image)) for one in sent]
            decoded = [_decoded(item) for item in scenes(count, side)]
            _load(url, sent[:32], clients=4, chunk=8)  # warm up
            ask = partial(_load, url, sent, clients=8, chunk=8)
            bare, service, whole = [], [], []
            for _ in range(_TURNS):
                bare.append(_measure(partial(_score_all, scorer, decoded, threads), count))
                service.append(_measure(ask, count, pid))
                with patch.object(sending, "WORTH", 0.0):
                    whole.append(_measure(ask, count, pid))
            found[f"{side[0]}x{side[1]}{' PNG' if encoded else ''}"] = {
                "bare_loop": _best(bare),
                "service": _best(service),
                "sent_whole": _best(whole),
                "of_bare_loop": statistics.median(
                    one[_RATE] / other[_RATE] for one, other in zip(service, bare, strict=True)
                ),
            }
    scorer.close()
    return {"images": count, "threads": threads, **found}


def tight(count: int, threads: int) -> dict:
    """Images per second where a short line fills its mask: read as one line, and by `auto`.

    The scorer alone on decoded pictures; the two take turns. `of_line` is the median of auto's rate
    over that of `line`, which looks for no lines and sees nothing but letters.
    """
    decoded = [_decoded(item) for item in scenes(count, SIZE)]
    scorers = {mode: OCRScorer(num_threads=threads, mode=mode) for mode in ("line", "auto")}
    turns: dict[str, list] = {mode: [] for mode in scorers}
    for scorer in scorers.values():
        _score_all(scorer, decoded[:32], threads)  # warm up
    for _ in range(_TURNS):
        for mode, scorer in scorers.items():
            turns[mode].append(_measure(partial(_score_all, scorer, decoded, threads), count))
    for scorer in scorers.values():
        scorer.close()
    share = statistics.median(
        auto[_RATE] / line[_RATE] for auto, line in zip(turns["auto"], turns["line"], strict=True)
    )
    return {
        "images": count,
        "threads": threads,
        **{mode: _best(found) for mode, found in turns.items()},
        "of_line": share,
    }


def _decoded(item: RewardItem) -> Item:
    image, white = np.asarray(item.image), np.asarray(item.mask) >= 128
    box = top, bottom, left, right = bounding_box(white)
    crop = image[top:bottom, left:right]
    return Item(image, crop, item.text or "", mask=white, box=box, prompt=item.prompt)


def _score_all(scorer: OCRScorer, items: Sequence[Item], threads: int) -> None:
    """Score all items, `threads` batches side by side."""
    size = scorer.max_batch
    with ThreadPoolExecutor(threads) as pool:
        batches = [items[start : start + size] for start in range(0, len(items), size)]
        assert all(one.values for outcomes in pool.map(scorer.score_items, batches)
                   for one in outcomes)  # fmt: skip


def throughput(count: int, threads: int) -> dict:
    """Images per second of a bare loop, of the service under load, and of the original pattern.

    Rates suffer from whatever else runs on the machine: the bare loop with its best batch size and
    the service take turns, and the CPU time of all processes per image is told as well.
    """
    sent = items(count)
    loop = _BareLoop(count, threads)
    by_batch = {
        batch: _measure(lambda batch=batch: loop.run(batch), count) for batch in (1, 4, 8, 16)
    }
    best_batch = min(by_batch, key=lambda batch: by_batch[batch][_CPU])
    bare, service = [], []
    with local_server(ocr_threads=threads, flags=_FLAGS) as url:
        _load(url, sent[:32], clients=4, chunk=8)  # warm up
        for _ in range(_TURNS):
            bare.append(_measure(lambda: loop.run(best_batch), count))
            service.append(
                _measure(lambda: _load(url, sent, clients=16, chunk=8), count, pid_of(url))
            )
        single = {clients: _load(url, sent, clients=clients, chunk=1) for clients in (1, 4, 16, 64)}
    original = _original_pattern(sent)
    return {
        "images": count,
        "threads": threads,
        "bare_loop_by_batch_size": by_batch,
        "bare_loop": _best(bare),
        "service": _best(service),
        "original": original,
        "of_bare_loop": statistics.median(
            one[_RATE] / other[_RATE] for one, other in zip(service, bare, strict=True)
        ),
        "of_bare_loop_by_cpu_time": _best(bare)[_CPU] / _best(service)[_CPU],
        "times_original": _best(service)[_RATE] / original[_RATE],
        "times_original_by_cpu_time": original[_CPU] / _best(service)[_CPU],
        "single_image_requests": single,
    }


class _BareLoop:
    """The same engine and work on decoded crops, no server; `threads` batches side by side."""

    def __init__(self, count: int, threads: int):
        self._targets = words(count)
        self._crops = [
            np.ascontiguousarray(np.asarray(picture(word))[:, :, ::-1]) for word in self._targets
        ]
        self._recogniser = load_recogniser("onnxruntime", model_dir=None, device="cpu", threads=1)
        self._alphabet = Alphabet(self._recogniser.characters)
        self._pool = ThreadPoolExecutor(threads)

    def run(self, batch: int) -> None:
        """Score every crop, `batch` of them in a forward."""
        list(
            self._pool.map(
                lambda start: self._score(start, start + batch), range(0, len(self._crops), batch)
            )
        )

    def _score(self, start: int, stop: int) -> None:
        resize = self._recogniser.resize_op(rec_image_shape=[3, LINE_HEIGHT, padded_width(*SIZE)])
        outputs = self._recogniser.runner(x=[np.stack(resize(self._crops[start:stop]))])[0]
        for probs, target in zip(outputs, self._targets[start:stop], strict=True):
            ocr_accuracy(target, self._recogniser.decode(probs)[0])
            likelihood_per_character(probs, target, self._alphabet)


def _load(url: str, sent: Sequence[RewardItem], *, clients: int, chunk: int) -> dict[str, float]:
    """Return rate and latencies of clients that each send their share in requests of `chunk`."""
    latencies: list[float] = []

    def work(share: Sequence[RewardItem]) -> None:
        with RewardClient([url], chunk_size=chunk, concurrency=1) as client:
            client.info()  # as a training does
            for start in range(0, len(share), chunk):
                started = time.perf_counter()
                results = client.score_batch(share[start : start + chunk])
                latencies.append(time.perf_counter() - started)
                assert all(result.ocr_accuracy is not None for result in results)

    with ThreadPoolExecutor(clients) as pool:
        shares = [sent[place::clients] for place in range(clients)]
        started = time.perf_counter()
        list(pool.map(work, shares))
        rate = len(sent) / (time.perf_counter() - started)
    cuts = statistics.quantiles(latencies, n=100, method="inclusive")
    return {
        "images_per_s": rate,
        "p50_ms": cuts[49] * 1e3,
        "p95_ms": cuts[94] * 1e3,
        "p99_ms": cuts[98] * 1e3,
    }


def _original_pattern(sent: Sequence[RewardItem]) -> dict[str, float]:
    """One blocking request at a time to a server that recognises in its event loop."""
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

            return _measure(run, len(bodies), server.pid)
        finally:
            server.stop()


def _original_body(item: RewardItem) -> dict:
    return {"image": encode_png(item.image), "prompt": item.prompt}


def _measure(run: Callable[[], object], count: int, *servers: int) -> dict[str, float]:
    """Images/s, and CPU time per image of this process and `servers`."""
    started, used = time.perf_counter(), _cpu_seconds(*servers)
    run()
    seconds, cpu_seconds = time.perf_counter() - started, _cpu_seconds(*servers) - used
    return {_RATE: count / seconds, _CPU: 1e3 * cpu_seconds / count}


def _best(turns: list[dict[str, float]]) -> dict[str, float]:
    return {_RATE: max(turn[_RATE] for turn in turns), _CPU: min(turn[_CPU] for turn in turns)}


def _cpu_seconds(*servers: int) -> float:
    ticks = 0
    for pid in servers:
        fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
        ticks += int(fields[11]) + int(fields[12])  # in user and in system mode
    return time.process_time() + ticks / os.sysconf("SC_CLK_TCK")
