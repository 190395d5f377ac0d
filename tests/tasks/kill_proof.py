"""Kills runs with SIGKILL in every stage of every round, and compares their ends with runs never killed.

    python tests/tasks/kill_proof.py --runs 2 --seed 0 [--algorithm nft] [--no-mlflow]

Each kill comes at a random moment after the stage's work folder has appeared, then the same run is started
again. Prints one JSON object; exit status 1 when a run ended otherwise than the one that was never killed.
Imports once and forks a process per start: the imports take longer than a run.
"""

import argparse
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from pathlib import Path

os.environ |= {"DO_NOT_TRACK": "true", "MLFLOW_DISABLE_TELEMETRY": "true", "OMP_NUM_THREADS": "1"}
sys.path.insert(0, str(Path(__file__).parent))

import psutil
import torch
from conftest import ALGORITHMS, SETTINGS, HashScorer
from diffusers import FluxFillPipeline  # noqa: F401  # imported before the forks
from transformers import AutoImageProcessor, SiglipVisionModel  # noqa: F401

from calligrapher.tiny.build import write_random
from calligrapher.tiny.world import write_bench
from tasks.bench import Bench
from tasks.manifest import PARTIAL_SUFFIX
from tasks.params import RunParams
from tasks.plan import planned, stage_of
from tasks.rerun import build_stage
from tasks.run import open_run
from tasks.status import status
from tasks.summary import summarise
from tasks.verify import verify

STAGES = ("warmup", "rollout", "score", "advantage", "update", "refresh", "evaluate")
PATIENCE_S = 600.0


def settings(algorithm: str, model: Path, cases: Path, *, mlflow: bool) -> RunParams:
    """A run of seconds: two rounds of nine images, three optimizer steps each, all saved."""
    given = {name: dict(v) if isinstance(v, dict) else v for name, v in SETTINGS.items()}
    weights = {"base": "flux-fill", "siglip": "siglip", "initial_adapter": "calligrapher.bin"}
    given["model"] |= {key: str(model / name) for key, name in weights.items()}
    given["data"] |= {split: str(cases / split) for split in ("train", "evaluation")}
    given["warmup"] |= {"steps": 3, "checkpointing_steps": 1}
    given["update"] |= {"gradient_accumulation_steps": 1, "checkpointing_steps": 1}
    given["evaluate"] |= {"every": 1}
    given["tracking"] = {"enabled": mlflow}
    return RunParams.model_validate(given | {algorithm: ALGORITHMS[algorithm]})


def train(params: RunParams, runs: Path, name: str) -> None:
    """Make all artifacts of the run that are not there yet, in the order of `flows.rl_train`."""
    torch.set_num_threads(1)
    bench = Bench(params, runs / "data", HashScorer())
    with open_run(params, name, runs, bench) as run:
        made = [build_stage(run, artifact) for artifact in planned(params)]
        summarise(run, [artifact for artifact in made if artifact.stage == "update"][-1])


