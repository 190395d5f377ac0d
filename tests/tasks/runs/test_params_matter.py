"""Every parameter does something: each is turned, and what it must change is looked for."""

import shutil
import socket

import pytest
import torch
from small_runs import ALGORITHMS, Gamed

from calligrapher.errors import DataError, ParamsError, RewardError
from calligrapher.sampling.schedule import sigma_schedule
from calligrapher.tables.parquet import read_shard
from reward_server.client import RewardResult
from reward_server.components import NAMES, Letter
from tasks.artifacts.artifact import Artifact
from tasks.params.errors import valid_keys
from tasks.params.run_params import RunParams
from tasks.pipeline import ROUND, name_of, stage_of
from tasks.reports.status import status
from tasks.resources.rewards import RewardScorer
from tasks.runs.run import open_run
from tasks.tracking.feed import Feed
from tasks.tracking.tracker import Tracker

SMALL = {
    "rounds": 1,
    "rollout": {"num_cases": 2, "num_images_per_prompt": 2, "shard_size": 3},
    "update": {"batch_size": 1, "gradient_accumulation_steps": 2},
    "warmup": {"steps": 2},
}
LORA = {"model": {"lora": {"rank": 2, "alpha": 2.0, "targets": ["to_q"]}}}
RISING = {"lr_scheduler": "constant_with_warmup"}
VLM = {"reward": {"server_urls": ["http://127.0.0.1:9"], "vlm_weight": 0.5}}
SIX_STEPS = {"rollout": {"num_inference_steps": 6}}
HALF_HELD = {"background_coef": 1.0, "timestep_fraction": 0.5}

