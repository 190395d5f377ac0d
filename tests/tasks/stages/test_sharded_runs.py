"""Whole runs of two ranks that hold half of the model each (fsdp2): they end next to one process.

Their gradients differ from one process's in the last bits: a style token's is the sum of those from
all style attentions, and FSDP's own steps in the graph seem to change the order of the additions.
"""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file
from shared_runs import interrupted, train_on
from small_runs import GreyScorer
from two_ranks import on_ranks

from calligrapher.ranks import ALONE

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
SHARDED = {"launch": {"strategy": "fsdp2"}}
HELD = {"timestep_fraction": 0.5, "background_coef": 0.5, "background_rows": 2}


def as_two(ranks, values, folder, runs_dir):
    """A run that breaks off in its first update and goes on; and one in one process.

    Nine images are three shards: in the last turn the second rank has none of its own.
    """
    sharded, how = values | SHARDED, {"scorer": GreyScorer()}
    interrupted(1, train_on, ranks, sharded, folder / "two", runs_dir, **how)
    inner = sorted(path.name for path in folder.glob("two/round-0000/update*/inner/*"))
    train_on(ranks, sharded, folder / "two", runs_dir, **how)
    if ranks.is_first:
        train_on(ALONE, values, folder / "one", runs_dir, **how)
    return inner


@pytest.fixture(scope="module")
def runs(random_model, cases, encodings, tmp_path_factory, run_values):
    folder = tmp_path_factory.mktemp("runs")
    values = run_values("nft", nft=HELD, update={"checkpointing_steps": 1}, evaluate={"every": 1})
    inner = on_ranks(2, as_two, values, folder, encodings.parent, timeout_s=600)
    assert inner[0] == ["step-00000001"]
    return folder


def latents_and_pictures(folder):
    tables = [pq.read_table(path) for path in sorted(folder.glob("*.parquet"))]
    assert [len(table) for table in tables] == [4, 4, 1]
    latents = [np.frombuffer(row.as_py(), np.float32) for t in tables for row in t["x0"]]
    return np.stack(latents), [row.as_py() for t in tables for row in t["image"]]


def test_the_warm_up_and_its_rollout_differ_in_last_bits_alone(runs):
    one, two = (load_file(runs / name / "warmup/trained.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert max((one[name] - two[name]).abs().max() for name in one) < 1e-7
    (expected, _), (found, _) = (
        latents_and_pictures(runs / name / "round-0000/rollout") for name in ("one", "two")
    )
    assert np.abs(found - expected).max() < 1e-5


@pytest.mark.parametrize("kind", ["trained", "ema"])
def test_the_adapter_ends_within_a_thousandth_of_the_way_of_one_process(runs, kind):
    name = f"round-0001/update/{kind}.safetensors"
    start = load_file(runs / "one/warmup/trained.safetensors")
    one, two = load_file(runs / "one" / name), load_file(runs / "two" / name)
    way = torch.cat([(one[n] - start[n]).flatten() for n in start])
    off = torch.cat([(one[n] - two[n]).flatten() for n in start])
    assert 0 < off.norm() <= 1e-3 * way.norm()


def test_every_artifact_of_one_process_is_there_with_its_files(runs):
    names = [p.parent.relative_to(runs / "one") for p in (runs / "one").rglob("artifact.json")]
    assert len(names) >= 12
    for name in names:
        one, two = (sorted(p.name for p in (runs / r / name).iterdir()) for r in ("one", "two"))
        assert one == two, name
    assert not list(runs.rglob("*.partial"))