def start(params: RunParams, runs: Path, name: str) -> int:
    """Fork a process, with a session of its own, that trains; its pid."""
    if pid := os.fork():
        return pid
    os.setsid()
    try:
        train(params, runs, name)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def wait(pid: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def kill_in(pid: int, work: Path, delay_s: float) -> None:
    """SIGKILL `pid` `delay_s` after the work folder `work` (or the artifact itself) has appeared."""
    done = work.with_name(work.name.removesuffix(PARTIAL_SUFFIX))
    stop_at = time.monotonic() + PATIENCE_S
    while not work.exists() and not done.exists():
        assert time.monotonic() < stop_at, f"{work} did not appear"
        time.sleep(0.001)
    time.sleep(delay_s)
    os.kill(pid, signal.SIGKILL)


def hit(folder: Path) -> str:
    """The stage whose work folder the killed process left: a kill between two stages leaves none."""
    found = [p.name for p in folder.rglob(f"*{PARTIAL_SUFFIX}") if not p.name.startswith("score-ahead")]
    return stage_of(found[0].removesuffix(PARTIAL_SUFFIX)) if found else "between stages"


def digest(runs: Path, name: str) -> str:
    return json.loads((runs / name / "summary.json").read_text())["adapter_digest"]


def leftovers(folder: Path, sessions: list[int]) -> list[str]:
    """Files and processes that should not be there."""
    names = [
        str(p) for p in folder.rglob("*") if p.suffix == PARTIAL_SUFFIX or p.name.startswith(".writing-")
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
        runs = client.search_runs([client.get_experiment_by_name(pointer["experiment"]).experiment_id])
        own = [run for run in runs if run.data.tags["run_dir"] == str(folder)]
        found += [f"{len(own)} MLflow runs"] * (len(own) != 1)
        for key in (key for run in own for key in run.data.metrics if not key.startswith("system/")):
            steps = [m.step for m in client.get_metric_history(own[0].info.run_id, key)]
            found += [f"MLflow: {key}"] * (len(steps) != len(set(steps)))
        found += ["MLflow: no metrics"] * (len(own) == 1 and len(own[0].data.metrics) < 20)
    return found


def in_a_child(check, *arguments, **options) -> list[str]:
    """What `check` returns, from a process that is gone afterwards: clients have threads, forks want none."""
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
    """Kill run number `number` once in every stage of every round; what came of it."""
    seconds = {s.name: s.seconds for s in status(runs / "whole").stages}
    name, hits, sessions = f"killed-{number}", Counter(), []
    for artifact in planned(params):
        pid = start(params, runs, name)
        sessions.append(pid)
        kill_in(pid, runs / name / (artifact + PARTIAL_SUFFIX), dice.uniform(0, seconds[artifact]))
        if wait(pid) == -signal.SIGKILL:
            hits[hit(runs / name)] += 1
    last = start(params, runs, name)
    assert wait(last) == 0, "the run must finish when nobody kills it"
    return {
        "hits": hits,
        "same_digest": digest(runs, name) == digest(runs, "whole"),
        "leftovers": leftovers(runs / name, [*sessions, last]),
        "twice": in_a_child(twice, runs / name, mlflow=mlflow),
        "damaged": verify(runs / name).problems,
    }


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--algorithm", choices=sorted(ALGORITHMS), action="append")
    parser.add_argument("--runs", type=int, default=2, help="killed runs per algorithm")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-mlflow", dest="mlflow", action="store_false")
    chosen = parser.parse_args()
    if chosen.mlflow:
        import mlflow  # before the forks
        import mlflow.system_metrics.system_metrics_monitor
        import mlflow.tracking._tracking_service.utils  # noqa: F401
    dice, folder = random.Random(chosen.seed), Path(tempfile.mkdtemp(prefix="kill-proof-"))
    results, hits, started = [], Counter(), time.monotonic()
    try:
        model = write_random(folder / "model")
        for split, count in (("train", 7), ("evaluation", 2)):
            write_bench(folder / "cases" / split, num_cases=count, split=split, seed=1)
        for algorithm in chosen.algorithm or sorted(ALGORITHMS):
            params = settings(algorithm, model, folder / "cases", mlflow=chosen.mlflow)
            runs = folder / algorithm
            assert wait(start(params, runs, "whole")) == 0
            for number in range(chosen.runs):
                found = prove(params, runs, number, dice, mlflow=chosen.mlflow)
                hits += found.pop("hits")
                results.append({"algorithm": algorithm, **found})
                print(f"{algorithm} {number}: {sum(hits.values())} kills so far, {found}", file=sys.stderr)
    finally:
        shutil.rmtree(folder)
    good = all(r["same_digest"] and not (r["leftovers"] or r["twice"] or r["damaged"]) for r in results)
    summary = {"kills": sum(hits.values()), "hits": hits, "runs": results, "good": good}
    print(json.dumps(summary | {"seconds": round(time.monotonic() - started)}, indent=1))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
