import errno
import json
import logging
import os
import threading
import time
from pathlib import Path

import pytest
from PIL import Image
from tracked import run_params

import tasks.tracking.feed
import tasks.tracking.tracker
from calligrapher.errors import ArtifactError, CalligrapherError
from tasks.artifacts.layout import PARAMS
from tasks.tracking.locate import locate
from tasks.tracking.mirror import sync
from tasks.tracking.models import TrackedRun
from tasks.tracking.tracker import Tracker


def log_a_round(tracker, run_dir, round):
    """What the flow logs after each stage; on resume it logs the same again."""
    stage = f"round-{round:04d}"
    tracker.log(f"{stage}/score", round, {"score/reward_mean": round / 8, "score/odd name!": 1.0})
    tracker.log_rows(
        f"{stage}/update", [(10 * round + i, {"update/loss": 1 / (i + 1)}) for i in range(3)]
    )
    tracker.log(f"{stage}/evaluate", round, {"evaluate/ocr_accuracy": round / 4})
    tracker.log_image("grid/fixed", lambda: Image.new("RGB", (9, 7), (round, 0, 0)), round)
    tracker.log_image(
        "learning_curve", lambda: Image.new("RGB", (9, 7), (0, round, 0)), round, slider=False
    )
    tracker.log_dataset("rollout", f"{round}{'ab' * 31}c", run_dir / stage / "rollout", "rollout")
    tracker.log_checkpoint(
        stage,
        f"{round}cd",
        run_dir / stage / "refresh",
        round,
        {"evaluate/ocr_accuracy": round / 4},
    )


@pytest.fixture
def offline(tmp_path):
    return lambda: Tracker(tmp_path / "runs" / "one", run_params(enabled=False))


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_metrics_jsonl_holds_every_row_once_however_often_a_stage_is_replayed(offline, tmp_path):
    for _ in range(2):
        with offline() as tracker:
            for round in (1, 2):
                log_a_round(tracker, tmp_path / "runs" / "one", round)
    found = lines(tmp_path / "runs" / "one" / "metrics.jsonl")
    assert len(found) == 2 * (1 + 3 + 1)
    assert found[1]["stage"] == "round-0001/update"
    assert (found[1]["step"], found[1]["metrics"]) == (10, {"update/loss": 1.0})
    assert tracker.history("evaluate/ocr_accuracy") == [(1, 0.25), (2, 0.5)]
    assert tracker.failures == 0


def test_a_number_that_is_not_finite_becomes_null_and_is_no_point_of_the_curve(offline, tmp_path):
    with offline() as tracker:
        tracker.log("round-0001/update", 1, {"update/loss": float("nan"), "update/kl": None})
        tracker.log("round-0001/update", 2, {"update/loss": 0.5})
    first = lines(tmp_path / "runs" / "one" / "metrics.jsonl")[0]
    assert first["metrics"] == {
        "update/loss": None,
        "update/kl": None,
    }
    assert tracker.history("update/loss") == [(2, 0.5)]


def test_pictures_lie_in_the_run_folder(offline, tmp_path):
    with offline() as tracker:
        log_a_round(tracker, tmp_path, 1)
        log_a_round(tracker, tmp_path, 2)
    assert tracker.has_image("grid/fixed", 2)
    assert not tracker.has_image("grid/fixed", 3)
    report = tmp_path / "runs" / "one" / "report"
    found = sorted(path.relative_to(report).as_posix() for path in report.rglob("*.png"))
    assert found == ["grid/fixed/000001.png", "grid/fixed/000002.png", "learning_curve.png"]
    assert Image.open(report / "learning_curve.png").getpixel((0, 0)) == (0, 2, 0)


def test_a_picture_that_cannot_be_drawn_does_not_stop_the_run(offline, tmp_path):
    with offline() as tracker:
        tracker.log_image("grid", lambda: 1 / 0, 3)
        assert tracker.failures == 1
        assert not tracker.has_image("grid", 3)


def test_tracking_never_raises_and_warns_once(offline, tmp_path, monkeypatch, caplog):
    tracker = offline()

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        log_a_round(tracker, tmp_path, 1)
        tracker.log("round-0001/score", 1, {"score/reward_mean": "high"})
    assert tracker.failures == 8
    assert [r.message for r in caplog.records] == [
        "tracking: log_rows failed, training goes on: OSError: [Errno 28] No space left on device"
    ]


