"""docs/tutorial.md does what it says: its commands are read from the page and run, in order."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors import safe_open

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs/tutorial.md"
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def shell(tmp_path):
    """`shell(block)`: run it in an empty folder, with `calligrapher` and `python` of this one."""
    tools, folder = tmp_path / "bin", tmp_path / "work"
    for path in (tools, folder):
        path.mkdir()
    for name, what in (("calligrapher", " -m flows.cli"), ("python", "")):
        (tools / name).write_text(f'#!/bin/sh\nexec "{sys.executable}"{what} "$@"\n')
        (tools / name).chmod(0o755)
    environment = os.environ | {
        "PATH": f"{tools}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
    }

    def shell(block):
        done = subprocess.run(
            ["bash", "-euc", block],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        return done.stdout

    shell.folder = folder
    return shell


def test_the_page_has_a_block_for_each_step():
    assert len(BLOCKS) == 6
    assert all("calligrapher " in block for block in BLOCKS)


@pytest.mark.slow
def test_every_command_of_the_tutorial_does_what_the_page_says(shell):
    said = [shell(block) for block in BLOCKS]
    folder = shell.folder
    assert "120 cases of 25 words in 3 fonts are in cases." in said[0]
    assert (folder / "sheet.png").is_file()
    assert "0 broken" in said[1]
    assert "2 of 2 rounds, finished" in said[2]
    assert (folder / "runs/fonts/report/before_after.png").is_file()
    assert "update.learning_rate: 0.002 | 0.0005" in said[3]
    painted = np.asarray(Image.open(next((folder / "empty").glob("*-seed0.png"))).convert("RGB"))
    assert (painted[:4] == (0xE8, 0xF0, 0xFF)).all()
    with safe_open(folder / "export/pytorch_lora_weights.safetensors", framework="pt") as file:
        assert file.metadata()["calligrapher.run"] == "fonts"
    assert "| OCR accuracy |" in (folder / "hub/README.md").read_text()
    assert "gentle" in said[5]
