"""What runs share on disk, made by several processes at once: each sees it whole."""

import json
import multiprocessing
import os
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import torch

from calligrapher.data.canvas import Canvas
from calligrapher.data.dataset import load_cases
from calligrapher.durable import atomic_write
from calligrapher.model.conditioning import ConditioningCache
from calligrapher.tiny.world import shared_bench, write_bench

PROCESSES = 5
fork = multiprocessing.get_context("fork")


def all_at_once(work):
    """Call `work` in several processes that start together; their exit codes."""
    barrier = fork.Barrier(PROCESSES)

    def begin():
        barrier.wait()
        work()
        os._exit(0)  # Not pytest's own end.

    processes = [fork.Process(target=begin) for _ in range(PROCESSES)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    return [process.exitcode for process in processes]


def leftovers(folder):
    return [path for path in folder.rglob("*") if ".writing-" in path.name]


def test_embedded_cases_are_whole_for_every_run_that_starts_in_a_fresh_folder(tmp_path):
    folder = tmp_path / "runs" / "data" / "tiny-train-40"

    def start():
        shared_bench(folder, num_cases=40, split="train", seed=0)
        assert len(load_cases(folder)) == 40

    start_alone = write_bench(tmp_path / "alone", num_cases=40, split="train", seed=0)
    assert all_at_once(start) == [0] * PROCESSES
    assert leftovers(tmp_path) == []
    for file in start_alone.iterdir():
        assert (folder / file.name).read_bytes() == file.read_bytes()


def test_cases_that_an_earlier_start_left_half_drawn_are_drawn_anew(tmp_path):
    folder = tmp_path / "cases"
    folder.mkdir()
    (folder / "test1_source.png").touch()
    shared_bench(folder, num_cases=2, split="train", seed=0)
    assert len(load_cases(folder)) == 2


def test_pictures_of_a_table_and_encodings_are_whole_for_every_process(tmp_path):
    bench = write_bench(tmp_path / "bench", num_cases=9, split="train", seed=1)
    rows = [
        {
            "text": case.text,
            **{
                r: {"bytes": getattr(case, r).read_bytes()} for r in ("source", "mask", "reference")
            },
        }
        for case in load_cases(bench)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "cases.parquet")
    encoders = SimpleNamespace(
        digest="d",
        vae=SimpleNamespace(dtype=torch.float32),
        max_sequence_length=8,
        encode=lambda case, canvas, device: {"x": torch.full((3, 5), float(len(case.text)))},
    )

    def start():
        for case in load_cases(tmp_path / "cases.parquet", "parquet", tmp_path / "pictures"):
            cache = ConditioningCache(
                encoders, Canvas(96, 32), torch.device("cpu"), tmp_path / "encodings"
            )
            entry = cache._entry("conditioning", case, encoders.encode)
            assert entry["x"].eq(len(case.text)).all()

    assert all_at_once(start) == [0] * PROCESSES
    assert leftovers(tmp_path) == []
    assert len(list((tmp_path / "encodings").iterdir())) == 9


def test_a_note_is_whole_whoever_writes_it(tmp_path):
    note = tmp_path / "identity.json"

    def start():
        for _ in range(20):
            atomic_write(note, json.dumps([os.getpid()] * 5000).encode())
            assert len(set(json.loads(note.read_bytes()))) == 1

    assert all_at_once(start) == [0] * PROCESSES
    assert leftovers(tmp_path) == []
