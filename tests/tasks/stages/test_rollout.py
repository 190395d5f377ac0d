"""Sampling a round: what an image is depends on seed, round, case and member, not on how the work
is cut."""

import math
from collections import Counter

import pytest
import torch

from calligrapher.errors import ParamsError
from calligrapher.tables.parquet import decode_png, read_shard
from tasks.artifacts.artifact import Artifact
from tasks.stages.rollout import rollout


@pytest.fixture
def start(train):
    """The warm-up of a run of no rounds of its own: the policy that samples."""
    folder, _ = train("start", rounds=1, warmup={"steps": 0})
    return Artifact.load(folder / "warmup")


@pytest.fixture
def sample_round(make_resources, start, tmp_path):
    """The columns of a round that was sampled with the given settings, and the resources."""

    def sample_round(algorithm="nft", columns=None, **changes):
        resources = make_resources(algorithm, **changes)
        out = tmp_path / str(len(list(tmp_path.iterdir())))
        out.mkdir()
        rollout(resources, 0, out, old=start, ahead=tmp_path / "ahead")
        rows = {}
        for path in sorted(out.glob("*.parquet")):
            for name, values in read_shard(path, columns).items():
                rows.setdefault(name, []).extend(values)
        return rows, resources

    return sample_round


def cut(batch_size, shard_size):
    return {"rollout": {"batch_size": batch_size, "shard_size": shard_size}}


def test_latents_do_not_depend_on_batches_and_shards(sample_round):
    whole = torch.stack(sample_round(**cut(9, 9))[0]["x0"])
    for batch_size, shard_size in ((1, 4), (2, 4), (5, 7)):
        parts = torch.stack(sample_round(**cut(batch_size, shard_size))[0]["x0"])
        assert (parts - whole).abs().max() <= 1e-5
    assert len({row.numpy().tobytes() for row in whole}) == 9


