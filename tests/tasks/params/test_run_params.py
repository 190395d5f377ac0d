import re

import pytest
import yaml

from calligrapher.errors import ParamsError
from tasks.params.checks import algorithms
from tasks.params.errors import valid_keys
from tasks.params.run_params import RunParams, check_multiple, load_params
from tasks.pipeline import STAGES, reads

MINIMAL = {
    "rounds": 3,
    "model": {"base": "tiny", "width": 96, "height": 32},
    "data": {"train": "cases", "evaluation": "held-out"},
    "rollout": {"num_cases": 3, "num_images_per_prompt": 5},
    "reward": {"vlm_weight": 0},
}
# What decides no result: where things are, how fast they are, what is kept.
UNREAD = {
    "rounds",
    "model.base",
    "model.siglip",
    "model.initial_adapter",
    "model.device",
    "model.gradient_checkpointing",
    "model.offload_text_encoder_two",
    "model.attention_backend",
    "model.compile",
    "data.train",
    "data.evaluation",
    "data.kind",
    "data.columns",
    "warmup.checkpointing_steps",
    "update.checkpointing_steps",
    "reward.server_urls",
    "reward.server_host",
    "reward.server_port",
    "reward.vlm",
    "reward.scorers",
    "reward.ocr_mode",  # who scores says so
    "reward.token_file",
    "reward.timeout_s",
    "reward.max_unscored_share",
    "evaluate.every",
    "evaluate.stop_on_alarm",
    "tracking.backends",
    "tracking.uri",
    "tracking.experiment",
    "tracking.enabled",
    "retention.keep_last",
    "retention.keep_every",
    "retention.keep_best",
    "launch.gpu_ids",
    "launch.num_processes",
    "launch.backend",
    "launch.strategy",
    "launch.reward_gpu_ids",
    "launch.allow_fewer_servers",
    "launch.timeout_s",
    "launch.wait_s",
}


@pytest.fixture
def load(tmp_path):
    def load(*overrides, algorithm="nft", **sections):
        path = tmp_path / "params.yaml"
        path.write_text(yaml.safe_dump(MINIMAL | {algorithm: {}} | sections))
        return load_params(path, overrides)

    return load


def test_the_documented_defaults_hold(load):
    params = load()
    assert params.model.guidance_scale == 3.5
    assert params.warmup.steps == 1000
    assert params.rollout.num_inference_steps == 50
    assert params.update.learning_rate == 1e-4
    assert (params.reward.ocr_weight, RunParams.model_fields["reward"].annotation().vlm_weight) == (
        0.7,
        0.3,
    )
    assert params.ema_decay == 0.999
    assert load(algorithm="grpo").ema_decay == 0.9999
    assert load(ema={"decay": 0.5}).ema_decay == 0.5


def test_a_number_in_scientific_notation_without_a_point_is_read_as_a_number(load):
    assert load("update.learning_rate=1e-5").update.learning_rate == 1e-5


def test_derived_numbers_count_a_round_that_does_not_divide(load):
    params = load(
        "rollout.num_batches_per_epoch=2", "update.batch_size=4", "update.num_inner_epochs=3"
    )
    assert params.cases_per_round == 6
    assert params.images_per_round == 30
    assert params.updates_per_round == 3 * 2  # 30 images, 16 a step
    assert params.total_updates == 18
    assert load("update.max_train_steps=5").total_updates == 5


def test_overrides_reach_into_sections_that_the_file_leaves_out(load):
    params = load(
        "rounds=7",
        "model.lora.rank=3",
        "update.betas=[0.8, 0.9]",
        "reward.server_urls=[http://a:1]",
    )
    assert params.rounds == 7
    assert params.model.lora.rank == 3
    assert params.update.betas == (0.8, 0.9)
    assert params.reward.server_urls == ["http://a:1"]


