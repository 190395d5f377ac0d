"""TensorBoard and W&B show what the journals hold, each thing once, whatever was killed."""

import time

import pytest
from PIL import Image
from tracked import run_params

from calligrapher.errors import CalligrapherError, ParamsError
from tasks.tracking.backends import wandb as of_wandb
from tasks.tracking.mirror import backend_class, sync
from tasks.tracking.tracker import Tracker


def params(*backends, enabled=True, **changed):
    return run_params(changed, backends=list(backends), enabled=enabled)


def log_a_round(tracker, round_index):
    stage = f"round-{round_index:04d}"
    tracker.log(f"{stage}/score", round_index, {"score/reward_mean": round_index / 8, "x": None})
    tracker.log_rows(
        f"{stage}/update", [(10 * round_index + i, {"update/loss": i / 4}) for i in range(3)]
    )
    tracker.log_image("grid", lambda: Image.new("RGB", (9, 7), (round_index, 0, 0)), round_index)
    picture = Image.new("RGB", (9, 7), (0, round_index, 0))
    tracker.log_image("learning_curve", lambda: picture, round_index, slider=False)
    tracker.log_histogram("score/reward", [0.0, 0.0, 0.5, float(round_index)], round_index)


def killed(tracker, round_index):
    """Log a round, have it shown, and leave everything as a kill does."""
    log_a_round(tracker, round_index)
    tracker.close("KILLED", timeout_s=60)
    assert tracker.failures == 0


def values(folder):
    """(tag, step) -> each value that TensorBoard's own reader finds there."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for path in sorted(folder.glob("events*")):
        reader = EventAccumulator(str(path), {"images": 0, "histograms": 0, "scalars": 0})
        reader.Reload()
        kinds = {"scalars": "value", "images": "encoded_image_string"}
        for event in reader.Tensors("params") if "params" in reader.Tags()["tensors"] else ():
            text = event.tensor_proto.string_val[0].decode()
            found.setdefault(("params", event.step), []).append(text)
        for kind, value in (*kinds.items(), ("histograms", "histogram_value")):
            for tag in reader.Tags()[kind]:
                for event in getattr(reader, kind.capitalize())(tag):
                    found.setdefault((tag, event.step), []).append(getattr(event, value))
    return found


@pytest.fixture
def run_dir(tmp_path):
    return tmp_path / "runs" / "one"


def test_tensorboard_shows_each_value_once_after_a_kill_a_resume_and_a_sync(run_dir):
    killed(Tracker(run_dir, params("tensorboard")), 1)
    (first,) = (run_dir / "tensorboard").iterdir()
    first.write_bytes(first.read_bytes()[:-9])  # the last value is written half
    resumed = Tracker(run_dir, params("tensorboard", rounds=5))
    log_a_round(resumed, 1)
    killed(resumed, 2)
    sync(run_dir, to=["tensorboard"])
    found = values(run_dir / "tensorboard")
    assert {key: len(each) for key, each in found.items()} == dict.fromkeys(found, 1)
    assert found["score/reward_mean", 2] == [0.25]
    assert [found["update/loss", 10 + i] for i in range(3)] == [[0.0], [0.25], [0.5]]
    assert sorted(step for tag, step in found if tag == "score/reward") == [1, 2]
    assert found["grid", 2] == [(run_dir / "report/grid/000002.png").read_bytes()]
    (histogram,) = found["score/reward", 2]
    assert (histogram.min, histogram.max, histogram.num) == (0, 2, 4)
    assert [histogram.bucket[0], histogram.bucket[-1]] == [2, 1]
    assert ("x", 1) not in found
    assert "| `rounds` | 2 |" in found["params", 0][0]
    assert "| `rounds` | 5 |" in found["params", 1][0]
    assert len(list((run_dir / "tensorboard").iterdir())) == 2, "a sync of nothing adds no file"


def test_any_tracker_is_filled_later_from_the_journals(run_dir):
    with Tracker(run_dir, params("tensorboard", enabled=False)) as tracker:
        log_a_round(tracker, 1)
    assert not (run_dir / "tensorboard").exists()
    (place,) = sync(run_dir, to=["tensorboard"])
    assert place == f"TensorBoard (`tensorboard --logdir {run_dir}/tensorboard`)"
    assert values(run_dir / "tensorboard")["score/reward_mean", 1] == [0.125]


def test_weights_and_biases_offline_has_each_row_once_after_a_kill_and_a_resume(
    run_dir, monkeypatch
):
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    killed(Tracker(run_dir, params("wandb")), 1)
    files = sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    before = rows_once_written(run_dir, 7)
    # What a kill cuts off is the last row, or half of it.
    data = files[0].read_bytes()
    cut = next(n for n in range(0, len(data), 7) if len(_rows_of(data[: len(data) - n])) == 6)
    files[0].write_bytes(data[: len(data) - cut])
    resumed = Tracker(run_dir, params("wandb"))
    log_a_round(resumed, 1)
    killed(resumed, 2)
    rows = rows_once_written(run_dir, 14)
    assert len(before) == 7
    found = [(row["stage"], row["step"]) for row in rows]
    assert sorted(found) == sorted(set(found))
    assert len(found) == 14
    by_key = dict(zip(found, rows, strict=True))
    assert by_key["round-0002/score", 2]["score/reward_mean"] == 0.25
    assert by_key["round-0001/update", 12]["update/loss"] == 0.5
    assert by_key["image/grid", 2]["grid._type"] == "image-file"
    assert sum(by_key["histogram/score/reward", 2]["score/reward_histogram.values"]) == 4
    assert len({path.stem for path in run_dir.glob("wandb/offline-run-*/*.wandb")}) == 1


def rows_once_written(run_dir, count):
    """The rows in W&B's files; its own process writes the last ones after the run has ended."""
    for _ in range(100):
        if len(rows := list(of_wandb.rows(run_dir / "wandb"))) >= count:
            break
        time.sleep(0.05)
    return rows


def _rows_of(data):
    from wandb.proto.wandb_internal_pb2 import Record

    return [r for r in of_wandb._records(data) if Record.FromString(r).history.item]


def test_a_tracker_that_fails_keeps_no_other_from_its_lines(run_dir, monkeypatch, caplog):
    from tasks.tracking.backends import mlflow

    def refused(*given):
        raise ConnectionError("refused")

    monkeypatch.setattr(mlflow.Backend, "__init__", refused)
    tracker = Tracker(run_dir, params("mlflow", "tensorboard"))
    log_a_round(tracker, 1)
    tracker.close(timeout_s=60)
    assert tracker.failures > 0
    assert values(run_dir / "tensorboard")["score/reward_mean", 1] == [0.125]
    assert "showing the run in MLflow failed, training goes on" in caplog.text


def test_a_tracker_that_is_not_there_is_told_with_those_that_are(monkeypatch, run_dir):
    with pytest.raises(ParamsError, match=r"some of mlflow, tensorboard, wandb\. Got 'aim'"):
        backend_class("aim")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ParamsError, match=r"needs the package wandb.*calligrapher\[wandb\]"):
        backend_class("wandb")


def test_an_mlflow_store_is_no_address_of_another_tracker(run_dir):
    with Tracker(run_dir, params(enabled=False)):
        pass
    (run_dir / "metrics.jsonl").write_text("")
    with pytest.raises(CalligrapherError, match=r"--uri is MLflow's.*Got tensorboard"):
        sync(run_dir, "sqlite:///x.db", ["tensorboard"])