# Key -> (value, the stage whose files must be others, what else is set in both runs).
CHANGES = {
    "seed": (4, "rollout", {}),
    "model.base": ("OTHER/flux-fill", "rollout", {}),
    "model.siglip": ("OTHER/siglip", "rollout", {}),
    "model.initial_adapter": ("OTHER/calligrapher.bin", "warmup", {}),
    "model.width": (32, "rollout", {}),
    "model.height": (48, "rollout", {}),
    "model.guidance_scale": (1.5, "rollout", {}),
    "model.max_sequence_length": (32, "rollout", {}),
    "model.mixed_precision": ("bf16", "rollout", {}),
    "model.reference_context": (True, "rollout", {}),
    "model.train_adapter": (False, "warmup", LORA),
    "model.lora": (LORA["model"]["lora"], "warmup", {}),
    "model.lora.rank": (3, "warmup", LORA),
    "model.lora.alpha": (5.0, "rollout", LORA),
    "model.lora.targets": (["to_k"], "warmup", LORA),
    "model.lora.adapter_targets": (["to_k_ip"], "warmup", LORA),
    "data.train": ("OTHER/cases", "rollout", {}),
    "data.evaluation": ("OTHER/cases", "evaluate", {}),
    "warmup.steps": (1, "warmup", {}),
    "warmup.batch_size": (3, "warmup", {}),
    "warmup.gradient_accumulation_steps": (2, "warmup", {}),
    "warmup.learning_rate": (1e-3, "warmup", {}),
    "warmup.lr_scheduler": ("linear", "warmup", {}),
    "warmup.lr_warmup_steps": (3, "warmup", {"warmup": RISING}),
    "warmup.weight_decay": (0.5, "warmup", {}),
    "warmup.max_grad_norm": (1e-3, "warmup", {}),
    "warmup.style_dropout": (0.9, "warmup", {}),
    "rollout.num_cases": (3, "rollout", {}),
    "rollout.num_batches_per_epoch": (2, "rollout", {}),
    "rollout.num_images_per_prompt": (3, "rollout", {}),
    "rollout.letter_weights": ({"E": 100.0}, "rollout", {}),
    "rollout.num_inference_steps": (4, "rollout", {}),
    "rollout.solver": ("dpm2", "rollout", SIX_STEPS),
    "rollout.shard_size": (2, "rollout", {}),
    "reward.ocr_weight": (0.4, "score", {}),
    "reward.likelihood_weight": (0.4, "score", {}),
    "reward.vlm_weight": (0.4, "score", VLM),
    "reward.style_weight": (0.4, "score", {}),
    "reward.factors": (["ocr_visibility"], "score", {}),
    "reward.style_factors": (["ocr_accuracy"], "score", {"reward": {"style_weight": 1.0}}),
    "reward.disable_reward_model": (True, "score", {}),
    "advantage.baseline": ("round", "advantage", {}),
    "advantage.global_std": (False, "advantage", {}),
    "advantage.combine": ("standardized", "advantage", {}),
    "nft.nft_beta": (0.3, "update", {}),
    "nft.kl_coef": (0.5, "update", {}),
    "nft.kl_target": (0.1, "update", {"nft": {"kl_coef": 0.5}}),
    "nft.background_coef": (1.0, "update", {}),
    "nft.background_rows": (2, "update", {"nft": HALF_HELD}),
    "nft.adv_clip_max": (0.5, "update", {}),
    "nft.adv_mode": ("positive_only", "update", {}),
    "nft.num_train_sigmas": (2, "update", {}),
    "nft.timestep_fraction": (0.4, "update", SIX_STEPS),
    "nft.noise": (
        "group",
        "update",
        {"update": {"batch_size": 4, "gradient_accumulation_steps": 1}},
    ),
    "nft.sigmas": ("stratified", "update", {}),
    "nft.old_policy": ("copy", "refresh", {}),
    "nft.old_policy_interval": (2, "refresh", {}),
    "grpo.clip_range": (1e-7, "update", {}),
    "grpo.kl_coef": (0.5, "update", {}),
    "grpo.trust_region": ("dppo", "rollout", {}),
    "grpo.kl_space": ("velocity", "update", {"grpo": {"kl_coef": 0.5}}),
    "grpo.kl_target": (0.1, "update", {"grpo": {"kl_coef": 0.5}}),
    "grpo.background_coef": (1.0, "update", {}),
    "grpo.background_rows": (2, "update", {"grpo": HALF_HELD}),
    "grpo.adv_clip_max": (0.1, "update", {}),
    "grpo.noise_level": (0.4, "rollout", {}),
    "grpo.noise": ("group", "rollout", {}),
    "grpo.sampler": ("cps", "rollout", {}),
    "grpo.window_size": (2, "rollout", {}),
    "grpo.window": ("progressive", "rollout", SIX_STEPS),
    "grpo.guard": (True, "update", {}),
    "grpo.direction": ("image", "update", {"grpo": {"noise": "group"}}),
    "grpo.timestep_fraction": (0.2, "rollout", SIX_STEPS),
    "awm.clip_range": (1e-5, "update", {"update": {"num_inner_epochs": 2}}),
    "awm.weighting": ("t2", "update", {}),
    "awm.adv_clip_max": (0.1, "update", {}),
    "awm.kl_coef": (0.5, "update", {}),
    "awm.kl_target": (0.1, "update", {"awm": {"kl_coef": 0.5}}),
    "awm.background_coef": (1.0, "update", {}),
    "awm.background_rows": (2, "update", {"awm": HALF_HELD}),
    "awm.num_train_sigmas": (2, "update", {}),
    "awm.timestep_fraction": (0.4, "update", SIX_STEPS),
    "awm.noise": ("group", "update", {}),
    "awm.sigmas": ("stratified", "update", {}),
    "awm.old_policy": ("fixed", "refresh", {}),
    "awm.old_policy_interval": (2, "refresh", {}),
    "update.batch_size": (2, "update", {}),
    "update.gradient_accumulation_steps": (1, "update", {}),
    "update.learning_rate": (3e-3, "update", {}),
    "update.lr_scheduler": ("linear", "update", {}),
    "update.lr_warmup_steps": (3, "update", {"update": RISING}),
    "update.weight_decay": (0.5, "update", {}),
    "update.max_grad_norm": (1e-4, "update", {}),
    "update.max_train_steps": (1, "update", {}),
    "update.num_inner_epochs": (2, "update", {}),
    "update.betas": ([0.5, 0.9], "update", {}),
    "update.adam_epsilon": (1e-2, "update", {}),
    "update.adapter_learning_rate": (1e-2, "update", {}),
    "ema.use_ema": (False, "update", {}),
    "ema.decay": (
        0.05,
        "update",
        {},
    ),  # the average begins with (1 + t) / (10 + t), whatever its limit
    "ema.update_interval": (2, "update", {}),
    "evaluate.num_cases": (1, "evaluate", {}),
    "evaluate.grid_cases": (2, "evaluate", {}),
    "evaluate.seed": (1, "evaluate", {}),
    "evaluate.num_images_per_case": (2, "evaluate", {}),
    "evaluate.num_inference_steps": (5, "evaluate", {}),
    "evaluate.noise_level": (0.5, "evaluate", {}),
}
# Key -> (value, the stage up to which the transformer must be run another number of times).
CALLS = {
    "rollout.batch_size": (3, "rollout"),
    "model.gradient_checkpointing": (True, "warmup"),
    "grpo.recompute_log_prob": (True, "update"),
    "grpo.importance_cap": (2.0, "update"),
}
# Key -> (value, error, what it says).
ERRORS = {
    "data.columns": ({"text": "caption"}, ParamsError, "data.columns must be left out"),
    "data.kind": ("jsonl", DataError, "must be a JSONL file"),
    "model.device": ("warp", ParamsError, "model.device"),
    "model.attention_backend": ("slow", ParamsError, "model.attention_backend"),
    "warmup.use_8bit_adam": (True, ParamsError, "warmup.use_8bit_adam"),
    "update.use_8bit_adam": (True, ParamsError, "update.use_8bit_adam"),
}
# Where, how long and how fast: checked by tests of their own, below.
PLACES = {
    "rounds": "test_rounds_and_evaluate_every_say_which_stages_there_are",
    "evaluate.stop_on_alarm": "test_an_alarm_ends_the_run_and_the_switch_lets_it_go_on",
    "evaluate.every": "test_rounds_and_evaluate_every_say_which_stages_there_are",
    "grpo.window_interval": "test_a_progressive_window_moves_with_the_rounds",
    "grpo.window_stride": "test_a_progressive_window_moves_with_the_rounds",
    "rollout.refill": "test_a_round_of_equal_rewards_is_refilled",
    "model.compile": "test_compiling_reaches_every_block_and_needs_a_compiler",
    "model.offload_text_encoder_two": "test_t5_moves_for_each_encoding_when_it_is_offloaded",
    "warmup.checkpointing_steps": "test_checkpointing_steps_say_how_often_a_stage_saves_itself",
    "update.checkpointing_steps": "test_checkpointing_steps_say_how_often_a_stage_saves_itself",
    "reward.server_urls": "test_servers_that_are_named_are_asked_and_no_own_one_is_started",
    "reward.server_host": "test_each_rank_has_a_server_of_its_own_from_host_and_port_on",
    "reward.server_port": "test_each_rank_has_a_server_of_its_own_from_host_and_port_on",
    "reward.token_file": "test_the_token_of_a_file_is_sent_to_the_servers",
    "reward.vlm": "test_models_and_scorers_are_told_to_the_runs_own_server",
    "reward.scorers": "test_models_and_scorers_are_told_to_the_runs_own_server",
    "reward.weights": "test_weights_of_components_without_a_key_of_their_own_count",
    "reward.timeout_s": "test_a_server_that_does_not_answer_is_given_up",
    "reward.max_unscored_share": (
        "test_the_share_of_unscored_images_decides_whether_a_round_goes_on"
    ),
    "rollout.staleness": "test_an_older_policy_samples_the_rounds_after_the_first",
    "rollout.shared_trunk": "test_a_shared_trunk_takes_fewer_rows_for_the_same_images",
    "advantage.per_letter": "test_letters_that_are_compared_teach_otherwise_than_pictures",
    "advantage.drop_solved": "test_groups_that_can_hardly_do_better_are_left_out_and_counted",
    "reward.ocr_mode": "test_the_runs_own_server_is_told_how_to_read",
    "reward.ocr_match": "test_servers_are_asked_whether_case_and_spaces_count",
    "data.reconstruct": "test_a_source_is_learned_in_place_of_a_target_only_where_the_data_says_so",
    "tracking.backends": "test_tracking_goes_where_it_is_told",
    "tracking.uri": "test_tracking_goes_where_it_is_told",
    "tracking.experiment": "test_tracking_goes_where_it_is_told",
    "tracking.enabled": "test_tracking_goes_where_it_is_told",
    "retention.keep_last": "test_retention_keeps_what_it_is_told",
    "retention.keep_every": "test_retention_keeps_what_it_is_told",
    "retention.keep_best": "test_the_best_round_keeps_its_weights_until_a_better_one",
    "launch.gpu_ids": "test_each_rank_has_a_server_of_its_own_from_host_and_port_on",
    "launch.num_processes": "test_the_launcher_follows_the_section_launch",
    "launch.rollout_processes": "test_the_launcher_follows_the_section_launch",
    "launch.backend": "test_the_launcher_follows_the_section_launch",
    "launch.strategy": "test_the_launcher_follows_the_section_launch",
    "launch.reward_gpu_ids": "test_a_server_is_started_on_each_gpu_for_rewards",
    "launch.allow_fewer_servers": "test_ranks_share_a_server_only_where_that_is_allowed",
    "launch.timeout_s": "test_the_launcher_follows_the_section_launch",
    "launch.wait_s": "test_the_launcher_follows_the_section_launch",
}