EXPLORES = ("nft=null", "grpo={}", "model.mixed_precision=bf16")


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_in_half_precision_an_algorithm_that_explores_needs_equal_batches(load, precision):
    given = (*EXPLORES[:2], f"model.mixed_precision={precision}")
    with pytest.raises(
        ParamsError, match=r"update\.batch_size must be rollout\.batch_size, 3, with grpo .* Got 2"
    ):
        load(*given, "rollout.batch_size=3", "update.batch_size=2")
    with pytest.raises(ParamsError, match=r"shard_size must be a multiple of .*, 3, .* Got 8"):
        load(*given, "rollout.batch_size=3", "update.batch_size=3", "rollout.shard_size=8")
    load(*given, "rollout.batch_size=3", "update.batch_size=3", "rollout.shard_size=9")
    load(*given, "grpo.recompute_log_prob=true", "rollout.batch_size=3", "update.batch_size=2")


def test_unequal_batches_serve_in_float32_and_where_the_rollout_does_not_explore(load):
    batches = ("rollout.batch_size=3", "update.batch_size=2", "rollout.shard_size=8")
    load(*EXPLORES[:2], *batches)
    load(EXPLORES[2], *batches)


def test_images_of_an_older_policy_need_what_weighs_them_and_their_policy_kept(load):
    stale = "rollout.staleness=1"
    assert load(stale).rollout.staleness == 1  # nft's loss is relative to what sampled
    with pytest.raises(
        ParamsError, match=r"grpo\.importance_cap must be a number with .* Got null"
    ):
        load(*EXPLORES[:2], stale)
    load("nft=null", "grpo={importance_cap: 2.0}", stale)
    with pytest.raises(ParamsError, match=r"awm\.clip_range must be a number"):
        load("nft=null", "awm={}", stale)
    load("nft=null", "awm={clip_range: 1e-4}", stale)
    with pytest.raises(ParamsError, match=r"retention\.keep_last must be at least 2 .* Got 1"):
        load(stale, "retention.keep_last=1")
    with pytest.raises(ParamsError, match=r"rollout\.staleness"):
        load("rollout.staleness=2")
    with pytest.raises(ParamsError, match=r"grpo\.importance_cap"):
        load("nft=null", "grpo={importance_cap: 0.5}")


def test_an_override_switches_the_algorithm(load):
    assert load("nft=null", "grpo={clip_range: 1e-4}").grpo.clip_range == 1e-4


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["update.learning_rat=1"],
            "unknown key 'update.learning_rat'.* Nearest: update.learning_rate",
        ),
        (["ema_decay=0.9"], r"Nearest: ema\.decay"),
        (["nft_decay_type=1"], r"Nearest: nft\.old_policy"),
        (["rl_num_images_per_prompt=4"], r"Nearest: rollout\.num_images_per_prompt"),
        (["rounds"], "must look like section.key=value. Got 'rounds'"),
        (["rounds=[1"], "must be YAML"),
        (["rounds=0"], "rounds must be at least 1. Got 0."),
        (["seed=9223372036854775808"], "seed must be less than 9223372036854775808"),
        (
            ["evaluate.seed=1e30"],
            r"evaluate.seed must be a whole number of fewer digits. Got 1e\+30",
        ),
        (["tracking.uri=foo://bar"], "tracking.uri must be a folder, or a URI .* Got foo://"),
        (["seed=1.5"], "seed must be a whole number. Got 1.5."),
        (["update.learning_rate=fast"], "update.learning_rate must be a number. Got 'fast'."),
        (
            ["update.learning_rate=.nan"],
            "update.learning_rate must be .*a finite number.* Got nan.",
        ),
        (["update.betas=[1, 0.9]"], "update.betas.0 must be less than 1.0. Got 1."),
        (
            ["model.mixed_precision=fp8"],
            "model.mixed_precision must be 'no', 'fp16' or 'bf16'. Got 'fp8'.",
        ),
        (["evaluate=3"], "evaluate must be a section with keys of its own. Got 3."),
        (["grpo={}"], "exactly one of the sections nft, grpo, awm must be given. Got nft and grpo"),
        (["nft=null"], "exactly one of the sections nft, grpo, awm must be given. Got none"),
        (["reward.vlm_weight=0.3"], "reward.vlm_weight must be 0 when no VLM answers .* Got 0.3"),
        (["reward.ocr_weight=0"], "reward.ocr_weight, or another weight .* must be greater than 0"),
        (
            ["rollout.num_images_per_prompt=1"],
            "rollout.num_images_per_prompt must be at least 2 .* every advantage would be 0",
        ),
        (["model.train_adapter=false"], "nothing would train"),
        (
            ["model.lora.targets=[]"],
            "model.lora must name layers in targets or adapter_targets, or be null",
        ),
        (["model.base=/weights/flux"], "model.siglip must name the SigLIP folder"),
        (
            ["evaluate.every=0", "evaluate.stop_on_alarm=true"],
            "evaluate.every must be at least 1 with evaluate.stop_on_alarm. Got 0",
        ),
        (["data.evaluation=null"], "data.evaluation must name held-out cases"),
        (
            ["evaluate.grid_cases=65"],
            "evaluate.grid_cases must be at most evaluate.num_cases, 64. Got 65",
        ),
        (
            ["update.lr_warmup_steps=9"],
            "update.lr_warmup_steps must be 0 with .* 'constant_with_warmup'",
        ),
        (["nft.num_train_sigmas=51"], "nft.num_train_sigmas must be at most 50 .* Got 51"),
        (
            ["nft=null", "grpo.window_size=50"],
            "grpo.window_size does not fit rollout.num_inference_steps",
        ),
        (["nft=null", "grpo={sampler: cps, noise_level: 2}"], "grpo.noise_level must be at most 1"),
    ],
)
def test_what_cannot_work_is_an_error_that_names_the_key(load, overrides, message):
    with pytest.raises(ParamsError, match=message):
        load(*overrides)


