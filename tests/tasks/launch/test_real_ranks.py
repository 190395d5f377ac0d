"""Runs of two real processes: what they make, and what is left of them when one ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from scripted import Script, hash_scored
from small_runs import ALGORITHMS, SETTINGS

from calligrapher.errors import CalligrapherError, DataError, RankLostError
from calligrapher.tiny.world import write_bench
from flows.contexts import opened_run
from tasks.artifacts.artifact import Artifact
from tasks.params.run_params import RunParams
from tasks.pipeline import planned

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

BACKENDS = ["accelerate", "ray"]


@pytest.fixture(scope="module")
def server():
    script = Script(hash_scored)
    yield script
    script.close()


@pytest.fixture(scope="module")
def make_params(random_model, server, tmp_path_factory):
    """`make_params(algorithm, cases_folder, num_processes=2, ...)` -> params of a small run.

    With `staleness=1` one of three rounds, whose updates take longer than their rollouts.
    """
    folder = tmp_path_factory.mktemp("cases")
    for split, count in (("train", 7), ("evaluation", 2)):
        write_bench(folder / split, num_cases=count, split=split, seed=1)

    def make_params(algorithm="nft", cases=folder, staleness=0, **launch):
        given = {name: dict(v) if isinstance(v, dict) else v for name, v in SETTINGS.items()}
        names = {"base": "flux-fill", "siglip": "siglip", "initial_adapter": "calligrapher.bin"}
        given["model"] |= {key: str(random_model / name) for key, name in names.items()}
        given["data"] |= {split: str(cases / split) for split in ("train", "evaluation")}
        given["update"] |= {"batch_size": 2, "gradient_accumulation_steps": 2}
        given["evaluate"] |= {"every": 2}
        given["reward"] |= {"server_urls": [server.url]}
        given["launch"] = {"allow_fewer_servers": True, **launch}
        own = dict(ALGORITHMS[algorithm])
        if staleness:
            given["rounds"] = 3
            given["rollout"] |= {"staleness": staleness}
            given["update"] |= {"num_inner_epochs": 6}
            own |= {"importance_cap": 2.0} if algorithm == "grpo" else {}
        return RunParams.model_validate(given | {algorithm: own})

    return make_params


@pytest.fixture(scope="module")
def finished(make_params, tmp_path_factory):
    """`finished(algorithm, backend)` -> folder of a whole run; each is made once."""
    folder, done = tmp_path_factory.mktemp("runs"), {}

    def finished(algorithm, backend=None):
        if (algorithm, backend) not in done:
            launch = {"num_processes": 2, "backend": backend} if backend else {}
            path = folder / f"{algorithm}-{backend}"
            with opened_run(make_params(algorithm, **launch), path) as run:
                run.make_planned()
                if backend:
                    assert run.resources._model is None, "the parent must load no model"
                run.summarise(run.newest_update())
            done[algorithm, backend] = path
        return done[algorithm, backend]

    return finished


@pytest.mark.parametrize(
    ("algorithm", "backend"), [("nft", "accelerate"), ("grpo", "accelerate"), ("nft", "ray")]
)
def test_two_ranks_make_the_rollouts_of_one_and_adapters_next_to_its(finished, algorithm, backend):
    one, two = finished(algorithm), finished(algorithm, backend)
    for shard in sorted((one / "round-0000/rollout").glob("*.parquet")):
        there = two / "round-0000/rollout" / shard.name
        assert there.read_bytes() == shard.read_bytes(), shard.name
    start = load_file(one / "warmup/trained.safetensors")
    for name in ("trained", "ema"):
        a, b = (load_file(run / f"round-0001/update/{name}.safetensors") for run in (one, two))
        way = torch.cat([(a[key] - start[key]).flatten() for key in a]).norm()
        off = torch.cat([(a[key] - b[key]).flatten() for key in a]).norm()
        assert way > 0
        assert off <= 1e-3 * way, name


def test_the_ranks_leave_logs_and_the_artifacts_say_how_many_there_were(finished):
    two = finished("nft", "accelerate")
    for rank in (0, 1):
        assert "round-0001/update" in (two / f"logs/rank-{rank}.log").read_text()
    manifest = (two / "round-0001/update/artifact.json").read_text()
    assert '"ranks": "2"' in manifest
    assert two.joinpath("summary.json").exists()


def rank_processes():
    """(rank, process) of each rank that a process of ours started."""
    found = []
    for process in psutil.Process().children(recursive=True):
        try:
            if "tasks.launch.rank_process" in " ".join(process.cmdline()):
                found.append((int(process.environ()["RANK"]), process))
        except (psutil.NoSuchProcess, psutil.AccessDenied, KeyError):
            continue
    return dict(found)


@pytest.fixture
def broken_off(make_params, tmp_path):
    """`broken_off(at, strike)` -> (error, seconds): a run whose stage `at` is struck from outside
    as soon as it has begun. Called again it goes on with the same run; more arguments as in
    `make_params`."""
    cases = tmp_path / "cases"
    for split, count in (("train", 7), ("evaluation", 2)):
        write_bench(cases / split, num_cases=count, split=split, seed=1)

    def broken_off(at, strike, **how):
        params, struck = make_params("nft", cases, num_processes=2, timeout_s=8, **how), []

        def make(run, name):
            if name == at:
                ranks = rank_processes()  # nobody is there yet where it is the first
                timer = threading.Timer(0.05, lambda: strike(cases, ranks))
                struck.append(time.monotonic())
                timer.start()
            return run.make(name)

        with opened_run(params, tmp_path / "run") as run:
            ranks = None
            try:
                run.make_planned(make=make)
            except CalligrapherError as error:
                seconds = time.monotonic() - struck[0]
                assert rank_processes() == {}
                return error, seconds
            finally:
                ranks = rank_processes()
            assert run.resources._model is None
        return None, ranks

    return broken_off


def test_a_rank_that_is_killed_stopped_or_fails_ends_the_group_and_the_same_command_goes_on(
    broken_off, tmp_path
):
    error, seconds = broken_off(
        "round-0000/update", lambda cases, ranks: ranks[1].send_signal(signal.SIGKILL)
    )
    assert isinstance(error, RankLostError)
    assert "Rank 1 of 2 on " in str(error)
    assert "was killed by SIGKILL in round-0000/update" in str(error)
    assert f"end of {tmp_path}/run/logs/rank-1.log" in str(error)
    assert seconds < 10

    error, seconds = broken_off(
        "round-0001/rollout", lambda cases, ranks: ranks[0].send_signal(signal.SIGSTOP)
    )
    assert isinstance(error, RankLostError)
    assert "Rank 0 of 2 on " in str(error)
    assert "no sign of life for 8 s (launch.timeout_s) in round-0001/rollout" in str(error)
    assert seconds < 8 + 7

    assert broken_off("never", None)[0] is None
    assert (tmp_path / "run/round-0001/refresh").is_dir()


def test_a_rank_that_lives_but_hangs_ends_the_group_in_time_and_is_told_where(
    make_params, tmp_path
):
    cases = tmp_path / "cases"
    for split, count in (("train", 7), ("evaluation", 2)):
        write_bench(cases / split, num_cases=count, split=split, seed=1)
    params = make_params("nft", cases, num_processes=2, timeout_s=8)
    with opened_run(params, tmp_path / "run") as run:
        run.make("warmup")
        assert len(run.resources.cases.train) == 7
        for source in (cases / "train").glob("*_source.png"):
            source.unlink()
            os.mkfifo(source)  # as a disk that does not answer
        began = time.monotonic()
        with pytest.raises(RankLostError, match=r"none has computed anything for 8 s") as caught:
            run.make_planned()
    assert time.monotonic() - began < 60
    assert "Rank 1 of 2 on " in str(caught.value)
    assert rank_processes() == {}


def test_what_one_rank_meets_is_raised_with_its_own_words(make_params, tmp_path):
    cases = tmp_path / "cases"
    for split, count in (("train", 7), ("evaluation", 2)):
        write_bench(cases / split, num_cases=count, split=split, seed=1)
    params = make_params("nft", cases, num_processes=2)
    with opened_run(params, tmp_path / "run") as run:
        assert len(run.sources["train_data"]()) == 64
        assert len(run.resources.cases.train) == 7
        for source in (cases / "train").glob("*_source.png"):
            source.write_bytes(source.read_bytes()[:60])
        with pytest.raises(DataError, match=r"_source\.png") as caught:
            run.make_planned()
    (note,) = caught.value.__notes__
    assert "in warmup; its log: " in note
    assert rank_processes() == {}


def digests(folder):
    manifests = sorted(folder.glob("**/artifact.json"))
    return {str(p.relative_to(folder)): Artifact.load(p.parent).digest for p in manifests}


APART = {"staleness": 1, "num_processes": 2, "rollout_processes": 1}


@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_rollouts_beside_updates_have_the_bits_of_one_process_that_does_both(
    make_params, tmp_path, algorithm
):
    for name, how in (("one", {"staleness": 1}), ("apart", APART)):
        with opened_run(make_params(algorithm, **how), tmp_path / name) as run:
            run.make_planned()
    one, apart = tmp_path / "one", tmp_path / "apart"
    assert digests(apart) == digests(one)
    for number in (0, 1):
        ended = (apart / f"round-000{number}/update/state.json").stat().st_mtime
        shards = (apart / f"round-000{number + 1}/rollout").glob("*.parquet")
        assert max(path.stat().st_mtime for path in shards) < ended
    logs = [(apart / f"logs/rank-{rank}.log").read_text() for rank in (0, 1)]
    assert [("/rollout" in log, "/update" in log) for log in logs] == [(True, False), (False, True)]


@pytest.mark.parametrize(("rank", "at"), [(0, "round-0001/rollout"), (1, "round-0000/update")])
def test_a_rank_of_either_part_that_is_killed_ends_both_and_the_same_command_goes_on(
    broken_off, make_params, tmp_path, rank, at
):
    error, seconds = broken_off(
        "round-0000/update",
        lambda cases, ranks: ranks[rank].send_signal(signal.SIGKILL),
        staleness=1,
        rollout_processes=1,
    )
    assert isinstance(error, RankLostError)
    assert f"Rank {rank} of 2 on " in str(error)
    assert f"was killed by SIGKILL in {at}" in str(error)
    assert seconds < 10
    assert not (tmp_path / "run/round-0000/update").exists()
    assert not (tmp_path / "run/round-0001/rollout").exists()
    assert (tmp_path / "run/round-0001/rollout.partial").is_dir()
    assert broken_off("never", None, staleness=1, rollout_processes=1)[0] is None
    whole = make_params("nft", tmp_path / "cases", staleness=1)
    with opened_run(whole, tmp_path / "whole") as run:
        run.make_planned()
    assert digests(tmp_path / "run") == digests(tmp_path / "whole")


def test_a_rank_imports_neither_an_orchestrator_nor_a_tracker():
    code = (
        "import sys, tasks.launch.rank_process, tasks.launch.in_process\n"
        "import tasks.weights.model_files, tasks.resources.rewards, calligrapher.ranks\n"
        "print(sorted({'prefect', 'mlflow', 'flows', 'tasks.runs'} & set(sys.modules)))"
    )
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[3])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, check=True
    )
    assert done.stdout.strip() == "[]"


@pytest.fixture
def machines(monkeypatch):
    """Two machines of one core each under Ray, as processes of this one."""
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    monkeypatch.setenv("RAY_ADDRESS", cluster.address)
    yield cluster
    cluster.shutdown()


def test_two_machines_hold_a_rank_each_and_another_takes_the_place_of_one_that_leaves(
    machines, make_params, finished, tmp_path
):
    import ray

    places = {}

    def make(run, name):
        if name == "round-0001/rollout":
            machines.remove_node(machines.list_all_nodes()[-1], allow_graceful=False)
            machines.add_node(num_cpus=1)
        made = run.make(name)
        groups = ray.util.placement_group_table().values()
        (group,) = [group for group in groups if group["state"] == "CREATED"]
        places[name] = set(group["bundles_to_node_id"].values())
        return made

    params = make_params("nft", num_processes=2, backend="ray", wait_s=60)
    with opened_run(params, tmp_path / "run") as run:
        run.make_planned(make=make)
    assert [len(nodes) for nodes in places.values()] == [2] * len(places)
    assert places["round-0000/refresh"] != places["round-0001/rollout"]
    assert digests(tmp_path / "run") == digests(finished("nft", "ray"))


def test_the_runs_of_every_backend_have_the_same_artifacts(finished):
    params = RunParams.model_validate_json((finished("nft") / "params.json").read_text())
    for backend in BACKENDS:
        folder = finished("nft", backend)
        assert [n for n in planned(params) if not (folder / n).is_dir()] == []