def test_every_key_stands_in_exactly_one_table():
    keys = [key for key, section in valid_keys(RunParams).items() if section is None]
    keys.append("model.lora")  # null or a section
    tables = [*CHANGES, *CALLS, *ERRORS, *PLACES]
    assert sorted(tables) == sorted(keys)
    assert set(PLACES.values()) <= globals().keys()


class HashClient:
    """A reward client that answers from the picture's bytes; the first `blind` pictures get
    nothing."""

    def __init__(self, blind=0):
        self.blind = blind

    def info(self):
        components = [*NAMES, "ocr_visibility"]
        return {"scorers": {"ocr": "hash"}, "components": components, "letters": True}

    def score_batch(self, items):
        results = []
        for item in items:
            value = item.image[-20] / 256
            if self.blind > 0:
                self.blind -= 1
                results.append(RewardResult(errors={"ocr_accuracy": "blind"}))
                continue
            results.append(
                RewardResult(
                    ocr_text="X",
                    ocr_confidence=1.0,
                    ocr_accuracy=value,
                    ocr_likelihood=value**2,
                    vlm_score=value**3,
                    style_score=value**0.5,
                    own={"ocr_visibility": 0.5},
                    ocr_letters=hashed_letters(item) if item.letters else None,
                )
            )
        return results


def hashed_letters(item):
    """A letter in each half of the picture, as likely as some of its bytes say."""
    return tuple(
        Letter(item.image[-20 - place] / 256, 8.0 * place, 0.0, 8.0 * place + 8.0, 8.0)
        for place in range(2)
    )


def merged(*parts):
    whole = {}
    for part in parts:
        for name, value in part.items():
            both = isinstance(value, dict) and isinstance(whole.get(name), dict)
            whole[name] = merged(whole[name], value) if both else value
    return whole


def nested(key, value):
    for name in reversed(key.split(".")):
        value = {name: value}
    return value


@pytest.fixture(scope="session")
def other(tmp_path_factory):
    """A model and cases that share nothing with the usual ones."""
    from calligrapher.tiny.build import write_random
    from calligrapher.tiny.world import write_bench

    folder = write_random(tmp_path_factory.mktemp("other") / "model", seed=9)
    write_bench(folder / "cases", num_cases=3, split="evaluation", seed=5)
    return folder


