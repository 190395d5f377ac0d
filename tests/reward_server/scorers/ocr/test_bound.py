"""What one large picture costs the real engine."""

import json
import os
import time
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFont

from reward_server.bench.pictures import words
from reward_server.scorers.base import Item
from reward_server.scorers.ocr.scorer import OCRScorer

FONT = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
SIDE = 4096  # px; the server's --max-pixels lets it in
PROC = Path("/proc/self/status")


def item(text: str, points: int) -> Item:
    image = Image.new("RGB", (SIDE, SIDE), "white")
    face, draw = ImageFont.truetype(FONT, points), ImageDraw.Draw(image)
    for row, line in enumerate(text.split("\n")):
        top = 20 + row * SIDE // 41 if "\n" in text else SIDE // 3
        draw.text((SIDE // 12, top), line, "black", face)
    pixels = np.asarray(image)
    return Item(pixels, pixels, "Hello", mask=np.ones((SIDE, SIDE), bool))


def memory_mib(key: str) -> int:
    return int(PROC.read_text().split(f"{key}:")[1].split()[0]) // 1024


@pytest.mark.slow
@pytest.mark.skipif(not PROC.is_file(), reason="reads the memory of the process from /proc")
def test_a_picture_of_4096_px_costs_seconds_and_keeps_no_memory(capsys):
    scorer = OCRScorer(mode="auto")
    shown = {
        "white": item(" ", 10),
        "letters of 1024 px": item("Hello", SIDE // 4),
        "40 lines": item("\n".join([" ".join(words(20, row)) for row in range(40)]), 60),
    }
    try:
        scorer.score_items([Item(*[np.full((32, 96, 3), 255, np.uint8)] * 2, "Hello")])
        before, seconds, kept = memory_mib("VmRSS"), dict.fromkeys(shown, 0.0), []
        for _ in range(3):
            for name, one in shown.items():
                start = time.process_time()
                (outcome,) = scorer.score_items([one])
                seconds[name] = max(seconds[name], time.process_time() - start)
                if name == "letters of 1024 px":
                    assert outcome.values["ocr_accuracy"] == 1.0
            kept.append(memory_mib("VmRSS") - before)
    finally:
        scorer.close()
    found = {
        "cpu_seconds": {name: round(value, 2) for name, value in seconds.items()},
        "rss_before_mib": before,
        "rss_growth_mib": kept,
        "peak_growth_mib": memory_mib("VmHWM") - before,
        "cores": os.cpu_count(),
    }
    with capsys.disabled():
        print(json.dumps(found))
    assert kept[-1] - kept[0] < 32, found
    assert kept[-1] < 400, found  # 0.7 GiB where onnxruntime keeps an arena
    assert found["peak_growth_mib"] < 1000, found
    assert max(seconds.values()) < 15, found
