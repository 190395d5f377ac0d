"""Memory of its own that reading and converting a big file takes, measured from outside the
process.

Pages of a mapped file are not counted: the kernel takes them back when it needs them. `-s` shows
the table.
"""

import json
import subprocess
import sys

import pytest

MEASURE = """
import json, os, re, sys, time
from pathlib import Path
import torch
from safetensors.torch import save_file
from calligrapher.model.adapter_files import adapter_state, load_adapter, write_calligrapher_bin
from calligrapher.model.export import scratch, with_lora
from calligrapher.model.ip_adapter import AdapterConfig, StyleAdapter
from tasks.weights.convert import convert

place = Path(sys.argv[1])
BIN, TWIN = str(place / "calligrapher.bin"), str(place / "calligrapher.safetensors")
RANK = 2


class Transformer:
    attn_processors, inner_dim = dict.fromkeys("abcd"), 1024


def own_memory(pid):
    found = re.search("RssAnon:[^0-9]*([0-9]+)", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) * 1024 if found else 0  # none when it has just ended


def make():
    with torch.device("meta"):
        state = StyleAdapter(AdapterConfig(320, 512, 128, 32), 4, 1024).state_dict()
    state = {n: torch.randn(1).expand(t.shape).contiguous() for n, t in state.items()}
    write_calligrapher_bin(state, Path(BIN))
    write_calligrapher_bin(state, Path(TWIN))


def merge():
    state = adapter_state(Path(BIN))
    rows, columns = state["image_proj_mlp.proj.2.weight"].shape
    pair = torch.ones(RANK, columns), torch.ones(rows, RANK)
    with scratch(place) as empty:
        merged = with_lora(state, {"image_proj_mlp.proj.2": pair}, 0.5, empty)
        write_calligrapher_bin(merged, place / "m.bin")


def peak(work):
    reading, writing = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.read(reading, 1)
        kept = work()
        time.sleep(0.3)  # the parent looks once more, also on a busy machine
        os._exit(0)
    before = most = own_memory(pid)
    os.write(writing, b"g")
    while not (ended := os.waitpid(pid, os.WNOHANG))[0]:
        most = max(most, own_memory(pid))
        time.sleep(0.001)
    assert ended[1] == 0, work
    return most - before


def convert_to(source, name, **how):
    return lambda: convert(source, str(place / name), **how)


if os.fork() == 0:
    make()
    os._exit(0)
os.wait()
with torch.device("meta"):  # imports 70 MB of torch once
    StyleAdapter(AdapterConfig(6, 8, 2, 1), 1, 8)
half = {"dtype": torch.bfloat16}
found = {
    "read .bin": peak(lambda: load_adapter(Path(BIN), Transformer())),
    "read .safetensors": peak(lambda: load_adapter(Path(TWIN), Transformer())),
    "convert .bin to .safetensors": peak(convert_to(BIN, "a/ip-adapter.safetensors")),
    "convert .safetensors to .bin": peak(convert_to(TWIN, "a/ip-adapter.bin")),
    "convert .safetensors to .bin in bfloat16": peak(convert_to(TWIN, "b/ip-adapter.bin", **half)),
    "convert .bin to .safetensors in bfloat16": peak(
        convert_to(BIN, "b/ip-adapter.safetensors", **half)
    ),
    "add LoRA to the largest tensor": peak(merge),
}
print(json.dumps({"file": os.path.getsize(BIN), **found}))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_big_file_is_never_held_twice_and_converting_holds_none_of_it(tmp_path):
    run = [sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for what, size in found.items():
        print(f"{what:<42} {size / 1e6:8.1f} MB")
    size = found.pop("file")
    assert size > 2e8
    constant = 2.5e7
    for what, own in found.items():
        if what.startswith("read"):
            assert 0.98 * size < own < size + constant, what
        else:
            assert own < constant, what
    converted = {
        path.parent.name + path.suffix: path.stat().st_size for path in tmp_path.glob("?/*")
    }
    assert all(
        abs(n / size - (1 if name[0] == "a" else 0.5)) < 0.01 for name, n in converted.items()
    )
    assert len(converted) == 4