def test_a_run_folder_that_cannot_be_made_does_not_stop_the_run(tmp_path):
    (tmp_path / "file").write_text("")
    tracker = Tracker(tmp_path / "file" / "run", run_params())
    tracker.log("round-0001/score", 1, {"score/reward_mean": 0.5})
    assert tracker.history("score/reward_mean") == []
    assert tracker.failures == 2
    tracker.close()


class Stub:
    title = "Stub"

    @classmethod
    def prepare(cls, run_dir, tracking):
        return "nowhere"


class HungMirror(Stub):
    """An MLflow server that takes the connection and never answers."""

    def __init__(self, *args):
        self.released = threading.Event()

    def catch_up(self):
        self.released.wait(30)


def test_a_hung_server_costs_the_run_nothing_but_the_time_limit_at_its_end(
    tmp_path, monkeypatch, caplog
):
    monkeypatch.setattr(tasks.tracking.tracker, "backend_class", lambda name: HungMirror)
    tracker = Tracker(tmp_path / "one", run_params())
    started = time.monotonic()
    for step in range(300):
        tracker.log("round-0001/update", step, {"update/loss": 1.0})
    logged = time.monotonic() - started
    tracker.close(timeout_s=0.3)
    assert logged < 0.05 * 300
    assert time.monotonic() - started - logged < 5
    assert "is complete, Stub may not be (0 failures). `calligrapher sync" in caplog.text
    assert len(lines(tmp_path / "one" / "metrics.jsonl")) == 300


class BrokenMirror(Stub):
    attempts = 0

    def __init__(self, *args):
        type(self).attempts += 1
        raise ConnectionError("refused")


def test_after_three_failures_in_a_row_mlflow_is_left_alone_until_the_end(tmp_path, monkeypatch):
    monkeypatch.setattr(tasks.tracking.tracker, "backend_class", lambda name: BrokenMirror)
    monkeypatch.setattr(tasks.tracking.feed, "_GATHER_S", 0.01)
    tracker = Tracker(tmp_path / "one", run_params())
    for step in range(12):
        tracker.log("round-0001/update", step, {"update/loss": 1.0})
        time.sleep(0.02)
    tracker.close()
    assert 2 <= BrokenMirror.attempts <= 4
    assert tracker.failures == BrokenMirror.attempts


def test_what_is_logged_in_a_short_time_goes_to_mlflow_together(tmp_path, monkeypatch):
    sent = []

    class CountedMirror(Stub):
        def __init__(self, run_dir, journals, failed):
            self.metrics = journals[0]

        def catch_up(self):
            sent.append(len(self.metrics.read()))

        def end(self, status):
            pass

    monkeypatch.setattr(tasks.tracking.tracker, "backend_class", lambda name: CountedMirror)
    monkeypatch.setattr(tasks.tracking.feed, "_GATHER_S", 30)
    tracker = Tracker(tmp_path / "one", run_params())
    for step in range(12):
        tracker.log("round-0001/update", step, {"update/loss": 1.0})
        time.sleep(0.02)
    started = time.monotonic()
    tracker.close()
    assert sent == [12]
    assert time.monotonic() - started < 5, "the end waits for nothing more"


def test_sync_of_what_is_no_run_is_refused(tmp_path):
    with pytest.raises(
        CalligrapherError, match=r"must be the folder of a run\. It holds no metrics\.jsonl"
    ):
        sync(tmp_path)


@pytest.fixture(scope="module")
def mlflow_runs(tmp_path_factory):
    """A run that is tracked, killed, goes on without MLflow, is tracked again and then synced."""
    runs = tmp_path_factory.mktemp("runs")
    here = tmp_path_factory.mktemp("here")
    before = os.getcwd()
    os.chdir(here)
    run_dir = runs / "one"
    tracker = Tracker(run_dir, run_params(), tags={"note": "a"})
    log_a_round(tracker, run_dir, 1)
    tracker.close("KILLED", timeout_s=600)
    assert tracker.failures == 0
    with Tracker(run_dir, run_params(enabled=False)) as silent:
        log_a_round(silent, run_dir, 1)
        log_a_round(silent, run_dir, 2)
    resumed = Tracker(run_dir, run_params().model_copy(update={"rounds": 5}))
    log_a_round(resumed, run_dir, 2)
    resumed.close(timeout_s=600)
    assert resumed.failures == 0
    run_id = json.loads((run_dir / "mlflow.json").read_text())["run_id"]
    assert sync(run_dir) == [f"MLflow run {run_id}"]
    os.chdir(before)
    return runs, run_id, here