def test_an_address_of_a_reward_server_has_a_scheme(load):
    with pytest.raises(ParamsError, match=r"server_urls must begin with http.*'localhost:8000'"):
        load("reward.server_urls=[http://a:1, localhost:8000]")


def test_a_group_of_one_is_welcome_where_the_round_is_the_baseline(load):
    params = load("rollout.num_images_per_prompt=1", "advantage.baseline=round")
    assert params.images_per_round == 3


def test_a_vlm_weight_is_welcome_where_a_vlm_may_answer(load):
    for reason in (
        "reward.vlm=qwen",
        "reward.server_urls=[http://a:1]",
        "reward.disable_reward_model=true",
    ):
        assert load("reward.vlm_weight=0.3", reason).reward.vlm_weight == 0.3


@pytest.mark.parametrize(
    "uri", ["http://a:5000", "sqlite:////tmp/x.db", "postgresql+psycopg2://a/b", "./folder", "uc:x"]
)
def test_a_store_of_mlflow_is_welcome(load, uri):
    assert load(f"tracking.uri={uri}").tracking.uri == uri


def test_paths_of_what_is_there_are_stored_absolute_and_decide_nothing(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    names = {"held", "cases#1", "siglip", "vlm", "tiny"}
    for name in names:
        (tmp_path / name).mkdir()
    given = {
        "data.train": "held",
        "data.evaluation": "held#train",
        "model.siglip": "~/siglip",
        "model.initial_adapter": "tiny",
        "reward.vlm": "./vlm",
    }
    params = load(*(f"{key}={value}" for key, value in given.items()))
    assert params.data.train == f"{tmp_path}/held"
    assert params.data.evaluation == f"{tmp_path}/held#train"
    assert params.model.siglip == f"{tmp_path}/siglip"
    assert params.reward.vlm == f"{tmp_path}/vlm"
    assert (params.model.base, params.model.initial_adapter) == ("tiny", "tiny")
    assert load("data.train=cases#1").data.train == f"{tmp_path}/cases#1"
    elsewhere = load("data.train=user/set", "model.initial_adapter=a-run", "data.evaluation=none")
    assert (elsewhere.data.train, elsewhere.data.evaluation) == ("user/set", "none")
    assert elsewhere.model.initial_adapter == "a-run"
    assert [reads(params, stage) for stage in STAGES] == [reads(elsewhere, s) for s in STAGES]


def test_all_problems_of_a_file_are_named_at_once(load):
    with pytest.raises(ParamsError) as caught:
        load(seed=-1, ema_decay=0.9, data={"evaluation": "b"})
    text = str(caught.value)
    assert "params.yaml" in text
    assert "seed must be at least 0. Got -1." in text
    assert "unknown key 'ema_decay'. Nearest: ema.decay." in text
    assert "data.train must be given. It is missing." in text


def test_a_key_given_twice_is_an_error(tmp_path):
    path = tmp_path / "twice.yaml"
    path.write_text("rounds: 1\nmodel: {}\nrounds: 2\n")
    with pytest.raises(ParamsError, match="rounds must be given once"):
        load_params(path)


@pytest.mark.parametrize("text", ["", "- 1\n", "a: [", "\x00"])
def test_a_file_that_is_no_mapping_is_an_error_that_names_it(tmp_path, text):
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ParamsError, match=r"bad\.yaml must"):
        load_params(path)


