"""The evaluation of a small run's checkpoints: what is measured, compared, and found again."""

import json

import pyarrow.parquet as pq
import pytest

from calligrapher.errors import ArtifactError, DataError, ParamsError
from tasks.artifacts.layout import RunsDir
from tasks.evaluation.evaluation import (
    EvaluationParams,
    load_evaluation_params,
    newest_checkpoint,
    open_evaluation,
    params_of,
)
from tasks.evaluation.measures import CASES, MEASURED, MEASURES
from tasks.runs.run import resources_of

SETTINGS = EvaluationParams(num_cases=2, num_images_per_case=2, seed=7, second_ocr="none")


@pytest.fixture
def opened(train, encodings, scorer_class):
    """`opened(folder)` -> an Evaluation of that run; the scorer's calls are in
    `.resources.scorer.calls`."""

    def opened(folder, settings=SETTINGS):
        params = params_of(folder, settings)
        resources = resources_of(params, RunsDir(encodings.parent), scorer_class())
        return open_evaluation(folder, settings, resources)

    return opened


def test_a_checkpoint_is_measured_against_base_and_warmup_and_found_again(train, opened):
    folder, _ = train("one")
    assert newest_checkpoint(folder) == "round-0001"
    for _ in range(2):
        with opened(folder) as this:
            others = {name: this.measure(name) for name in this.earlier("round-0001")}
            verdict = this.compare("round-0001", this.measure("round-0001"), others)
    assert this.resources.scorer.calls == [], "the second time everything is there"
    assert list(verdict.minus) == ["base", "warmup"]
    assert verdict.champion
    assert verdict.metrics["images"] == 4
    assert verdict.metrics["spread_low"] <= verdict.metrics["spread"]
    assert "second_ocr_accuracy" not in verdict.metrics
    made = this.folder.stage_path("round-0001")
    assert pq.read_table(made / MEASURES).num_rows == 4
    assert pq.read_table(made / CASES).column_names == ["case_id", *MEASURED]
    written = json.loads((this.folder.path / "verdicts/round-0001.json").read_text())
    assert written["minus"] == verdict.minus


def test_a_later_checkpoint_is_also_compared_with_the_best_so_far(train, opened):
    folder, _ = train("one")
    with opened(folder) as this:
        this.compare("round-0000", this.measure("round-0000"), {"base": this.measure("base")})
        assert this.earlier("round-0001") == ["base", "warmup", "round-0000"]
        assert this.earlier("round-0000") == ["base", "warmup"]


def test_other_settings_get_a_place_of_their_own(train, opened):
    folder, _ = train("one", rounds=1)
    with opened(folder) as one, opened(folder, SETTINGS.model_copy(update={"seed": 8})) as two:
        assert one.folder.path != two.folder.path


def test_fresh_noise_is_the_runs_own_unless_the_evaluation_names_another(train, opened):
    plain, _ = train("plain", rounds=1)
    noisy, _ = train("noisy", rounds=1, evaluate={"noise_level": 0.5})
    fresh = SETTINGS.model_copy(update={"noise_level": 0.5})
    keys, pictures = [], []
    for folder, settings in ((plain, SETTINGS), (plain, fresh), (noisy, SETTINGS), (noisy, fresh)):
        with opened(folder, settings) as this:
            keys.append(this.folder.path.name)
            pictures.append(this.measure("base").files["images.parquet"].sha256)
    assert keys[0] != keys[1] == keys[2] == keys[3]
    assert pictures[0] != pictures[1] == pictures[2] == pictures[3]


def test_a_checkpoint_that_is_not_there_is_named(train, opened, tmp_path):
    folder, _ = train("one", rounds=1)
    with opened(folder) as this, pytest.raises(ArtifactError, match="round-0042"):
        this.measure("round-0042")
    with pytest.raises(DataError, match="must be the folder of a run"):
        params_of(tmp_path / "nothing", SETTINGS)


def test_an_unknown_key_of_the_evaluation_file_is_told(tmp_path):
    (tmp_path / "evaluate.yaml").write_text("num_case: 3\n")
    with pytest.raises(ParamsError, match="num_case"):
        load_evaluation_params(tmp_path / "evaluate.yaml")


def test_round_10000_is_newer_than_round_9999(tmp_path):
    for name in ("round-9999", "round-10000"):
        (tmp_path / name / "update").mkdir(parents=True)
        (tmp_path / name / "update" / "artifact.json").write_text("{}")
    assert newest_checkpoint(tmp_path) == "round-10000"


def test_a_run_without_held_out_cases_is_told_so(train):
    folder, _ = train("one", rounds=1)
    params = json.loads((folder / "params.json").read_text())
    params["data"]["evaluation"] = None
    params["evaluate"]["every"] = 0
    (folder / "params.json").write_text(json.dumps(params))
    with pytest.raises(DataError, match="must have held-out cases"):
        params_of(folder, SETTINGS)