def test_equal_batches_in_other_shards_give_equal_bits(sample_round):
    columns = ["x0", "image", "seed", "sample_id", "member", "group_id"]
    one, two = (sample_round(columns=columns, **cut(3, shard))[0] for shard in (3, 6))
    assert torch.equal(torch.stack(one.pop("x0")), torch.stack(two.pop("x0")))
    assert one == two
    assert one["member"] == [0, 1, 2] * 3
    assert one["group_id"] == [0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_a_group_shares_its_window_and_the_tables_hold_what_was_sampled(sample_round):
    rows, _ = sample_round(
        "grpo",
        grpo={"window_size": 1},
        rollout={"num_inference_steps": 6, "num_images_per_prompt": 2},
    )
    sigmas = torch.stack(rows["window_sigmas"])
    assert sigmas.shape == (6, 2)
    assert torch.equal(sigmas[0::2], sigmas[1::2])
    trajectory = torch.stack(rows["trajectory"])
    assert trajectory.shape[:2] == (6, 2)
    assert torch.stack(rows["log_prob"]).shape == (6, 1)
    assert "mean_old" not in rows


SHARED = {"shared_trunk": True, "num_inference_steps": 6}


@pytest.mark.parametrize("reference_context", [False, True])
@pytest.mark.parametrize(("batch_size", "shard_size"), [(3, 6), (2, 4), (9, 9)])
def test_a_shared_trunk_samples_the_same_images(
    sample_round, batch_size, shard_size, reference_context
):
    def sampled(shared):
        rows, _ = sample_round(
            "grpo",
            grpo={"noise": "group", "window_size": 2, "guard": True},
            model={"reference_context": reference_context},
            rollout=SHARED
            | {"batch_size": batch_size, "shard_size": shard_size, "shared_trunk": shared},
        )
        return rows

    alone, shared = sampled(False), sampled(True)
    assert alone["seed"] == shared["seed"]
    assert alone["sample_id"] == shared["sample_id"]
    for name in ("x0", "trajectory", "log_prob", "mean_old", "window_sigmas"):
        for one, other in zip(alone[name], shared[name], strict=True):
            assert (one - other).abs().max() <= 1e-5
    begin = [row[0] for row in shared["trajectory"]]
    assert torch.equal(begin[0], begin[1]) == (batch_size > 1)
    assert not torch.equal(begin[2], begin[3])


def test_a_trunk_of_one_image_gives_equal_bits_where_its_batches_are_equal(sample_round):
    def sampled(shared):
        rows, _ = sample_round(
            "grpo",
            grpo={"noise": "group", "window_size": 2, "timestep_fraction": 0.5},
            rollout=SHARED | {"batch_size": 1, "shared_trunk": shared},
        )
        return rows

    alone, shared = sampled(False), sampled(True)
    assert any(row[0] < 1 for row in alone["window_sigmas"])  # there is a trunk
    for name in ("x0", "trajectory", "log_prob", "image"):
        for one, other in zip(alone[name], shared[name], strict=True):
            assert one == other if name == "image" else torch.equal(one, other)


def test_different_groups_have_different_windows(make_resources):
    from calligrapher.sampling.exploration import windows_of

    params = make_resources("grpo").params.grpo
    starts = windows_of(
        [f"case-{i}" for i in range(40)], 3, round_index=0, num_steps=6, exploration=params
    )
    assert set(starts) == {0, 1, 2, 3, 4}
    again = windows_of(
        [f"case-{i}" for i in range(40)], 3, round_index=1, num_steps=6, exploration=params
    )
    assert starts != again


@pytest.mark.parametrize("reference_context", [False, True])
@pytest.mark.parametrize("algorithm", ["nft", "grpo"])
def test_each_case_is_encoded_once_in_a_run_and_each_batch_costs_one_call_per_step(
    make_resources, start, tmp_path, count_calls, algorithm, reference_context
):
    resources = make_resources(algorithm, model={"reference_context": reference_context})
    resources.cases.data_dir = tmp_path / "fresh"
    resources.weights(start.file("trained.safetensors"))
    with count_calls(resources.model) as calls:
        for round in range(3):  # The third begins the second pass over the seven cases.
            (out := tmp_path / str(round)).mkdir()
            rollout(resources, round, out, old=start, ahead=tmp_path / "ahead")
    cases = {case.case_id for round in range(3) for case in resources.cases.of_round(round)}
    assert len(cases) < 3 * 3
    batches = 3 * (2 + 2 + 1)  # rounds * those of shards of 4, 4 and 1
    encoders = dict.fromkeys(("clip", "t5", "siglip", "vae_encode"), len(cases))
    assert calls == encoders | {"transformer": 3 * batches, "vae_decode": batches}


@pytest.mark.parametrize(("width", "height"), [(96, 32), (48, 64)])
def test_pictures_have_the_canvas_size(sample_round, width, height):
    rows, resources = sample_round(
        model={"width": width, "height": height},
        rollout={"num_cases": 2, "num_images_per_prompt": 1},
        advantage={"baseline": "round"},
    )
    assert {decode_png(image).size for image in rows["image"]} == {(width, height)}
    assert rows["x0"][0].shape == (width * height // resources.model.multiple**2, 64)


def test_pictures_do_not_show_the_reference_that_is_stacked_on_top(train):
    folder, summary = train("a", rounds=1, model={"reference_context": True}, evaluate={"every": 1})
    rows = read_shard(folder / "round-0000/rollout/shard-0000.parquet", ["image", "x0"])
    assert decode_png(rows["image"][0]).size == (48, 32)
    assert rows["x0"].shape[1] > 48 * 32 // 64  # the reference's rows are sampled along
    assert len(summary["adapter_digest"]) == 64


def test_no_case_is_drawn_twice_in_a_round_and_every_pass_covers_the_data(make_resources):
    resources = make_resources(rollout={"num_cases": 1, "num_batches_per_epoch": 2})
    rounds = [[case.case_id for case in resources.cases.of_round(round)] for round in range(6)]
    assert all(len(set(ids)) == 2 for ids in rounds)
    assert (
        len({i for ids in rounds[:3] for i in ids}) == 6
    )  # 7 cases, 2 a round: one waits for the next pass
    assert rounds[:3] != rounds[3:]


def test_cases_with_weighed_letters_are_drawn_as_often_as_their_product_says(make_resources):
    resources = make_resources(rollout={"num_cases": 1})
    texts = [case.text for case in resources.cases.train]
    common = max(texts[0], key=lambda letter: sum(letter in text for text in texts))
    letters = dict.fromkeys({common, texts[0][-1]}, 3.0)
    resources = make_resources(rollout={"num_cases": 1, "letter_weights": letters})
    rounds = 3000
    drawn = Counter(c.case_id for r in range(rounds) for c in resources.cases.of_round(r))
    wanted = [math.prod(letters.get(letter, 1.0) for letter in text) for text in texts]
    for case, weight in zip(resources.cases.train, wanted, strict=True):
        share = weight / sum(wanted)
        apart = 4 * math.sqrt(share * (1 - share) * rounds)
        assert drawn[case.case_id] == pytest.approx(share * rounds, abs=apart)
    assert len(set(wanted)) >= 3, "1, 3, and a product of more than one"


def test_a_round_by_weight_has_no_case_twice_and_a_refill_the_others(make_resources):
    letter = make_resources().cases.train[0].text[0]
    rollout = {"num_cases": 3, "refill": 1, "letter_weights": {letter: 1e6}}
    cases = make_resources(rollout=rollout).cases
    ids = [case.case_id for case in cases.of_round(4)]
    assert len(set(ids)) == 3
    assert cases.train[0].case_id in ids
    others = [case.case_id for case in cases.further(4)]
    assert sorted(ids + others) == sorted(case.case_id for case in cases.train)
    assert [case.case_id for case in cases.of_round(4)] == ids
    assert [case.case_id for case in cases.of_round(5)] != ids


def test_weights_of_letters_that_no_text_has_are_refused(make_resources):
    strange = {"@": 2.0, "é": 2.0}
    cases = make_resources(rollout={"letter_weights": strange}).cases
    with pytest.raises(ParamsError, match="Got @ é, of which no text in"):
        _ = cases.train
    letter = make_resources().cases.train[0].text[0]
    assert make_resources(rollout={"letter_weights": strange | {letter: 2.0}}).cases.train


def test_a_disk_that_is_full_during_a_shard_is_told_and_the_next_start_goes_on(train, monkeypatch):
    import errno

    from calligrapher.errors import ArtifactError
    from tasks.stages import rollout as stage

    real, written = stage.write_shard, []

    def write_shard(path, *args):
        if written:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        written.append(path)
        real(path, *args)

    monkeypatch.setattr(stage, "write_shard", write_shard)
    with pytest.raises(
        ArtifactError, match=r"disk must have room for 'round-0000/rollout'.*shard-0001"
    ):
        train("a", rounds=1)
    monkeypatch.setattr(
        stage, "write_shard", lambda path, *args: written.append(path) or real(path, *args)
    )
    folder, resumed = train("a", rounds=1)
    assert [path.name for path in written] == [
        "shard-0000.parquet",
        "shard-0001.parquet",
        "shard-0002.parquet",
    ]
    assert list(folder.rglob("*.partial")) == []
    _, whole = train("b", rounds=1)
    assert resumed["adapter_digest"] == whole["adapter_digest"]
