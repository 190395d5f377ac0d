"""Kills runs with SIGKILL in every stage of every round, and compares their ends with runs never
killed.

    python tests/scripts/kill_proof.py --runs 2 --seed 0 [--algorithm nft] [--no-mlflow]
    python tests/scripts/kill_proof.py --ranks 2 --kills 20 [--seed 0] [--algorithm nft] [--apart]

The process sends itself each SIGKILL at a random one of the function calls that the stage makes in
the run that is never killed: writes, renames and fsyncs among them. Then the same run starts again.
Prints one JSON object; exit status 1 when a run ended otherwise than the one that was never killed.
Imports once and forks a process per start: the imports take longer than a run.
With `--ranks` the killed are the parent and the ranks of runs of several processes: `kill_ranks`;
with `--apart` the first rank samples while the others update.
"""

import argparse
import itertools
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

os.environ |= {"DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))

import psutil
import torch
from diffusers import FluxFillPipeline  # noqa: F401  # imported before the forks
from small_runs import ALGORITHMS, SETTINGS, HashScorer
from tqdm import tqdm
from transformers import AutoImageProcessor, SiglipVisionModel  # noqa: F401

from calligrapher.tiny.build import write_random
from calligrapher.tiny.world import write_bench
from tasks.artifacts.layout import PARTIAL_SUFFIX, RunsDir
from tasks.params.run_params import RunParams
from tasks.pipeline import planned, round_of, stage_of
from tasks.reports.verify import verify
from tasks.runs.run import open_run, resources_of

# tqdm's own lock is one for all forks: a process killed while it holds it would stop all others.
tqdm.set_lock(threading.RLock())
tqdm.monitor_interval = 0


def settings(
    algorithm: str,
    model: Path,
    cases: Path,
    *,
    mlflow: bool,
    ranks: int = 1,
    server: str = "",
    apart: bool = False,
) -> RunParams:
    """A run of seconds: two rounds of nine images, three optimizer steps each, all saved.

    With several ranks each step has two batches, and the rewards are those of `server`. apart: one
    of the ranks samples beside the others, in three rounds.
    """
    own = dict(ALGORITHMS[algorithm])
    given = {name: dict(v) if isinstance(v, dict) else v for name, v in SETTINGS.items()}
    weights = {"base": "flux-fill", "siglip": "siglip", "initial_adapter": "calligrapher.bin"}
    given["model"] |= {key: str(model / name) for key, name in weights.items()}
    given["data"] |= {split: str(cases / split) for split in ("train", "evaluation")}
    given["warmup"] |= {"steps": 3, "checkpointing_steps": 1}
    given["update"] |= {"gradient_accumulation_steps": 1, "checkpointing_steps": 1}
    given["evaluate"] |= {"every": 1}
    given["tracking"] = {"enabled": mlflow}
    if ranks > 1:
        given["update"] |= {"batch_size": 2, "gradient_accumulation_steps": 2}
        given["reward"] |= {"server_urls": [server]}
        given["launch"] = {"num_processes": ranks, "allow_fewer_servers": True}
    if apart:
        given["rounds"] = 3
        given["rollout"] |= {"staleness": 1}
        given["launch"] |= {"rollout_processes": 1}
        own |= {"importance_cap": 2.0} if algorithm == "grpo" else {}
    return RunParams.model_validate(given | {algorithm: own})


def train(params: RunParams, runs: Path, name: str, victim: str | None, calls: int) -> None:
    """Make all artifacts of the run that are not there yet, in the order of `flows.rl_train`.

    Dies at call number `calls` after it has begun with `victim`. `NAME.log` gets each artifact that
    it begins with, and the number of calls until then.
    """
    torch.set_num_threads(1)
    counter = Counter()

    def on_call(frame, event, argument):
        counter["calls"] += 1
        if counter["calls"] == counter["last"]:
            os.kill(os.getpid(), signal.SIGKILL)

    resources = resources_of(params, RunsDir(runs), HashScorer())
    with open_run(resources, runs / name) as run, (runs / f"{name}.log").open("w") as log:
        made = []
        sys.setprofile(on_call)
        for artifact in [*planned(params), "end"]:
            log.write(json.dumps([artifact, counter["calls"]]) + "\n")
            log.flush()
            if artifact == victim:
                counter["last"] = counter["calls"] + calls
            if artifact != "end":
                made.append(run.make(artifact))
        sys.setprofile(None)
        run.summarise([artifact for artifact in made if artifact.stage == "update"][-1])


def start(
    params: RunParams, runs: Path, name: str, victim: str | None = None, calls: int = 0
) -> int:
    """Fork a process, with a session of its own, that trains; its pid."""
    if pid := os.fork():
        return pid
    os.setsid()
    try:
        train(params, runs, name, victim, calls)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def begun(runs: Path, name: str) -> list[tuple[str, int]]:
    """(artifact, number of calls until it was begun with) of the last start of the run."""
    return [tuple(json.loads(line)) for line in (runs / f"{name}.log").open()]


def calls_of(runs: Path, name: str) -> dict[str, int]:
    """Artifact -> number of calls that it takes."""
    return {name: end - at for (name, at), (_, end) in itertools.pairwise(begun(runs, name))}


def digest(runs: Path, name: str) -> str:
    return json.loads((runs / name / "summary.json").read_text())["adapter_digest"]


def leftovers(folder: Path, sessions: list[int]) -> list[str]:
    """Files and processes that should not be there."""
    names = [
        str(p)
        for p in folder.rglob("*")
        if p.suffix == PARTIAL_SUFFIX or p.name.startswith(".writing-")
    ]
    alive = [p.pid for p in psutil.process_iter() if _session(p.pid) in sessions]
    return names + [f"process {pid}" for pid in alive]


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except ProcessLookupError:
        return None


def twice(folder: Path, *, mlflow: bool) -> list[str]:
    """Metric points that stand twice in `metrics.jsonl` or in MLflow."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    counts = Counter((line["stage"], line["step"]) for line in lines)
    found = [f"metrics.jsonl: {key}" for key, count in counts.items() if count > 1]
    if mlflow:
        from mlflow import MlflowClient

        pointer = json.loads((folder / "mlflow.json").read_text())
        client = MlflowClient(tracking_uri=pointer["uri"])
        runs = client.search_runs(
            [client.get_experiment_by_name(pointer["experiment"]).experiment_id]
        )
        own = [run for run in runs if run.data.tags["run_dir"] == str(folder)]
        found += [f"{len(own)} MLflow runs"] * (len(own) != 1)
        for key in (
            key for run in own for key in run.data.metrics if not key.startswith("system/")
        ):
            steps = [m.step for m in client.get_metric_history(own[0].info.run_id, key)]
            found += [f"MLflow: {key}"] * (len(steps) != len(set(steps)))
        found += ["MLflow: no metrics"] * (len(own) == 1 and len(own[0].data.metrics) < 20)
    return found


def in_a_child(check, *arguments, **options) -> list[str]:
    """What `check` returns, from a process that is gone afterwards: clients have threads, forks
    want none."""
    reading, writing = os.pipe()
    if (pid := os.fork()) == 0:
        try:
            os.write(writing, json.dumps(check(*arguments, **options)).encode())
        except BaseException:
            os.write(writing, json.dumps([traceback.format_exc()]).encode())
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        found = json.load(pipe)
    wait(pid)
    return found


def prove(params: RunParams, runs: Path, number: int, dice: random.Random, *, mlflow: bool) -> dict:
    """Kill run number `number` in every stage of every round, twice where there is but one; the
    outcome."""
    calls, name, hits, sessions = calls_of(runs, "whole"), f"killed-{number}", Counter(), []
    works, names = 0, planned(params)
    for victim in sorted(names + [n for n in names if round_of(n) is None], key=names.index):
        pid = start(params, runs, name, victim, dice.randint(1, calls[victim]))
        sessions.append(pid)
        if wait(pid) == -signal.SIGKILL:
            hits[stage_of(begun(runs, name)[-1][0])] += 1
            works += any((runs / name).rglob(f"*{PARTIAL_SUFFIX}"))
    last = start(params, runs, name)
    assert wait(last) == 0, "the run must finish when nobody kills it"
    return {
        "hits": hits,
        "work_folders_left_by_kills": works,
        "same_digest": digest(runs, name) == digest(runs, "whole"),
        "leftovers": leftovers(runs / name, [*sessions, last]),
        "twice": in_a_child(twice, runs / name, mlflow=mlflow),
        "damaged": verify(runs / name).problems,
    }


def prove_all(
    params: RunParams, runs: Path, dice: random.Random, count: int, *, mlflow: bool
) -> Iterator[dict]:
    """Kill `count` runs in every stage; the outcome of each."""
    assert wait(start(params, runs, "whole")) == 0
    for number in range(count):
        yield prove(params, runs, number, dice, mlflow=mlflow)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithm", choices=sorted(ALGORITHMS), action="append")
    parser.add_argument("--runs", type=int, default=2, help="killed runs per algorithm")
    parser.add_argument("--ranks", type=int, default=1, help="processes that share each run")
    parser.add_argument("--kills", type=int, default=20, help="with --ranks: of all algorithms")
    parser.add_argument("--apart", action="store_true", help="with --ranks: the first one samples")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-mlflow", dest="mlflow", action="store_false")
    chosen = parser.parse_args()
    tracked = chosen.mlflow and chosen.ranks == 1
    if tracked:
        import mlflow  # noqa: F401  # before the forks
        from mlflow.system_metrics import system_metrics_monitor  # noqa: F401
        from mlflow.tracking._tracking_service import utils  # noqa: F401
    algorithms = chosen.algorithm or sorted(ALGORITHMS)
    dice, folder = random.Random(chosen.seed), Path(tempfile.mkdtemp(prefix="kill-proof-"))
    results, hits, started = [], Counter(), time.monotonic()
    try:
        model = write_random(folder / "model")
        for split, count in (("train", 7), ("evaluation", 2)):
            write_bench(folder / "cases" / split, num_cases=count, split=split, seed=1)
        for algorithm in algorithms:
            given, runs = (algorithm, model, folder / "cases"), folder / algorithm
            with ExitStack() as stack:
                if chosen.ranks > 1:
                    import kill_ranks

                    server = stack.enter_context(kill_ranks.reward_server())
                    several = {"ranks": chosen.ranks, "server": server, "apart": chosen.apart}
                    params = settings(*given, mlflow=False, **several)
                    kills = -(-chosen.kills // len(algorithms))
                    outcomes = kill_ranks.prove_all(params, runs, dice, kills)
                else:
                    params = settings(*given, mlflow=tracked)
                    outcomes = prove_all(params, runs, dice, chosen.runs, mlflow=tracked)
                for found in outcomes:
                    hits += found.pop("hits")
                    results.append({"algorithm": algorithm, **found})
                    print(f"{dict(hits)} so far, {results[-1]}", file=sys.stderr)
    finally:
        shutil.rmtree(folder)
    good = all(
        r["same_digest"] and not (r["leftovers"] or r["twice"] or r["damaged"]) for r in results
    )
    summary = {"kills": sum(hits.values()), "hits": dict(hits), "runs": results, "good": good}
    print(json.dumps(summary | {"seconds": round(time.monotonic() - started)}, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