@pytest.fixture
def play(make_resources, values, tmp_path):
    """Run up to a stage: (its artifact, how often the transformer ran)."""

    def play(until, algorithm, changes, client=None):
        resources = make_resources(algorithm, **merged(values(algorithm), SMALL, changes))
        canvas = resources.conditioning.canvas
        resources.scorer = RewardScorer(resources.params.reward, ["http://127.0.0.1:9"], canvas)
        if resources.scorer.client is not None:
            resources.scorer.client = client or HashClient()
        calls = []
        block = resources.model.policy.model.transformer.transformer_blocks[0].norm1
        block.register_forward_hook(lambda *_: calls.append(1))
        name = f"run-{len(list(tmp_path.iterdir()))}"
        with open_run(resources, tmp_path / name) as run:
            for stage, artifact in stages(run, until):
                if stage == until:
                    return artifact, len(calls)
        raise AssertionError(until)

    return play


def stages(run, until):
    """Make each stage of round 0 in turn, the evaluation before it where that is asked for."""
    names = ["warmup", *(["evaluate"] if until == "evaluate" else [])]
    for name in [*names, *(name_of(stage, 0) for stage in ROUND)]:
        yield stage_of(name), run.make(name)


BEFORE = {}  # what the run without the change gave; shared by the tests


@pytest.fixture
def before(play):
    def before(until, algorithm, changes):
        key = (until, algorithm, str(changes))
        if key not in BEFORE:
            artifact, calls = play(until, algorithm, changes)
            BEFORE[key] = (artifact.digest, calls)
        return BEFORE[key]

    return before


def evaluates(until):
    return {"evaluate": {"every": 1}} if until == "evaluate" else {}


def algorithm_of(key):
    section = key.split(".")[0]
    return section if section in ALGORITHMS else "nft"


@pytest.mark.parametrize("key", CHANGES)
def test_a_key_changes_what_its_stage_writes(key, play, before, other):
    value, until, both = CHANGES[key]
    if isinstance(value, str):
        value = value.replace("OTHER", str(other))
    algorithm = algorithm_of(key)
    both = merged(both, evaluates(until))
    after, _ = play(until, algorithm, merged(both, nested(key, value)))
    assert after.digest != before(until, algorithm, both)[0]


@pytest.mark.parametrize("key", CALLS)
def test_a_key_changes_how_often_the_transformer_runs(key, play, before):
    value, until = CALLS[key]
    algorithm = algorithm_of(key)
    _, calls = play(until, algorithm, nested(key, value))
    assert calls != before(until, algorithm, {})[1]


def test_nothing_else_changes_what_a_stage_writes(play, before):
    again, calls = play("refresh", "nft", {})
    assert (again.digest, calls) == before("refresh", "nft", {})


def test_a_shared_trunk_takes_fewer_rows_for_the_same_images(play, monkeypatch):
    from calligrapher.model.policy import Policy

    velocity, rows = Policy.velocity, []

    def counted(self, x, *more):
        rows.append(len(x))
        return velocity(self, x, *more)

    monkeypatch.setattr(Policy, "velocity", counted)
    found = {}
    for shared in (False, True):
        rows.clear()
        settings = {"rollout": {"shared_trunk": shared, "num_cases": 3, "batch_size": 9}}
        play("rollout", "grpo", merged(SIX_STEPS, settings, {"grpo": {"noise": "group"}}))
        found[shared] = sum(rows)
    assert found[True] < found[False]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_letters_that_are_compared_teach_otherwise_than_pictures(play, algorithm):
    weights = {"reward": {"ocr_weight": 0.0, "likelihood_weight": 1.0}}
    found = {}
    for per_letter in (False, True):
        advantage = {"combine": "standardized", "per_letter": per_letter}
        settings = merged(weights, {"advantage": advantage})
        found[per_letter], _ = play("update", algorithm, settings)
        again, _ = play("update", algorithm, settings)
        assert again.digest == found[per_letter].digest
    assert found[True].digest != found[False].digest
    assert found[True].meta["grad_norm"] > 0


@pytest.mark.parametrize("key", ERRORS)
def test_a_key_is_refused_where_it_cannot_hold(key, values, tmp_path):
    from tasks.runs.preflight import preflight

    value, error, words = ERRORS[key]
    params = RunParams.model_validate(merged(values("nft"), SMALL, nested(key, value)))
    with pytest.raises(error, match=words):
        preflight(params, tmp_path)


def test_compiling_reaches_every_block_and_needs_a_compiler(
    make_resources, values, tmp_path, monkeypatch
):
    from torch._inductor import config

    from tasks.runs.preflight import preflight

    resources = make_resources(model={"compile": True})
    transformer = resources.model.policy.model.transformer
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    assert all(block._compiled_call_impl is not None for block in blocks)
    preflight(resources.params, tmp_path / "with")
    monkeypatch.setattr(config.cpp, "cxx", ("no-such-compiler",))
    with pytest.raises(
        ParamsError, match=r"model\.compile must be false .*no-such-compiler.* g\+\+"
    ):
        preflight(resources.params, tmp_path / "without")


