"""A component of one's own goes wherever a built-in one goes: tables, metrics, reports, forks."""

import hashlib
import json
import shutil
from contextlib import contextmanager

import pytest
from small_runs import HashScorer

from calligrapher.data.canvas import Canvas
from calligrapher.errors import ParamsError, RewardError
from calligrapher.tables.parquet import read_table
from reward_server.client import RewardResult
from reward_server.components import NAMES
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import RunsDir
from tasks.evaluation.evaluation import EvaluationParams, open_evaluation, params_of
from tasks.evaluation.report import verdict_report
from tasks.params.run_params import RewardParams, RunParams
from tasks.reports.compare import compare
from tasks.reports.round_report import round_report
from tasks.resources.rewards import RewardScorer, check_scorers
from tasks.runs.preflight import preflight
from tasks.runs.rerun import carry_out, prepare_rerun
from tasks.runs.run import open_run, resources_of

SOURCE = "class Legible:\n    def score(self, items):\n        return [0.5] * len(items)\n"


class Answers:
    """A reward client that measures `legible`, null for every fourth picture."""

    def __init__(self):
        self.scored, self.sha256, self.asked_info = 0, "one", 0

    def info(self):
        self.asked_info += 1
        scorers = {"ocr": {"engine": "hash"}, "legible": {"sha256": self.sha256}}
        return {"scorers": scorers, "components": [*NAMES, "legible"]}

    def score_batch(self, items):
        results = []
        for item in items:
            self.scored += 1
            first, second = hashlib.sha256(item.image).digest()[:2]
            value, none = first / 256, second % 4 == 0
            errors = {"legible": "raised ValueError: too dark; really"} if none else {}
            own = {"legible": None if none else 1 - value}
            results.append(RewardResult(ocr_accuracy=value, own=own, errors=errors))
        return results


def weighing(params, client=None):
    scorer = RewardScorer(params, [], Canvas(48, 32))
    scorer.client = client or Answers()
    return scorer


@pytest.fixture
def reward(tmp_path):
    (tmp_path / "r.py").write_text(SOURCE)
    return {
        "ocr_weight": 0.5,
        "weights": {"legible": 0.25},
        "scorers": {"legible": f"{tmp_path}/r.py:Legible"},
        "max_unscored_share": 0.9,
    }


@pytest.fixture
def trained(train, values, reward):
    """`trained(name)` -> the folder of a run of one round whose reward weighs `legible`."""

    def trained(name):
        params = RunParams.model_validate(values("nft", reward=reward)).reward
        evaluated = {"every": 1, "num_images_per_case": 2}
        return train(name, scorer=weighing(params), rounds=1, reward=reward, evaluate=evaluated)[0]

    return trained


def table(folder, name="round-0000/score"):
    rows = {}
    for path in sorted((folder / name).glob("scores*.parquet")):
        for key, values in read_table(path).items():
            rows.setdefault(key, []).extend(values)
    return rows


def test_it_is_a_column_and_a_metric_of_scores_and_evaluations(trained):
    folder = trained("a")
    rows = table(folder)
    for accuracy, legible, reward, reason in zip(
        *(rows[key] for key in ("ocr_accuracy", "legible", "reward", "reason")), strict=True
    ):
        if legible is None:
            assert (reward, reason) == (None, "legible: raised ValueError: too dark; really")
        else:
            assert reward == 0.5 * accuracy + 0.25 * legible
    numbers = [value for value in rows["legible"] if value is not None]
    meta = Artifact.load(folder / "round-0000/score").meta
    assert meta["legible_mean"] == pytest.approx(sum(numbers) / len(numbers))
    assert {"legible_std", "legible_p10", "legible_p50", "legible_p90"} <= meta.keys()
    assert meta["unscored"] == 9 - len(numbers) > 0
    evaluated = Artifact.load(folder / "round-0000/evaluate").meta
    assert evaluated["legible_low"] <= evaluated["legible"] <= evaluated["legible_high"]
    tracked = (folder / "metrics.jsonl").read_text()
    assert '"score/legible_mean"' in tracked
    assert '"evaluate/legible"' in tracked
    assert f"| `score/legible_mean` | {meta['legible_mean']:.4g} |" in round_report(folder, 0)
    assert "legible" in compare(folder, trained("b")).difference


def test_it_is_measured_compared_and_reported_by_the_evaluation(trained, encodings, reward):
    folder = trained("a")
    settings = EvaluationParams(num_cases=2, num_images_per_case=2, seed=7, second_ocr="none")
    params = params_of(folder, settings)
    resources = resources_of(params, RunsDir(encodings.parent), weighing(params.reward))
    with open_evaluation(folder, settings, resources) as this:
        others = {"base": this.measure("base")}
        verdict = this.compare("round-0000", this.measure("round-0000"), others)
    assert {"legible", "legible_low", "legible_high"} <= verdict.metrics.keys()
    assert "legible" in verdict.minus["base"]
    lines = verdict_report(verdict, folder / "sheet.png").splitlines()
    (line,) = [line for line in lines if line.startswith("| legible | ")]
    assert f"{verdict.metrics['legible']:.3f}" in line


