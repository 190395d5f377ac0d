"""Rounds that are refilled: further cases in place of groups that have nothing to teach."""

import json

import pytest
from shared_runs import train_on
from small_runs import HashScorer
from two_ranks import on_ranks

from calligrapher.errors import ParamsError, RewardError
from calligrapher.ranks import ALONE
from calligrapher.tables.parquet import read_shard
from tasks.artifacts.artifact import Artifact
from tasks.runs.rerun import prepare_replay

ROUND, KL = {"rounds": 1, "warmup": {"steps": 0}}, {"nft": {"kl_coef": 0.1}}


class Uneven(HashScorer):
    """All images of the cases in `flat` are worth the same; `fails` raises at its n-th call."""

    def __init__(self, flat, fails=None):
        super().__init__()
        self.flat, self.fails = flat, fails

    def reward(self, image, case):
        return 0.25 if case.case_id in self.flat else super().reward(image, case)

    def score(self, images, cases, letters=False):
        if len(self.calls) + 1 == self.fails:
            raise RewardError("the server went away")
        return super().score(images, cases)


@pytest.fixture
def flat(make_resources):
    """Two of the three cases of round 0, and the first that it may be refilled with."""
    cases = make_resources().cases
    return {case.case_id for case in [*cases.of_round(0)[:2], cases.further(0)[0]]}


def meta(folder, stage):
    return json.loads((folder / f"round-0000/{stage}/artifact.json").read_text())["meta"]


def sampled(folder):
    """(case, group) of each group of round 0, in order; each has three members."""
    shards = sorted((folder / "round-0000/rollout").glob("*.parquet"))
    rows = [
        row
        for path in shards
        for row in zip(*read_shard(path, ["case_id", "group_id", "member"]).values(), strict=True)
    ]
    assert [member for _, _, member in rows] == [0, 1, 2] * (len(rows) // 3)
    return [(case_id, group) for case_id, group, member in rows if member == 0]


@pytest.mark.parametrize(
    ("refill", "groups", "lacking"), [(0, 3, None), (1, 5, 1), (2, 6, 0), (5, 6, 0)]
)
def test_a_round_takes_further_cases_until_its_groups_teach(
    train, flat, make_resources, refill, groups, lacking
):
    settings = {"refill": refill}
    folder, summary = train("a", scorer=Uneven(flat), rollout=settings, **ROUND, **KL)
    cases = make_resources().cases
    expected = [*cases.of_round(0), *cases.further(0)[: groups - 3]]
    assert sampled(folder) == [(case.case_id, group) for group, case in enumerate(expected)]
    assert meta(folder, "rollout").get("lacking_groups") == lacking
    assert meta(folder, "score")["images"] == summary["images"] == groups * 3
    teaching = 3 * sum(case.case_id not in flat for case in expected)
    # Without refills a KL holds the images of flat groups; refilled, they are left out.
    assert meta(folder, "update")["images"] == (teaching if refill else 9)
    assert meta(folder, "update")["left_out"] == (groups * 3 - teaching if refill else 0)


def test_a_refill_that_was_interrupted_goes_on_as_if_it_had_not_been(train, flat):
    settings = {"rollout": {"refill": 2}, **ROUND, **KL}
    whole, first = train("a", scorer=Uneven(flat), **settings)
    for fails in (2, 3, 2):  # in the round, in a refill, in the next one
        with pytest.raises(RewardError, match="went away"):
            train("b", scorer=Uneven(flat, fails), **settings)
    scorer = Uneven(flat)
    folder, second = train("b", scorer=scorer, **settings)
    assert len(scorer.calls) < 6, "what was scored before is not scored again"
    assert second["adapter_digest"] == first["adapter_digest"]
    for stage in ("rollout", "score"):
        artifacts = [Artifact.load(run / f"round-0000/{stage}") for run in (folder, whole)]
        assert artifacts[0].digest == artifacts[1].digest


def as_two(ranks, values, folder, runs_dir, flat):
    train_on(ranks, values, folder / "two", runs_dir, scorer=Uneven(flat))
    if ranks.is_first:
        train_on(ALONE, values, folder / "one", runs_dir, scorer=Uneven(flat))


@pytest.mark.slow
def test_two_ranks_refill_a_round_as_one_does(values, flat, encodings, tmp_path):
    settings = values("nft", rollout={"refill": 2}, **ROUND)
    on_ranks(2, as_two, settings, tmp_path, encodings.parent, flat)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).glob("*/rollout/*.parquet")}
        for name in ("one", "two")
    )
    assert one == two
    assert len(one) > 3


def test_where_no_further_case_is_left_the_round_stays_short(train, make_resources):
    every = {case.case_id for case in make_resources().cases.train[1:]}
    folder, _ = train("a", scorer=Uneven(every), rollout={"refill": 9}, **ROUND)
    found = meta(folder, "rollout")
    assert (found["refilled_groups"], found["lacking_groups"]) == (4, 2)
    assert len(set(sampled(folder))) == 7


def test_refills_are_judged_by_the_reward_and_a_replay_may_weigh_it_otherwise(
    train, make_resources, flat
):
    from tasks.pipeline import provenance, reads

    plain, refilled = (make_resources(rollout={"refill": n}).params for n in (0, 1))
    other = make_resources(rollout={"refill": 1}, reward={"ocr_weight": 0.5}).params
    assert not {"refill_by", "teaching_only"} & {*reads(plain, "rollout"), *reads(plain, "update")}
    assert "refill" not in reads(plain, "rollout")["rollout"]
    assert reads(refilled, "rollout") != reads(other, "rollout")
    sources = dict.fromkeys(("model", "train_data", "scored_by"), lambda: "x")
    judged = [provenance("round-0000/rollout", p, sources, {}).extra for p in (plain, refilled)]
    assert judged == [{"round": 0}, {"round": 0, "refilled_by": "x"}]
    parent, _ = train("a", scorer=Uneven(flat), rollout={"refill": 1}, **ROUND)
    prepare_replay(parent, ["reward.ocr_weight=0.5"], "b")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"advantage": {"baseline": "round"}}, "advantage.baseline must be 'group' with rollout."),
        ({"reward": {"disable_reward_model": True}}, "rollout.refill must be 0 with reward.dis"),
    ],
)
def test_a_refill_that_nothing_can_judge_is_refused(make_resources, changes, message):
    with pytest.raises((ParamsError, ValueError), match=message):
        make_resources(rollout={"refill": 1}, **changes)