def test_a_missing_file_is_an_error_that_names_it(tmp_path):
    with pytest.raises(ParamsError, match=r"none\.yaml must be a readable params file"):
        load_params(tmp_path / "none.yaml")


def test_a_trunk_is_shared_only_where_a_group_has_one(load):
    shared = "rollout.shared_trunk=true"
    with pytest.raises(ParamsError, match=r"rollout\.shared_trunk must be false.* Got none"):
        load(shared)
    with pytest.raises(ParamsError, match=r"rollout\.shared_trunk.* Got grpo\.noise: row"):
        load(shared, algorithm="grpo")
    alone = load("grpo.noise=group", algorithm="grpo")
    together = load("grpo.noise=group", shared, algorithm="grpo")
    assert "shared_trunk" not in reads(alone, "rollout")["rollout"]
    assert reads(together, "rollout")["rollout"]["shared_trunk"] is True
    sharded = ["grpo.noise=group", shared, "launch.strategy=fsdp2"]
    sharded += ["rollout.num_images_per_prompt=6", "rollout.shard_size=9"]
    with pytest.raises(ParamsError, match=r"rollout\.batch_size must divide.* Got 4, 6 and 9"):
        load(*sharded, "rollout.batch_size=4", algorithm="grpo")
    load(*sharded, "rollout.batch_size=3", algorithm="grpo")


def test_a_solver_of_several_steps_is_refused_where_noise_would_lie_between_them(load):
    with pytest.raises(ParamsError, match=r"rollout\.solver must be euler with grpo\. Got dpm2"):
        load("rollout.solver=dpm2", algorithm="grpo")
    euler, dpm2 = load(), load("rollout.solver=dpm2")
    assert "solver" not in reads(euler, "rollout")["rollout"]
    assert reads(dpm2, "rollout")["rollout"]["solver"] == "dpm2"
    assert reads(dpm2, "evaluate") == reads(euler, "evaluate")


def test_params_cannot_be_changed_after_loading(load):
    with pytest.raises(ValueError, match="frozen"):
        load().rounds = 5


def test_a_size_is_refused_with_its_nearest_multiples():
    message = "model.height must be a multiple of 16. Got 520. Nearest: 512, 528."
    with pytest.raises(ParamsError, match=message):
        check_multiple("model.height", 520, 16)
    with pytest.raises(ParamsError, match=r"Nearest: 8\.$"):
        check_multiple("model.height", 3, 8)
    check_multiple("model.height", 512, 16)


