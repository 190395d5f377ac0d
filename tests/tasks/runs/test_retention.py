"""What a run deletes by itself, and what `gc` deletes on demand."""

import json

from tasks.artifacts.artifact import Artifact
from tasks.artifacts.run_dir import RunDir
from tasks.params.run_params import RetentionParams
from tasks.reports.verify import verify
from tasks.runs.rerun import prepare_rerun
from tasks.runs.retention import clean_up, kept_rounds

TRAINED = "round-000{}/update/trained.safetensors"


def with_weights(folder, rounds):
    return [r for r in range(rounds) if (folder / TRAINED.format(r)).exists()]


SHORT = {"rounds": 4, "warmup": {"steps": 0}, "evaluate": {"every": 1}}


def test_gc_says_what_it_would_delete_and_then_deletes_that(train, judged):
    folder, _ = train("a", "nft", judged(0.2, 0.9, 0.3, 0.4), retention={"keep_last": 9}, **SHORT)
    run_dir, policy = RunDir(folder), RetentionParams(keep_last=1, keep_every=3)
    assert kept_rounds(run_dir, policy) == {0, 1, 3}
    before = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    told = clean_up(run_dir, policy, dry_run=True)
    assert with_weights(folder, 4) == [0, 1, 2, 3]
    assert {g.path.relative_to(folder).as_posix() for g in told} == {
        *(f"round-0002/update/{n}.safetensors" for n in ("trained", "ema", "optimizer")),
        "round-0002/refresh/old.safetensors",
    }
    assert clean_up(run_dir, policy) == told
    assert with_weights(folder, 4) == [0, 1, 3]
    notes = sum(p.stat().st_size for p in folder.rglob("pruned.json"))
    after = sum(p.stat().st_size for p in folder.rglob("*") if p.is_file())
    assert before - after + notes == sum(g.freed for g in told) > 0
    assert clean_up(run_dir, policy) == []
    assert verify(folder).problems == []


def test_leftovers_go_and_unfinished_work_stays(train):
    folder, _ = train("a", rounds=1)
    half = folder / "report/.writing-7-grid.png"
    half.parent.mkdir(exist_ok=True)
    half.write_bytes(b"ha")
    unused = folder / "round-0000/score-ahead-0123456789ab.partial"
    unused.mkdir()
    (unused / "x.parquet").write_bytes(b"xyz")
    work = folder / "round-0001/rollout.partial"
    work.mkdir(parents=True)
    (work / "shard-0000.parquet").write_bytes(b"work")
    told = clean_up(RunDir(folder), RetentionParams(keep_last=9))
    assert [(g.path, g.freed, g.why) for g in told] == [
        (half, 2, "half-written"),
        (unused / "x.parquet", 3, "unused work folder"),
    ]
    assert not half.exists()
    assert not unused.exists()
    assert (work / "shard-0000.parquet").exists()


def test_a_start_deletes_the_leftovers_of_a_killed_one(train):
    folder, _ = train("a", rounds=1)
    half = folder / ".writing-7-params.json"
    half.write_bytes(b"ha")
    train("a", rounds=1)
    assert not half.exists()


def test_what_a_fork_shares_frees_nothing_and_stays_in_the_fork(train):
    folder, _ = train("a", rounds=2)
    fork = prepare_rerun(folder, "round-0001/update", [], "b").folder.path
    told = clean_up(RunDir(folder), RetentionParams(keep_last=1))
    freed = {g.path.name: g.freed for g in told}
    assert freed == {"trained.safetensors": 0, "ema.safetensors": 0, "optimizer.safetensors": 0} | {
        "old.safetensors": 0
    }
    assert not (folder / TRAINED.format(0)).exists()
    assert (fork / TRAINED.format(0)).exists()
    assert Artifact.load(fork / "round-0000/update").pruned() == frozenset()
    assert "round-0000/update" in json.loads((fork / "fork.json").read_text())["shared"]
    assert verify(fork).problems == []
