import base64
import io
import json
import re

import pytest
from PIL import Image, ImageChops, ImageStat

from tasks.reports.round_report import mlflow_page, round_report


def test_a_round_is_reported_with_its_numbers_worst_samples_and_links(train):
    folder, _ = train("one", rounds=1)
    report = round_report(folder, 0)
    mean = json.loads((folder / "round-0000/score/artifact.json").read_text())["meta"][
        "reward_mean"
    ]
    assert f"| `score/reward_mean` | {mean:.4g} |" in report
    worst = [line for line in report.splitlines() if line.startswith("| 0000-")]
    assert len(worst) == 5
    rewards = [float(line.split("|")[4]) for line in worst]
    assert rewards == sorted(rewards)
    assert "Fixed cases" not in report, "evaluate.every is 0 in this run"
    assert f"- Artifacts: `{folder / 'round-0000'}`" in report
    assert "MLflow: no server" in report


def test_the_report_carries_the_picture_of_the_fixed_cases(train):
    folder, _ = train("one", rounds=1, evaluate={"every": 1})
    report = round_report(folder, 0)
    assert f"- Fixed cases: `{folder / 'report/grid/000001.png'}`" in report
    encoded = re.search(r"!\[000001\]\(data:image/jpeg;base64,([^)]+)\)", report)[1]
    with (
        Image.open(io.BytesIO(base64.b64decode(encoded))) as shown,
        Image.open(folder / "report/grid/000001.png") as drawn,
    ):
        drawn.thumbnail((768, 768))
        difference = ImageChops.difference(shown, drawn.convert("RGB"))
    assert shown.size == drawn.size
    assert ImageStat.Stat(difference).rms < [12, 12, 12]  # JPEG of a drawing


def test_a_report_links_only_to_what_a_browser_opens_from_prefects_page(train, monkeypatch):
    monkeypatch.setenv("CALLIGRAPHER_MLFLOW_URL", "http://127.0.0.1:5000")
    folder, _ = train("one", rounds=1)
    pointer = {"uri": "sqlite:///x.db", "experiment": "e", "run_id": "r1", "experiment_id": "7"}
    (folder / "mlflow.json").write_text(json.dumps(pointer))
    page = "http://127.0.0.1:5000/#/experiments/7/runs/r1"
    links = re.findall(r"[^!]\[[^]]+\]\(([^)]+)\)", round_report(folder, 0))
    assert links == [page, f"{page}/model-metrics", f"{page}/artifacts"]


def test_the_seconds_of_every_stage_of_a_round_are_logged_once(train):
    for _ in range(2):
        folder, _ = train("one", rounds=1)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    times = [(r["step"], *r["metrics"]) for r in rows if r["stage"].endswith("/time")]
    stages = ("rollout", "score", "advantage", "update", "refresh")
    measured = {stage: ["seconds", "images_per_second"] for stage in ("rollout", "score", "update")}
    assert times == [
        (0, *(f"time/{stage}_{name}" for name in measured.get(stage, ["seconds"])))
        for stage in stages
    ]
    update = json.loads((folder / "round-0000/update/artifact.json").read_text())
    logged = {
        k: v for r in rows if r["stage"].endswith("update/time") for k, v in r["metrics"].items()
    }
    assert update["meta"]["images"] == 9
    assert logged["time/update_images_per_second"] == pytest.approx(9 / update["seconds"])


def test_the_page_in_mlflow_is_known_where_a_server_is(tmp_path, monkeypatch):
    pointer = {"uri": "sqlite:///x.db", "experiment": "e", "run_id": "r1", "experiment_id": "7"}
    (tmp_path / "mlflow.json").write_text(json.dumps(pointer))
    assert mlflow_page(tmp_path) is None
    monkeypatch.setenv("CALLIGRAPHER_MLFLOW_URL", "http://127.0.0.1:5000/")
    assert mlflow_page(tmp_path) == "http://127.0.0.1:5000/#/experiments/7/runs/r1"


def test_text_that_a_model_painted_does_not_become_markup():
    from tasks.reports.round_report import _cell

    assert _cell("a|b`<b>\n") == "`a¦b'<b> `"
    assert _cell("") == "(nothing)"