def test_other_weights_are_reckoned_from_the_table_and_give_what_scoring_anew_gives(
    trained, encodings
):
    folder = trained("a")
    overrides = ["reward.weights.legible=2", "reward.weights.ocr_accuracy=1"]
    made = []

    def carried_out(todo, scorer):
        resources = resources_of(todo.params, RunsDir(encodings.parent), scorer)
        with open_run(resources, todo.folder.path) as run:
            carry_out(run, todo)
        made.append(table(todo.folder.path))

    recorded = prepare_rerun(folder, "round-0000/score", overrides, "b")
    carried_out(recorded, recorded.recorded_scorer())
    shutil.rmtree(folder / "round-0000/score")  # now nothing is recorded
    asked = prepare_rerun(folder, "round-0000/score", overrides, "c")
    assert asked.recorded_scorer() is None
    carried_out(asked, weighing(asked.params.reward))
    assert made[0] == made[1]
    columns = [made[0][key] for key in ("ocr_accuracy", "legible", "reward")]
    rewards = [None if own is None else ocr + 2 * own for ocr, own, _ in zip(*columns, strict=True)]
    assert made[0]["reward"] == rewards


def test_a_refused_item_has_its_reason_for_every_component(reward):
    refused = RewardResult(errors=dict.fromkeys(NAMES, "the server refused the item: no mask"))
    scored = RewardResult(ocr_accuracy=1.0, own={"legible": 0.5, "unweighed": 0.1})
    rows = weighing(RewardParams(**reward | {"vlm_weight": 0})).weigh([refused, scored])
    assert [row["unweighed"] for row in rows] == [None, 0.1]
    assert rows[0]["reason"].endswith("legible: the server refused the item: no mask")
    assert rows[1]["reward"] == 0.5 + 0.25 * 0.5


def test_a_reference_goes_along_where_ones_own_scorer_may_look_at_it(reward, values):
    from calligrapher.data.dataset import load_cases

    cases = load_cases(values()["data"]["train"])
    scorer = weighing(RewardParams(**reward | {"vlm_weight": 0}))
    assert set(scorer._pictures(cases[0])) == {"mask", "reference"}
    plain = weighing(RewardParams(vlm_weight=0))
    assert set(plain._pictures(cases[0])) == {"mask"}


def test_what_servers_do_not_measure_is_named_with_the_flag(reward):
    scorer = weighing(RewardParams(**reward | {"vlm_weight": 0}))
    scorer.client.info = lambda: {"scorers": {}, "components": ["ocr_accuracy"]}
    told = r"reward\.weights\.legible must be 0 .* --scorer legible=FILE:CLASS"
    with pytest.raises(RewardError, match=told):
        scorer.identity()


def test_a_scorer_that_is_not_there_is_told_before_anything_is_loaded(values, tmp_path, reward):
    reward["scorers"]["legible"] = f"{tmp_path}/r.py:Legibel"
    params = RunParams.model_validate(values("nft", reward=reward))
    with pytest.raises(ParamsError, match=r"reward\.scorers: .* Got Legibel; there are: Legible"):
        preflight(params, tmp_path / "data")
    named = params.reward.model_copy(update={"server_urls": ["http://127.0.0.1:9"]})
    check_scorers(named)  # those servers have their own


@contextmanager
def own_server(params, client, tmp_path):
    """The scorer of a run with a server of its own, as `flows.contexts` makes it."""
    from flows.contexts import identity_note

    scorer = RewardScorer(
        params.reward, [], Canvas(48, 32), identity_note=identity_note(params, tmp_path)
    )
    scorer.client = client
    yield scorer


def test_another_version_of_the_file_is_another_identity(values, tmp_path, reward):
    from flows.contexts import identity_note

    def note(**changes):
        params = RunParams.model_validate(values("nft", reward=reward | changes))
        return identity_note(params, tmp_path)

    before = note()
    moved = shutil.copy(tmp_path / "r.py", tmp_path / "moved.py")
    assert note(scorers={"legible": f"{moved}:Legible"}) == before
    assert note(scorers={"legible": f"{moved}:Legible?a=1"}) != before
    (tmp_path / "r.py").write_text(SOURCE + "\n")
    assert note() != before
    (tmp_path / "r.py").unlink()
    with pytest.raises(ParamsError, match=r"reward\.scorers: scorer legible must be made of"):
        note()


def test_a_file_that_changes_under_a_run_is_no_scorer_of_it(values, tmp_path, reward):
    params = RunParams.model_validate(values("nft", reward=reward))
    client = Answers()
    with own_server(params, client, tmp_path) as scorer:
        noted = scorer.identity()
        for _ in range(2):
            assert scorer.score([], []) == []
        assert client.asked_info == 2, "once for the note, once for what is loaded"
    client.sha256 = "two"
    with own_server(params, client, tmp_path) as scorer:
        assert scorer.identity() == noted
        with pytest.raises(RewardError, match="file of the scorer legible must stay"):
            scorer.score([], [])


def test_runs_without_scorers_of_their_own_ask_no_server_what_it_is(values, tmp_path):
    params = RunParams.model_validate(values("nft"))
    client = Answers()
    with own_server(params, client, tmp_path) as scorer:
        scorer.identity()
        assert scorer.score([], []) == []
    assert client.asked_info == 1
    stored = json.loads(params.model_dump_json())["reward"]
    assert (stored["weights"], stored["scorers"]) == ({}, {})
    assert HashScorer().identity() == {"scorers": "hash"}
