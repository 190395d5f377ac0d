"""`make services` for real: Prefect's and MLflow's servers, workers, the deployments of
prefect.yaml."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import requests
import yaml

ROOT = Path(__file__).parents[3]
PATIENCE_S = 400.0  # for a busy machine; idle, each step takes seconds, a crash 100 s to be noticed
CANCEL_S = 10.0
SETTINGS = [
    "rounds=1",
    "model.base={model}/flux-fill",
    "model.siglip={model}/siglip",
    "model.initial_adapter={model}/calligrapher.bin",
    "model.width=48",
    "model.height=32",
    "model.mixed_precision='no'",
    "model.gradient_checkpointing=false",
    "model.max_sequence_length=24",
    "model.reference_context=false",
    "data.kind=self",
    "data.train={cases}/train",
    "data.evaluation={cases}/evaluation",
    "warmup.steps=1",
    "warmup.batch_size=2",
    "warmup.lr_scheduler=constant",
    "warmup.lr_warmup_steps=0",
    "warmup.use_8bit_adam=false",
    "rollout.num_cases=2",
    "rollout.num_images_per_prompt=2",
    "rollout.num_inference_steps=3",
    "rollout.batch_size=1",
    "rollout.shard_size=1",
    "nft.num_train_sigmas=1",
    "reward.server_urls=[]",
    "reward.ocr_weight=1",
    "reward.vlm_weight=0",
    "update.use_8bit_adam=false",
    "evaluate.every=1",
    "evaluate.num_cases=2",
    "evaluate.grid_cases=2",
]


class Services:
    """`python -m flows.services` in a folder of its own, and Prefect's API as its UI uses it."""

    def __init__(self, folder: Path, settings: list[str]):
        self.folder, self.runs, self.settings = folder, folder / "runs", settings
        self.ports = [free_port(), free_port()]
        self.api = f"http://127.0.0.1:{self.ports[0]}/api"
        self.environment = os.environ | {"OMP_NUM_THREADS": "1"}
        self.environment.pop("PREFECT_API_URL", None)

    def run(self, *command):
        done = subprocess.run(
            [sys.executable, "-m", *command],
            cwd=self.folder,
            env=self.environment,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    def start(self):
        ports = ["--prefect-port", str(self.ports[0]), "--mlflow-port", str(self.ports[1])]
        return self.run("flows.services", "start", *ports)

    def processes(self):
        notes = [json.loads(path.read_bytes()) for path in (self.runs / ".services").glob("*.json")]
        family = [psutil.Process(note["pid"]) for note in notes if psutil.pid_exists(note["pid"])]
        return family + [child for process in family for child in process.children(recursive=True)]

    def deploy(self, name, run, *more, watch=False):
        overrides = json.dumps([*self.settings, *more])
        flags = ["--param", f"overrides={overrides}", "--param", f"run={run}"]
        return self.run("prefect", "deployment", "run", name, *flags, *["--watch"] * watch)

    def post(self, path, **body):
        return requests.post(f"{self.api}/{path}", json=body, timeout=60).json()

    def flow_run(self, name):
        found = self.post("flow_runs/filter", flow_runs={"name": {"any_": [name]}})
        return found[0] if found else {"state_type": None}

    def trainer(self):
        """The worker of the trainings, and the processes below it: trainer, reward server."""
        note = json.loads((self.runs / ".services/worker-calligrapher-train.json").read_bytes())
        worker = psutil.Process(note["pid"])
        below = worker.children(recursive=True)
        return worker, below


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return listener.getsockname()[1]


def wait_for(condition, patience_s=PATIENCE_S):
    stop_at = time.monotonic() + patience_s
    while not (found := condition()):
        assert time.monotonic() < stop_at
        time.sleep(0.2)
    return found


@pytest.fixture(scope="module")
def services(random_model, tmp_path_factory):
    from calligrapher.tiny.world import write_bench

    folder = tmp_path_factory.mktemp("services")
    for name, count in (("train", 3), ("evaluation", 2)):
        write_bench(folder / "cases" / name, num_cases=count, split=name, seed=1)
    shutil.copy(ROOT / "prefect.yaml", folder)
    shutil.copytree(ROOT / "params", folder / "params")
    evaluation = {"num_cases": 2, "num_images_per_case": 2}
    (folder / "params/evaluate.yaml").write_text(yaml.safe_dump(evaluation))
    places = {"model": random_model, "cases": folder / "cases"}
    services = Services(folder, [setting.format(**places) for setting in SETTINGS])
    services.start()
    processes = services.processes()
    yield services
    processes += services.processes()
    services.run("flows.services", "stop")
    _, alive = psutil.wait_procs(processes, timeout=60)
    assert alive == []
    assert not (folder / "prefect.toml").exists()


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(services):
    """A run of `rl-train/nft`, pointed to a tiny model by overrides; what the command said."""
    return services.deploy("rl-train/nft", "one", watch=True)


def test_a_deployed_run_succeeds_and_leaves_its_summary(services, trained):
    assert "Completed" in trained
    summary = json.loads((services.runs / "one/summary.json").read_text())
    assert (summary["run"], summary["algorithm"], summary["images"]) == ("one", "nft", 4)


def test_prefect_shows_progress_reports_and_our_own_logs(services, trained):
    run_id = services.flow_run("one")["id"]
    artifacts = services.post("artifacts/filter", artifacts={"flow_run_id": {"any_": [run_id]}})
    progress = {a["description"]: a["data"] for a in artifacts if a["type"] == "progress"}
    assert progress["round 0 rollout"] == progress["round 0 update"] == 100
    report = next(a["data"] for a in artifacts if a["key"] == "one-report")
    assert "## Round 0 of one" in report
    assert f"http://127.0.0.1:{services.ports[1]}/#/experiments/" in report
    assert "| 0000-0000" in report
    logs = wait_for(
        lambda: services.post("logs/filter", logs={"flow_run_id": {"any_": [run_id]}}, limit=200)
    )
    assert any(log["name"].startswith("tasks.") and "mean reward" in log["message"] for log in logs)


def test_the_checkpoint_of_a_training_is_evaluated_by_itself(services, trained):
    verdicts = wait_for(
        lambda: list((services.runs / "evaluations/one").glob("*/verdicts/round-0000.json"))
    )
    verdict = json.loads(verdicts[0].read_text())
    assert verdict["champion"] is True
    assert set(verdict["minus"]) == {"base", "warmup"}
    assert verdict["metrics"]["images"] == 4
    for name in ("ocr_accuracy", "style_match", "spread", "background_error"):
        low, mean, high = (verdict["metrics"][f"{name}{end}"] for end in ("_low", "", "_high"))
        assert low <= mean <= high


def test_mlflow_attaches_the_evaluation_to_the_champions_model(services, trained):
    import mlflow

    client = mlflow.MlflowClient(tracking_uri=f"http://127.0.0.1:{services.ports[1]}")
    experiment = client.get_experiment_by_name("calligrapher-rl").experiment_id

    def evaluations():
        return client.search_runs(
            [experiment], "tags.kind = 'evaluation' AND attributes.status = 'FINISHED'"
        )

    evaluation = client.get_run(wait_for(evaluations)[0].info.run_id)
    (model,) = wait_for(
        lambda: [m for m in client.search_logged_models([experiment]) if "champion" in m.tags]
    )
    assert [m.model_id for m in evaluation.inputs.model_inputs] == [model.model_id]
    assert "held_out/style_match" in {metric.key for metric in model.metrics}
    assert evaluation.data.tags["mlflow.parentRunId"] == model.source_run_id
    files = {file.path for file in client.list_artifacts(evaluation.info.run_id, "evaluation")}
    assert {"evaluation/measures.parquet", "evaluation/round-0000.png"} <= files


def test_a_stage_is_made_anew_by_the_deployment_rerun(services, trained):
    settings = {
        "run": "one",
        "stage": "round-0000/update",
        "fork": "five",
        "overrides": '["nft.nft_beta=0.5"]',
    }
    flags = [word for key, value in settings.items() for word in ("--param", f"{key}={value}")]
    assert "Completed" in services.run(
        "prefect", "deployment", "run", "rerun-stage/rerun", "--watch", *flags
    )
    fork = json.loads((services.runs / "five/fork.json").read_text())
    assert (fork["parent"], fork["stage"]) == ("../one", "round-0000/update")
    assert services.flow_run("five")["state_type"] == "COMPLETED"


def test_a_cancelled_run_ends_soon_and_goes_on_under_the_same_name(services):
    services.deploy("rl-train/nft", "two", "rounds=40")
    wait_for(lambda: (services.runs / "two/round-0000/rollout").exists())
    _, processes = services.trainer()
    assert len(processes) >= 2  # and its reward server
    run = services.flow_run("two")
    cancelled = time.monotonic()
    services.post(f"flow_runs/{run['id']}/set_state", state={"type": "CANCELLING"})
    _, alive = psutil.wait_procs(processes, timeout=PATIENCE_S)
    seconds = time.monotonic() - cancelled
    assert alive == []
    assert seconds < CANCEL_S * max(1, os.getloadavg()[0] / (os.cpu_count() or 1)), seconds
    wait_for(lambda: services.flow_run("two")["state_type"] == "CANCELLED")
    assert "Completed" in services.deploy("rl-train/nft", "two", "rounds=1", watch=True)


def test_a_run_whose_machine_died_is_marked_crashed_and_a_retry_resumes_it(services):
    services.deploy("rl-train/nft", "three", "rounds=1", "rollout.num_images_per_prompt=150")
    wait_for(lambda: (services.runs / "three/round-0000/rollout.partial").exists())
    time.sleep(5)  # a heartbeat is sent at the start of the flow
    worker, processes = services.trainer()
    assert (services.runs / "three/round-0000/rollout.partial").exists()
    for process in (worker, *processes):  # as when the power goes
        process.send_signal(signal.SIGKILL)
    wait_for(lambda: services.flow_run("three")["state_type"] == "CRASHED")
    services.start()
    services.run("prefect", "flow-run", "retry", services.flow_run("three")["id"])
    wait_for(lambda: services.flow_run("three")["state_type"] == "COMPLETED")
    assert (services.runs / "three/summary.json").exists()


def test_a_run_goes_on_when_prefects_server_and_mlflows_are_killed(services):
    settings = ["rounds=2", "rollout.num_images_per_prompt=6"]
    settings.append(f"tracking.uri=http://127.0.0.1:{services.ports[1]}")
    services.deploy("rl-train/nft", "four", *settings)
    wait_for(lambda: (services.runs / "four/round-0000/rollout").exists())
    for name in ("prefect-server", "mlflow"):
        note = json.loads((services.runs / f".services/{name}.json").read_bytes())
        server = psutil.Process(note["pid"])
        for process in (*server.children(recursive=True), server):
            process.send_signal(signal.SIGKILL)
    wait_for((services.runs / "four/summary.json").exists)
    rows = [
        json.loads(line) for line in (services.runs / "four/metrics.jsonl").read_text().splitlines()
    ]
    stages = {r["stage"] for r in rows}
    assert stages >= {"round-0001/score", "round-0001/update/idle", "round-0001/evaluate"}
    # Where all rewards of a group are equal the update takes no step: it has counts alone.
    update = json.loads((services.runs / "four/round-0001/update/artifact.json").read_bytes())
    assert ("round-0001/update" in stages) == (update["meta"]["optimizer_steps"] > 0)
    services.start()
    subprocess.run(
        [Path(sys.executable).with_name("calligrapher"), "sync", services.runs / "four"], check=True
    )