def test_a_source_is_learned_in_place_of_a_target_only_where_the_data_says_so(
    values, play, cases, tmp_path
):
    from tasks.runs.preflight import preflight

    def given(folder, **changes):
        data = {"train": str(folder), "evaluation": str(cases / "evaluation")}
        return merged(SMALL, {"data": data}, changes)

    def check(folder, run=None, **changes):
        params = RunParams.model_validate(merged(values("nft"), given(folder, **changes)))
        preflight(params, tmp_path, run=run)

    bare = shutil.copytree(cases / "train", tmp_path / "bare")
    for number in (2, 7):
        (bare / f"test{number}_target.png").unlink()
    with pytest.raises(DataError, match=r"data.train .*bare has 2 problem\(s\):") as error:
        check(bare)
    assert "test7_source.png must have a target" in str(error.value)
    assert str(error.value).endswith("set data.reconstruct to true.")
    (tmp_path / "a" / "warmup").mkdir(parents=True)
    check(bare, run=tmp_path / "a")  # whose warm-up is made
    check(bare, warmup={"steps": 0})
    check(bare, data={"reconstruct": True})
    check(cases / "train")
    for number in range(1, 8):
        source = (bare / f"test{number}_source.png").read_bytes()
        (bare / f"test{number}_target.png").write_bytes(source)
    spelt_out, _ = play("warmup", "nft", given(bare))
    for target in bare.glob("*_target.png"):
        target.unlink()
    reconstructed, _ = play("warmup", "nft", given(bare, data={"reconstruct": True}))
    assert reconstructed.digest == spelt_out.digest


def test_rounds_and_evaluate_every_say_which_stages_there_are(train):
    folder, _ = train("a", **merged(SMALL, {"rounds": 3, "evaluate": {"every": 2}}))
    found = {str(path.parent.relative_to(folder)) for path in folder.rglob("artifact.json")}
    evaluations = {name for name in found if "evaluate" in name or "preview" in name}
    assert evaluations == {
        "evaluate",
        "round-0000/preview",
        "round-0001/evaluate",
        "round-0002/evaluate",
    }
    assert len(found - evaluations) == 1 + 3 * 5


def test_a_preview_paints_the_first_image_of_each_case_of_the_grid(train):
    looks = {"every": 2, "num_images_per_case": 3}
    folder, _ = train("a", **merged(SMALL, {"rounds": 2, "evaluate": looks}))
    seeds = {
        name: read_shard(folder / name / "images.parquet", ["case_id", "seed"])
        for name in ("evaluate", "round-0000/preview")
    }
    assert len(seeds["evaluate"]["seed"]) == 2 * 3
    assert seeds["round-0000/preview"] == {k: v[:1] for k, v in seeds["evaluate"].items()}


def test_a_round_of_equal_rewards_is_refilled(train, constant_scorer):
    for refill, images in ((0, 4), (1, 8)):
        changes = merged(SMALL, {"rollout": {"refill": refill}, "warmup": {"steps": 0}})
        _, summary = train(f"a{refill}", scorer=constant_scorer, **changes)
        assert summary["images"] == images


def test_an_alarm_ends_the_run_and_the_switch_lets_it_go_on(train):
    def go(scorer, *, stop, rounds=3):
        evaluate = {"every": 1, "stop_on_alarm": stop}
        folder, summary = train(
            "a", scorer=scorer, **SMALL | {"rounds": rounds, "evaluate": evaluate}
        )
        return folder, summary["rounds"], summary["reward_hacking"]

    scorer = Gamed()
    folder, rounds, gamed = go(scorer, stop=True)
    assert (rounds, gamed) == (1, ["ocr_accuracy since the start"])
    found = status(folder)
    assert (found.state, found.rounds_done, found.ended_by) == ("stopped", 1, gamed[0])
    assert "ended by evaluate.stop_on_alarm: the reward may be gamed (ocr_accuracy" in found.text()
    asked = len(scorer.calls)
    assert go(scorer, stop=True) == (folder, 1, gamed)
    assert len(scorer.calls) == asked, "the second start makes nothing"
    assert go(scorer, stop=False, rounds=2) == (folder, 2, [])
    assert status(folder).ended_by is None
    assert go(scorer, stop=True, rounds=4)[1:] == (2, gamed), "what is made is not thrown away"
    assert go(scorer, stop=False, rounds=3)[1:] == (3, [])


def test_a_run_that_gets_better_in_all_it_measures_goes_on(train, judged):
    evaluate = {"every": 1, "stop_on_alarm": True}
    _, summary = train("a", scorer=judged(0.2, 0.4), **SMALL | {"rounds": 2, "evaluate": evaluate})
    assert (summary["rounds"], summary["reward_hacking"]) == (2, [])


@pytest.mark.parametrize(
    ("settings", "places"),
    [
        ({}, [0, 0, 0]),
        ({"window_interval": 1}, [0, 1, 2]),
        ({"window_interval": 2, "window_stride": 3}, [0, 0, 3]),
    ],
)
def test_a_progressive_window_moves_with_the_rounds(train, settings, places):
    changes = merged(SMALL, SIX_STEPS, {"rounds": 3, "warmup": {"steps": 0}})
    progressive = {"window": "progressive", "window_size": 1, **settings}
    folder, _ = train("a", "grpo", grpo=progressive, **changes)
    for number, place in enumerate(places):
        for path in (folder / f"round-000{number}/rollout").glob("*.parquet"):
            rows = read_shard(path, ["window_sigmas", "x0"])
            schedule = sigma_schedule(6, len(rows["x0"][0]))
            assert all(
                torch.equal(row, schedule[place : place + 2]) for row in rows["window_sigmas"]
            )


