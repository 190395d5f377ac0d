"""Scoring: beside sampling, each image against its own case, nothing twice, failures counted."""

import io
import time

import numpy as np
import pytest
from PIL import Image

from calligrapher.errors import RewardError
from calligrapher.tables.parquet import read_shard, read_table
from tasks.stages.score import summary
from tasks.stages.score_ahead import ScoreAhead


def test_a_shard_is_scored_before_the_next_one_is_sampled(train, scorer_class, monkeypatch):
    from tasks.stages import rollout

    events = []

    class Scorer(scorer_class):
        def score(self, images, cases, letters=False):
            events.append("score")
            return super().score(images, cases)

    real = rollout._write

    def write(*args, **more):
        # The thread scores while this one samples: give it time to.
        while events.count("sample") > events.count("score"):
            time.sleep(0.001)
        events.append("sample")
        real(*args, **more)

    monkeypatch.setattr(rollout, "_write", write)
    train("a", scorer=Scorer(), rounds=1)
    assert events == ["sample", "score"] * 3


def test_image_k_is_scored_against_case_k(train, hash_scorer):
    folder, _ = train("a", scorer=hash_scorer, rounds=1)
    shards = sorted((folder / "round-0000/rollout").glob("*.parquet"))
    assert [len(images) for images, _ in hash_scorer.calls] == [4, 4, 1]
    rows = {}
    for shard in shards:
        for name, values in read_shard(shard, ["sample_id", "case_id", "text", "image"]).items():
            rows.setdefault(name, []).extend(values)
    asked = [
        pair for images, cases in hash_scorer.calls for pair in zip(images, cases, strict=True)
    ]
    assert [case.case_id for _, case in asked] == rows["case_id"]
    assert [image for image, _ in asked] == rows["image"]
    assert len(set(rows["text"])) == 3
    assert rows["text"] == [
        t for t in dict.fromkeys(rows["text"]) for _ in range(3)
    ]  # a a a b b b c c c
    tables = [read_table(path) for path in sorted((folder / "round-0000/score").glob("*.parquet"))]
    scored = [pair for t in tables for pair in zip(t["sample_id"], t["reward"], strict=True)]
    assert scored == [
        (i, hash_scorer.reward(image, None))
        for i, image in zip(rows["sample_id"], rows["image"], strict=True)
    ]


def test_when_the_servers_fail_what_was_scored_is_kept_and_the_next_start_scores_the_rest(
    train, scorer_class
):
    class Failing(scorer_class):
        def score(self, images, cases, letters=False):
            if len(self.calls) == 1:
                raise RewardError("the servers are down")
            return super().score(images, cases)

    failing = Failing()
    with pytest.raises(RewardError, match="servers are down"):
        train("a", scorer=failing, rounds=1)
    good = scorer_class()
    folder, resumed = train("a", scorer=good, rounds=1)
    assert [len(images) for images, _ in failing.calls + good.calls] == [4, 4, 1]
    _, whole = train("b", rounds=1)
    assert resumed["adapter_digest"] == whole["adapter_digest"]
    assert [p.name for p in folder.rglob("*.partial")] == []


def test_sampling_ends_soon_after_scoring_has_failed(scorer_class, train, monkeypatch):
    from tasks.stages import rollout

    class Failing(scorer_class):
        def score(self, images, cases, letters=False):
            raise RewardError("the servers are down")

    sampled, real = [], rollout._write

    def write(*args, **more):
        sampled.append(args)
        real(*args, **more)

    monkeypatch.setattr(rollout, "_write", write)
    real_submit = ScoreAhead.submit

    def submit(self, shard):
        real_submit(self, shard)
        assert all(future.exception() for future in self.futures)  # which waits for the thread

    monkeypatch.setattr(ScoreAhead, "submit", submit)
    with pytest.raises(RewardError):
        train("a", scorer=Failing(), rounds=1)
    assert len(sampled) == 2


def test_unscored_images_are_counted_and_dropped_and_never_a_number(train, scorer_class):
    class Patchy(scorer_class):
        def row(self, image, case):
            row = super().row(image, case)
            if sum(len(images) for images, _ in self.calls) == 9 and case is self.calls[-1][1][-1]:
                return dict.fromkeys(row) | {"reason": "ocr_accuracy: engine fell over"}
            return row

    folder, _ = train("a", scorer=Patchy(), rounds=1, reward={"max_unscored_share": 0.2})
    table = {}
    for path in sorted((folder / "round-0000/score").glob("*.parquet")):
        for name, values in read_table(path).items():
            table.setdefault(name, []).extend(values)
    assert table["reward"].count(None) == 1
    assert table["reward"][-1] is None
    assert "fell over" in table["reason"][-1]
    advantages = read_table(folder / "round-0000/advantage/advantages.parquet")
    assert advantages["kept"] == [True] * 8 + [False]
    assert advantages["advantage"][-1] is None
    rewards = table["reward"][6:8]
    assert advantages["group_mean"][-1] == pytest.approx(np.mean(rewards))


def test_too_many_unscored_images_stop_the_run_with_the_counts_and_the_reasons(train, scorer_class):
    class Blind(scorer_class):
        def row(self, image, case):
            if len(self.calls) == 1:
                return dict.fromkeys(super().row(image, case)) | {"reason": "ocr_accuracy: no mask"}
            return super().row(image, case)

    with pytest.raises(RewardError, match=r"At most 10%.*4 of 9 are: ocr_accuracy: no mask"):
        train("a", scorer=Blind(), rounds=1)


def score_table(reward, accuracy, reason, **components):
    nothing = {
        name: [None] * len(reward) for name in ("ocr_likelihood", "vlm_score", "style_score")
    }
    return {"reward": reward, "ocr_accuracy": accuracy, "reason": reason, **nothing, **components}


def test_a_round_without_a_single_score_stops_though_every_share_is_allowed(make_resources):
    resources = make_resources(reward={"max_unscored_share": 1.0})
    table = score_table([None, None], [None, None], ["a", "b"])
    with pytest.raises(RewardError, match="2 of 2 are: a; b"):
        summary(resources.params, [table])


def test_the_summary_of_scores_is_that_of_the_scored_ones(make_resources):
    resources = make_resources(reward={"max_unscored_share": 0.5})
    tables = [
        score_table([0.0, 1.0], [0.0, 1.0], [None, None], style_score=[0.25, 0.75]),
        score_table([0.5, None], [0.5, None], [None, "late"]),
    ]
    found = summary(resources.params, tables)
    assert (found["images"], found["unscored"]) == (4, 1)
    assert found["reward_mean"] == 0.5
    assert found["reward_std"] == pytest.approx((1 / 6) ** 0.5)
    assert (found["reward_p10"], found["reward_p50"], found["reward_p90"]) == (0.1, 0.5, 0.9)
    assert found["exact_match"] == pytest.approx(1 / 3)
    assert (found["style_score_mean"], found["style_score_std"], found["style_score_p90"]) == (
        0.5,
        0.25,
        0.7,
    )
    assert not [name for name in found if name.startswith("vlm_score")], (
        "what was not measured has no number"
    )


def test_the_pictures_that_are_scored_are_those_of_the_canvas(train, hash_scorer):
    train("a", scorer=hash_scorer, rounds=1)
    sizes = {
        Image.open(io.BytesIO(image)).size for images, _ in hash_scorer.calls for image in images
    }
    assert sizes == {(48, 32)}