def _changed(key, value):
    """Another valid value for each kind of parameter."""
    other = {
        "model.mixed_precision": "bf16",
        "model.train_adapter": False,
        "model.lora": {"rank": 3},
        "model.lora.targets": ["proj"],
        "model.lora.adapter_targets": ["proj.0"],
        "warmup.lr_scheduler": "cosine",
        "update.lr_scheduler": "cosine",
        "update.betas": [0.5, 0.6],
        "update.adam_epsilon": 1e-3,
        "update.adapter_learning_rate": 1e-3,
        "update.max_train_steps": 4,
        "data.kind": "jsonl",
        "data.columns": {"text": "caption"},
        "nft.adv_mode": "binary",
        "nft.noise": "group",
        "nft.sigmas": "stratified",
        "awm.sigmas": "stratified",
        "grpo.kl_space": "velocity",
        "grpo.kl_target": 0.01,
        "grpo.importance_cap": 2.0,
        "grpo.window": "progressive",
        "nft.kl_target": 0.01,
        "awm.kl_target": 0.01,
        "grpo.trust_region": "dppo",
        "nft.num_train_sigmas": 2,
        "nft.old_policy": "copy",
        "awm.noise": "group",
        "awm.num_train_sigmas": 2,
        "awm.old_policy": "slow",
        "awm.clip_range": 0.1,
        "awm.weighting": "t2",
        "grpo.sampler": "cps",
        "rollout.solver": "dpm2",
        "grpo.noise": "group",
        "advantage.baseline": "round",
        "advantage.combine": "standardized",
        "evaluate.num_inference_steps": 5,
        "evaluate.noise_level": 0.5,
        "tracking.backends": ["tensorboard"],
        "ema.decay": 0.5,
        "reward.server_urls": ["http://a:1"],
        "rollout.letter_weights": {"W": 3.0},
        "reward.weights": {"mine": 0.5},
        "reward.factors": ["ocr_upright"],
        "reward.style_factors": ["ocr_accuracy"],
        "reward.ocr_mode": "line",
        "reward.ocr_match": "exact",
        "reward.scorers": {"mine": "r.py:B"},
        "reward.server_host": "gpu-7",
        "reward.server_port": 9000,
        "launch.gpu_ids": [1],
        "launch.num_processes": 2,
        "launch.backend": "ray",
        "launch.strategy": "fsdp2",
        "launch.reward_gpu_ids": [2],
    }
    if key in other:
        return other[key]
    if isinstance(value, bool):
        return not value
    if isinstance(value, int):
        return value + 1 if key != "model.max_sequence_length" else 300
    if isinstance(value, float):
        return value / 2 if value else 0.5
    return "other"


def _replaced(values, key, value):
    name, _, rest = key.partition(".")
    return values | {name: _replaced(values[name], rest, value) if rest else value}


def _get(values, key):
    name, _, rest = key.partition(".")
    return _get(values[name], rest) if rest else values[name]


def test_a_weight_means_the_same_however_it_is_written(load):
    old = load(reward={"ocr_weight": 0.7, "vlm_weight": 0.0, "style_weight": 0.2})
    new = load(reward={"weights": {"ocr_accuracy": 0.7, "style_score": 0.2}})
    mixed = load(reward={"ocr_weight": 0.7, "weights": {"style_score": 0.2}})
    assert new == old == mixed
    assert reads(new, "score") == reads(old, "score")
    assert new.reward.component_weights == {"ocr_accuracy": 0.7, "style_score": 0.2}
    assert "weights" not in reads(new, "score")["reward"]


def test_weights_of_ones_own_scorers_are_read_back_as_they_were_stored(load):
    reward = {"weights": {"ocr_accuracy": 0.7, "mine": 0.5}, "scorers": {"mine": "r.py:A"}}
    params = load(reward=reward)
    assert params.reward.component_weights == {"ocr_accuracy": 0.7, "mine": 0.5}
    assert RunParams.model_validate(params.resolved()) == params
    assert reads(params, "score")["reward"]["weights"] == {"mine": 0.5}
    assert "scorers" not in reads(params, "score")["reward"]


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (
            {"ocr_weight": 0.5, "weights": {"ocr_accuracy": 0.5}},
            r"reward\.ocr_weight must not be given beside weights\.ocr_accuracy",
        ),
        ({"weights": {"ocr_confidence": 1}}, r"must name components .* Got 'ocr_confidence'"),
        ({"weights": {"Mine": 1}}, "scorer's name must be"),
        ({"weights": {"mine": -1}}, r"reward\.weights\.mine must be at least 0"),
        ({"weights": {"mine": 1}}, r"reward\.weights\.mine must name what is measured"),
        ({"weights": {"ocr_accuracy": 0}}, "another weight of the reward"),
        ({"scorers": {"mine": "r.py"}}, "scorer mine must be FILE:CLASS"),
        ({"scorers": {"reward": "r.py:A"}}, "scorer's name must be"),
        ({"style_factors": ["vlm_score"]}, r"style_factors must name some of .* Got 'vlm_score'"),
    ],
)
def test_weights_and_scorers_that_cannot_work_are_named(load, reward, message):
    with pytest.raises(ParamsError, match=message):
        load(reward=reward)