def test_an_older_policy_samples_the_rounds_after_the_first(train):
    changes = merged(SMALL, {"rounds": 2, "nft": {"old_policy": "copy"}})
    fresh, stale = (
        train(f"{age}", **merged(changes, {"rollout": {"staleness": age}}))[0] for age in (0, 1)
    )
    for number, same in ((0, True), (1, False)):
        found = [
            read_shard(path / f"round-000{number}/rollout/shard-0000.parquet", ["x0", "seed"])
            for path in (fresh, stale)
        ]
        assert found[0]["seed"] == found[1]["seed"]
        assert all(map(torch.equal, found[0]["x0"], found[1]["x0"])) == same


def test_the_token_of_a_file_is_sent_to_the_servers(make_resources, tmp_path, monkeypatch):
    from scripted import Script

    monkeypatch.delenv("CALLIGRAPHER_REWARD_TOKEN", raising=False)
    path = tmp_path / "token"
    path.write_text("0123456789abcdef\n")
    resources = make_resources(reward={"token_file": str(path)})
    server = Script()
    with open(resources.cases.train[0].source, "rb") as file:
        picture = file.read()
    for variable in (None, "from-the-environment"):
        if variable:
            monkeypatch.setenv("CALLIGRAPHER_REWARD_TOKEN", variable)
            path.unlink()  # is not read then
        scorer = RewardScorer(resources.params.reward, [server.url], resources.conditioning.canvas)
        (row,) = scorer.score([picture], resources.cases.train[:1])
        assert row["reward"] == 0.5
    server.close()
    sent = [headers["Authorization"] for headers in server.headers]
    assert sent == ["Bearer 0123456789abcdef", "Bearer from-the-environment"]
    monkeypatch.delenv("CALLIGRAPHER_REWARD_TOKEN")
    with pytest.raises(ParamsError, match=r"reward\.token_file must be a readable.*token"):
        RewardScorer(resources.params.reward, [server.url], resources.conditioning.canvas)


def test_t5_moves_for_each_encoding_when_it_is_offloaded(make_resources, tmp_path):
    moves = {}
    for offload in (False, True):
        resources = make_resources(model={"offload_text_encoder_two": offload})
        resources.cases.data_dir = tmp_path / str(offload)
        t5, found = resources.model.encoders.pipeline.text_encoder_2, []
        t5.to = lambda where, found=found, t5=t5: found.append(str(where)) or t5
        resources.conditioning.batch(resources.cases.train[:2])
        moves[offload] = found
    assert moves == {False: [], True: ["cpu", "cpu"] * 2}


@pytest.mark.parametrize(("stage", "steps"), [("warmup", 3), ("update", 4)])
def test_checkpointing_steps_say_how_often_a_stage_saves_itself(train, monkeypatch, stage, steps):
    from tasks.stages import checkpointed_loop as training

    saved, real = [], training._checkpoint

    def save(loop, history, inner):
        if stage in str(inner):
            saved.append(len(history))
        real(loop, history, inner)

    monkeypatch.setattr(training, "_checkpoint", save)
    every = {stage: {"checkpointing_steps": 2, "gradient_accumulation_steps": 1}}
    train("a", **merged(SMALL, {"warmup": {"steps": 3}}, every))
    assert saved == list(range(2, steps + 1, 2))


def test_servers_that_are_named_are_asked_and_no_own_one_is_started(values, tmp_path, monkeypatch):
    from flows.contexts import reward_urls
    from reward_server.processes import launch

    monkeypatch.setattr(launch, "local_server", None)
    urls = ["http://one:1", "http://two:2"]
    params = RunParams.model_validate(values("nft", reward={"server_urls": urls}))
    with reward_urls(params, tmp_path / "a") as found:
        assert found == urls
    params = RunParams.model_validate(values("nft", reward={"disable_reward_model": True}))
    with reward_urls(params, tmp_path / "b") as found:
        assert found == []
    assert list(tmp_path.iterdir()) == []


def test_each_rank_has_a_server_of_its_own_from_host_and_port_on(values):
    from tasks.launch.places import named_servers

    def servers(size, **sections):
        return named_servers(RunParams.model_validate(values("nft", **sections)), size)

    assert servers(2) == []  # the run's own
    gpus = {"model": {"device": "auto"}, "launch": {"gpu_ids": [0, 1]}}
    assert servers(2, **gpus) == ["http://127.0.0.1:8000", "http://127.0.0.1:8001"]
    assert servers(1, reward={"server_host": "gpu-7"}) == ["http://gpu-7:8000"]
    assert servers(2, reward={"server_port": 9000})[1] == "http://127.0.0.1:9001"
    assert servers(1, reward={"server_host": "::1"}) == ["http://[::1]:8000"]
    assert servers(2, **gpus, reward={"server_urls": ["http://a:1"]}) == ["http://a:1"]
    assert servers(2, **gpus, reward={"disable_reward_model": True}) == []
    gpus["launch"]["reward_gpu_ids"] = [2, 3]
    assert servers(2, **gpus) == []