@pytest.mark.slow
def test_mlflow_shows_each_point_once_after_a_kill_a_resume_and_a_sync(mlflow_runs):
    import mlflow

    runs, run_id, here = mlflow_runs
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")
    run = client.get_run(run_id)

    def points(key):
        return [(m.step, m.value) for m in client.get_metric_history(run_id, key)]

    assert run.info.status == "FINISHED"
    assert run.info.run_name == "one"
    assert points("score/reward_mean") == [(1, 0.125), (2, 0.25)]
    assert points("score/odd name_") == [(1, 1.0), (2, 1.0)]
    assert points("update/loss") == [(r * 10 + i, 1 / (i + 1)) for r in (1, 2) for i in range(3)]
    assert points("evaluate/ocr_accuracy") == [(1, 0.25), (2, 0.5)]
    assert list(here.iterdir()) == [], "nothing may be written to where the process was started"


@pytest.mark.slow
def test_mlflow_has_the_params_tags_pictures_data_and_checkpoints_once(mlflow_runs):
    import mlflow

    runs, run_id, _ = mlflow_runs
    client = mlflow.MlflowClient(tracking_uri=f"sqlite:///{runs / 'mlflow.db'}")
    run = client.get_run(run_id)
    assert run.data.params["nft.nft_beta"] == "0.5"
    assert run.data.params["rounds"] == "2"
    assert run.data.tags["changed.rounds"] == "2 -> 5"
    assert (run.data.tags["algorithm"], run.data.tags["note"]) == ("nft", "a")
    images = [f.path for f in client.list_artifacts(run_id, "images") if f.path.endswith(".png")]
    assert sorted(path.split("+timestamp")[0] for path in images) == [
        "images/grid~fixed+step+1",
        "images/grid~fixed+step+2",
    ]
    served = {Path(client.download_artifacts(run_id, path)).read_bytes() for path in images}
    assert served == {path.read_bytes() for path in (runs / "one/report/grid/fixed").glob("*.png")}
    assert [f.path for f in client.list_artifacts(run_id, "report")] == [
        "report/learning_curve.png"
    ]
    digests = sorted(i.dataset.digest for i in run.inputs.dataset_inputs)
    assert digests == [f"{round}{'ab' * 31}"[:32] for round in (1, 2)]
    best = client.search_logged_models(
        [run.info.experiment_id],
        order_by=[{"field_name": "metrics.evaluate/ocr_accuracy", "ascending": False}],
    )
    assert [(model.name, model.tags["digest"]) for model in best] == [
        ("round-0002", "2cd"),
        ("round-0001", "1cd"),
    ]
    assert os.environ["DO_NOT_TRACK"] == "true"


@pytest.mark.slow
def test_a_checkpoint_is_found_by_the_uri_of_its_model_and_as_its_runs_champion(mlflow_runs):
    runs, _, _ = mlflow_runs
    (runs / "one" / PARAMS).write_text("{}")
    tracked = TrackedRun(runs / "one")
    place = runs / "one" / "round-0001" / "refresh"
    model_id = tracked.logged_model("round-0001", "1cd", place)
    assert locate(f"models:/{model_id}", runs) == (runs / "one", "round-0001/refresh")
    with pytest.raises(ArtifactError, match=r"one must have a champion\. None"):
        locate("models:/one@champion", runs)
    tracked.mark_champion(
        tracked.logged_model("round-0002", "2cd", runs / "one" / "round-0002" / "refresh")
    )
    tracked.mark_champion(model_id)
    assert locate("models:/one@champion", runs) == (runs / "one", "round-0001/refresh")
    with pytest.raises(
        ArtifactError, match=r"must hold the run of the model m-0\. No MLflow of its runs"
    ):
        locate("models:/m-0", runs)