def test_named_servers_may_measure_what_the_params_do_not_know(load):
    reward = {"weights": {"mine": 1}, "server_urls": ["http://a:1"]}
    assert load(reward=reward).reward.component_weights == {"mine": 1}


# what the file says, overrides, what is weighed then
OVERRIDDEN = [
    ({"ocr_weight": 1, "vlm_weight": 0}, ["weights.style_score=2"],
     {"ocr_accuracy": 1, "style_score": 2}),
    ({"ocr_weight": 1, "vlm_weight": 0}, ["weights.ocr_accuracy=2"], {"ocr_accuracy": 2}),
    ({"vlm_weight": 0}, ["weights.mine=2"], {"ocr_accuracy": 0.7, "mine": 2}),
    ({"ocr_weight": 1, "vlm_weight": 0}, ["weights={mine: 2}"], {"mine": 2}),
    ({"weights": {"ocr_accuracy": 1, "mine": 1}}, ["ocr_weight=2"], {"ocr_accuracy": 2, "mine": 1}),
    ({"weights": {"ocr_accuracy": 1, "mine": 1}}, ["weights.mine=0"], {"ocr_accuracy": 1}),
    ({"weights": {"mine": 1}}, ["weights.style_score=1", "style_weight=3"],
     {"mine": 1, "style_score": 3}),
]  # fmt: skip


@pytest.mark.parametrize(("reward", "overrides", "weighed"), OVERRIDDEN)
def test_an_override_wins_over_either_way_of_writing_a_weight(load, reward, overrides, weighed):
    reward = reward | {"scorers": {"mine": "r.py:A"}}
    params = load(*[f"reward.{override}" for override in overrides], reward=reward)
    assert params.reward.component_weights == weighed