def test_ranks_share_a_server_only_where_that_is_allowed(values):
    from tasks.launch.places import check_places

    def check(urls, allow):
        params = values(
            "nft",
            reward={"server_urls": urls, "timeout_s": 0.5},
            launch={"num_processes": 3, "allow_fewer_servers": allow},
        )
        check_places(RunParams.model_validate(params))

    with pytest.raises(ParamsError, match=r"each of 3 ranks. Got 2: .* up to 2 times as long"):
        check(["http://127.0.0.1:9", "http://127.0.0.1:9"], False)
    with pytest.raises(RewardError, match="must name reward servers that answer"):
        check(["http://127.0.0.1:9"], True)


def test_a_server_is_started_on_each_gpu_for_rewards(values, tmp_path, monkeypatch):
    from contextlib import contextmanager

    from flows.contexts import reward_urls
    from reward_server.processes import launch

    asked = {}

    @contextmanager
    def local_fleet(gpu_ids, **how):
        asked.update(how, gpu_ids=gpu_ids)
        yield ["http://own:1", "http://own:2"]

    monkeypatch.setattr(launch, "local_fleet", local_fleet)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7,6,5,4")
    params = RunParams.model_validate(
        values("nft", launch={"reward_gpu_ids": [2, 3]}, reward={"server_port": 9000})
    )
    with reward_urls(params, tmp_path / "a", 2) as found:
        assert found == ["http://own:1", "http://own:2"]
    assert (asked["gpu_ids"], asked["first_port"]) == (["5", "4"], 9000)


def test_the_launcher_follows_the_section_launch(make_resources, tmp_path, monkeypatch):
    from flows.contexts import ranks_of_run
    from tasks.launch import ray_actors
    from tasks.launch.spawned import Spawned

    class Actors:
        def __init__(self, logs, *, device, wait_s):
            self.wait_s = wait_s

    monkeypatch.setattr(ray_actors, "RayActors", Actors)
    monkeypatch.setattr(RewardScorer, "urls", list, raising=False)
    groups = []
    for launch in (
        {},
        {"num_processes": 2, "timeout_s": 7, "strategy": "fsdp2"},
        {"num_processes": 3, "rollout_processes": 2, "backend": "ray", "wait_s": 8},
    ):
        stale = {"staleness": int("rollout_processes" in launch)}
        resources = make_resources(launch=launch, rollout=stale, scorer=RewardScorer)
        groups.append(ranks_of_run(resources, tmp_path / "a"))
    assert groups[0] is None
    assert isinstance(groups[1].backend, Spawned)
    assert [(group.size, group.samplers) for group in groups[1:]] == [(2, 0), (3, 2)]
    assert groups[1]._timeout_s == 7
    assert groups[1].resources.params.launch.strategy == "fsdp2"  # told to the ranks with the rest
    assert groups[2].backend.wait_s == 8
    for group in groups[1:]:
        group.backend.close = lambda: None
        group.close()


def test_models_and_scorers_are_told_to_the_runs_own_server(values, tmp_path, monkeypatch):
    from contextlib import contextmanager

    from flows.contexts import reward_urls
    from reward_server.processes import launch

    asked = {}

    @contextmanager
    def local_server(**how):
        asked.update(how)
        yield "http://own:1"

    monkeypatch.setattr(launch, "local_server", local_server)
    params = RunParams.model_validate(
        values(
            "nft",
            reward={"vlm": "/models/vlm", "vlm_weight": 0.3, "scorers": {"mine": "/r.py:A?b=1"}},
        )
    )
    with reward_urls(params, tmp_path / "a") as found:
        assert found == ["http://own:1"]
    assert asked["flags"] == ["--vlm-model-path=/models/vlm", "--scorer=mine=/r.py:A?b=1"]
    assert asked["log_path"] == tmp_path / "a/reward-server.log"


def test_weights_of_components_without_a_key_of_their_own_count(values):
    from tasks.resources.rewards import RewardScorer

    reward = {"ocr_weight": 0.5, "scorers": {"mine": "r.py:A"}, "weights": {"mine": 0.25}}
    params = RunParams.model_validate(values("nft", reward=reward))
    results = [
        RewardResult(ocr_accuracy=1.0, own={"mine": 0.5}),
        RewardResult(ocr_accuracy=1.0, own={"mine": None}, errors={"mine": "it slept"}),
    ]
    rows = RewardScorer(params.reward, [], None).weigh(results)
    assert [row["reward"] for row in rows] == [0.625, None]
    assert [row["mine"] for row in rows] == [0.5, None]
    assert rows[1]["reason"] == "mine: it slept"


def test_a_server_that_does_not_answer_is_given_up(make_resources):
    import time

    with socket.create_server(("127.0.0.1", 0)) as silent:
        resources = make_resources(reward={"timeout_s": 0.05})
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        scorer = RewardScorer(resources.params.reward, [url], resources.conditioning.canvas)
        started = time.monotonic()
        with pytest.raises(RewardError, match="no reward server answered"):
            scorer.identity()
        assert time.monotonic() - started < 5


@pytest.mark.parametrize(("share", "goes_on"), [(0.24, False), (0.25, True)])
def test_the_share_of_unscored_images_decides_whether_a_round_goes_on(play, share, goes_on):
    changes = {"reward": {"max_unscored_share": share}}
    if goes_on:
        artifact, _ = play("score", "nft", changes, HashClient(blind=1))
        assert (artifact.meta["unscored"], artifact.meta["images"]) == (1, 4)
    else:
        with pytest.raises(RewardError, match="1 of 4"):
            play("score", "nft", changes, HashClient(blind=1))


def test_tracking_goes_where_it_is_told(values, tmp_path, monkeypatch):
    import json

    monkeypatch.setattr(Feed, "_work", lambda self: None)
    for name, given, uri, experiment in (
        ("a", {"enabled": True}, f"sqlite:///{tmp_path}/mlflow.db", "calligrapher-rl"),
        (
            "b",
            {"enabled": True, "uri": "http://mlflow:5", "experiment": "mine"},
            "http://mlflow:5",
            "mine",
        ),
    ):
        with Tracker(tmp_path / name, RunParams.model_validate(values("nft", tracking=given))):
            pointer = json.loads((tmp_path / name / "mlflow.json").read_text())
        assert (pointer["uri"], pointer["experiment"]) == (uri, experiment)
    for name, given in (("c", {}), ("d", {"enabled": True, "backends": ["tensorboard"]})):
        with Tracker(tmp_path / name, RunParams.model_validate(values("nft", tracking=given))):
            assert not (tmp_path / name / "mlflow.json").exists()


@pytest.mark.parametrize(
    ("retention", "kept"),
    [
        ({"keep_last": 3}, [0, 1, 2]),
        ({"keep_last": 1}, [2]),
        ({"keep_last": 1, "keep_every": 2}, [0, 2]),
    ],
)
def test_retention_keeps_what_it_is_told(train, retention, kept):
    folder, _ = train(
        "a", **merged(SMALL, {"rounds": 3, "retention": retention, "warmup": {"steps": 0}})
    )
    assert [
        i for i in range(3) if (folder / f"round-000{i}/update/trained.safetensors").exists()
    ] == kept
    assert [
        i for i in range(3) if (folder / f"round-000{i}/refresh/old.safetensors").exists()
    ] == kept
    assert len(list(folder.glob("round-*/update/artifact.json"))) == 3


EVALUATED = {"rounds": 4, "warmup": {"steps": 0}, "evaluate": {"every": 1}}


def with_weights(folder):
    return [i for i in range(4) if (folder / f"round-000{i}/update/trained.safetensors").exists()]


def test_the_best_round_keeps_its_weights_until_a_better_one(train, judged):
    folder, _ = train(
        "a", "nft", judged(0.2, 0.9, 0.3, 0.4), retention={"keep_last": 1}, **EVALUATED
    )
    assert with_weights(folder) == [1, 3]
    folder, _ = train(
        "b", "nft", judged(0.5, 0.4, 0.6, 0.1), retention={"keep_last": 1}, **EVALUATED
    )
    assert with_weights(folder) == [2, 3]
    keep = {"keep_last": 1, "keep_best": False}
    folder, _ = train("c", "nft", judged(0.2, 0.9, 0.3, 0.4), retention=keep, **EVALUATED)
    assert with_weights(folder) == [3]


def test_groups_that_can_hardly_do_better_are_left_out_and_counted(train, scorer_class):
    class Scorer(scorer_class):
        rewards = (0.95, 0.95, 0.97, 0.5, 0.9, 0.1, 0.2, 0.4, 0.99)

        def reward(self, image, case):
            self.asked = getattr(self, "asked", -1) + 1
            return self.rewards[self.asked]

    found = {}
    for drop in (False, True):
        folder, _ = train(
            f"drop-{drop}", scorer=Scorer(), rounds=1, advantage={"drop_solved": drop}
        )
        found[drop] = Artifact.load(folder / "round-0000/advantage")
    assert "solved_groups" not in found[False].meta
    assert found[True].meta["solved_groups"] == found[True].meta["dropped_groups"] == 1
    assert found[True].meta["kept_share"] == pytest.approx(6 / 9)
    # A key that is left at its default is not read: older artifacts are as fresh as ever.
    assert set(found[False].params["advantage"]) == {"baseline", "global_std"}
    assert "weights" not in found[False].params
    assert found[True].params["weights"] == {"ocr_accuracy": 1.0}


@pytest.mark.parametrize(("mode", "flags"), [(None, []), ("line", ["--ocr-mode=line"])])
def test_the_runs_own_server_is_told_how_to_read(values, tmp_path, monkeypatch, mode, flags):
    from contextlib import contextmanager

    from flows.contexts import reward_urls
    from reward_server.processes import launch

    given = []

    @contextmanager
    def local_server(*, flags, log_path):
        given.extend(flags)
        yield "http://own:1"

    monkeypatch.setattr(launch, "local_server", local_server)
    params = RunParams.model_validate(values("nft", reward={"ocr_mode": mode}))
    with reward_urls(params, tmp_path / "a") as found:
        assert found == ["http://own:1"]
    assert given == flags


@pytest.mark.parametrize("match", [None, "exact"])
def test_servers_are_asked_whether_case_and_spaces_count(values, make_resources, match):
    asked = []

    class Client(HashClient):
        def score_batch(self, items):
            asked.extend(item.match for item in items)
            return super().score_batch(items)

    resources = make_resources()
    params = RunParams.model_validate(values("nft", reward={"ocr_match": match}))
    scorer = RewardScorer(params.reward, ["http://one:1"], resources.conditioning.canvas)
    scorer.client = Client()
    case = resources.cases.train[0]
    scorer.score([bytes(range(40))], [case])
    assert asked == [match]