def test_a_scorers_file_is_stored_absolute_with_what_it_is_given(load, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.py").touch()
    (tmp_path / "model").mkdir()
    params = load("reward.scorers.mine=r.py:A?folder=model&side=90")
    assert params.reward.scorers == {"mine": f"{tmp_path}/r.py:A?folder={tmp_path}/model&side=90"}


@pytest.mark.parametrize("algorithm", ["nft", "grpo", "awm"])
def test_every_parameter_that_decides_a_result_is_read_by_a_stage(load, algorithm):
    rising = [f"{section}.lr_scheduler=constant_with_warmup" for section in ("warmup", "update")]
    named = ("model.lora.rank=7", "model.siglip=s", "reward.vlm=v", "reward.scorers.mine=r.py:A")
    before = load(*rising, *named, algorithm=algorithm)
    leaves = [key for key, section in valid_keys(RunParams).items() if section is None]
    others = tuple(f"{name}." for name in algorithms(RunParams) if name != algorithm)
    leaves = [key for key in leaves if not key.startswith(others)]
    needing = ("rollout.shared_trunk", "launch.rollout_processes", "advantage.per_letter")
    for key in (*needing, f"{algorithm}.background_rows"):
        leaves.remove(key)  # needs another key, see its own test
    if before.rl.exploration is not None:
        leaves.remove("rollout.solver")  # refused
        leaves.remove("grpo.direction")  # needs another key, see its own test
    if before.rl.lacks_for_stale is not None:
        leaves.remove("rollout.staleness")  # refused, too
    assert len(leaves) > 70
    for key in leaves:
        values = before.resolved()
        after = RunParams.model_validate(_replaced(values, key, _changed(key, _get(values, key))))
        readers = [stage for stage in STAGES if reads(before, stage) != reads(after, stage)]
        assert (not readers) == (key in UNREAD), f"{key} is read by {readers}"


def test_a_run_can_be_prolonged_unless_its_learning_rate_falls(load):
    assert reads(load("rounds=3"), "update") == reads(load("rounds=6"), "update")
    cosine = "update.lr_scheduler=cosine"
    assert reads(load("rounds=3", cosine), "update") != reads(load("rounds=6", cosine), "update")


def test_clip_range_and_direction_make_no_rollout_stale_but_the_noise_level_does(load):
    base = load(algorithm="grpo")
    clip = load("grpo.clip_range=1e-4", algorithm="grpo")
    noise = load("grpo.noise_level=0.5", algorithm="grpo")
    group = load("grpo.noise=group", algorithm="grpo")
    image = load("grpo.noise=group", "grpo.direction=image", algorithm="grpo")
    assert reads(image, "rollout") == reads(group, "rollout")
    assert reads(image, "update")["grpo"]["direction"] == "image"
    assert "direction" not in reads(group, "update")["grpo"]
    assert reads(clip, "rollout") == reads(base, "rollout")
    assert reads(clip, "update") != reads(base, "update")
    assert reads(noise, "rollout") != reads(base, "rollout")


def test_rescoring_needs_no_new_rollout(load):
    base, other = load(), load("reward.ocr_weight=0.5")
    assert reads(other, "score") != reads(base, "score")
    assert reads(other, "rollout") == reads(base, "rollout")


def test_every_parameter_is_described_where_it_is_declared():
    def walk(model, prefix=""):
        for name, field in model.model_fields.items():
            section = valid_keys(RunParams).get(prefix + name)
            assert field.description or section is not None, f"{prefix}{name} has no description"
            if section is not None:
                assert section.__doc__, section
                walk(section, f"{prefix}{name}.")

    walk(RunParams)


@pytest.mark.parametrize(("written", "ids"), [("0,1, 3", [0, 1, 3]), ("4", [4]), ("[2,0]", [2, 0])])
def test_gpus_are_listed_as_other_programs_take_them(load, written, ids):
    assert load(f"launch.gpu_ids={written}").launch.gpu_ids == ids


APART = ("launch.rollout_processes=1", "launch.num_processes=2", "rollout.staleness=1")


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["launch.gpu_ids=0,1", "launch.reward_gpu_ids=1,2"], "must be different GPUs. Got 1 in"),
        (["launch.gpu_ids=0,0"], "launch.gpu_ids must name each GPU once"),
        (["launch.gpu_ids=0,1", "launch.num_processes=3"], "must be the number of launch.gpu_ids"),
        (["launch.num_processes=2", "launch.backend=inline"], "accelerate or ray for 2 ranks"),
        (["launch.gpu_ids=0", "launch.backend=ray"], "launch.gpu_ids must be empty with"),
        (["launch.strategy=deepspeed"], "launch.strategy must be ddp or fsdp2. Got deepspeed: its"),
        (["launch.num_processes=2", "model.device=cuda:1"], "model.device must be auto, cpu or"),
        (["launch.num_processes=5", "reward.server_port=65533"], "must leave room for a port of"),
        (
            ["launch.reward_gpu_ids=1", "reward.server_host=gpu-7"],
            "reward.server_host must be null",
        ),
        (["launch.reward_gpu_ids=1", "reward.server_urls=[http://a:1]"], "Give one of the two."),
        (["launch.gpu_ids=a"], "launch.gpu_ids"),
        (["launch.rollout_processes=1", "launch.num_processes=2"], "must be 0 with rollout.stale"),
        (
            ["launch.rollout_processes=2", "launch.num_processes=2", "rollout.staleness=1"],
            "must be less than the number of ranks that the params start, 2. Got 2",
        ),
        (
            [*APART, "launch.strategy=fsdp2"],
            "launch.strategy must be ddp with launch.rollout_processes",
        ),
    ],
)
def test_ranks_and_servers_that_have_no_place_are_refused(load, overrides, told):
    with pytest.raises(ParamsError, match=re.escape(told)):
        load(*overrides)


def test_no_result_depends_on_which_ranks_sample(load):
    apart, alone = load(*APART), load("rollout.staleness=1")
    assert apart.launch.rollout_processes == 1
    assert all(reads(apart, stage) == reads(alone, stage) for stage in STAGES)
