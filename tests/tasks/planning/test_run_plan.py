"""What `plan` reckons, against what stages really hold, call and write, and what the params'
headers say."""

import re
from collections import Counter
from pathlib import Path

import pytest
import torch

from calligrapher.errors import ParamsError
from calligrapher.model.loading import load_model
from calligrapher.rl.train_state import new_state
from tasks.params.run_params import RunParams, load_params
from tasks.planning.gpu_fit import GPUS, capacity, changes_to_fit, needed
from tasks.planning.memory import (
    copies,
    held_bytes,
    memory,
    meta_model,
    optimizer_bytes,
    other_algorithm,
    row_bytes,
)
from tasks.planning.run_plan import make_plan
from tasks.planning.work import forwards

ROOT = Path(__file__).parents[3]
NFT, GRPO = ROOT / "params/nft.yaml", ROOT / "params/grpo.yaml"
GIB = 2**30


# --- against real stages of a tiny model ---


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize("train_adapter", [True, False])
def test_the_weights_that_are_counted_are_the_weights_that_are_loaded(
    random_model, values, precision, train_adapter
):
    lora = None if train_adapter else {"rank": 2, "alpha": 2.0, "targets": ["to_q", "proj_out"]}
    held = {"mixed_precision": precision, "train_adapter": train_adapter, "lora": lora}
    params = RunParams.model_validate(values(model=held))
    loaded = load_model(
        random_model / "flux-fill",
        random_model / "siglip",
        random_model / "calligrapher.bin",
        digest="",
        guidance_scale=1.0,
        max_sequence_length=24,
        device="cpu",
        **held,
    )

    def size(*modules):
        return sum(p.nbytes for module in modules for p in module.parameters())

    policy, pipeline = loaded.policy, loaded.encoders.pipeline
    trained = policy.parameters
    parts = memory(params)[-1].parts
    assert parts["trained weights"] == sum(p.nbytes for p in trained.values())
    assert parts["transformer"] + parts["adapter, frozen"] + parts["trained weights"] == size(
        policy.model
    )
    assert parts["VAE, CLIP, SigLIP"] == size(
        pipeline.vae, pipeline.text_encoder, loaded.encoders.siglip
    )
    assert parts["T5"] == size(pipeline.text_encoder_2)
    copy = policy.to_storage(policy.snapshot())
    assert held_bytes(meta_model(params)) == sum(w.nbytes for w in copy.values())
    state = new_state(policy, weight_decay=0.0, ema=False)
    for parameter in trained.values():
        parameter.grad = torch.ones_like(parameter)
    state.optimizer.step()
    moments = [v for entry in state.optimizer.state.values() for v in entry.values()]
    assert optimizer_bytes(trained.values(), eight_bit=False) == sum(m.nbytes for m in moments)


def test_8_bit_moments_take_a_byte_a_scale_per_block_and_float32_where_a_tensor_is_small():
    weights = [torch.empty(4096), torch.empty(300, 30), torch.empty(4095)]
    scales = 16 + 36  # blocks of 256
    assert optimizer_bytes(weights, eight_bit=True) == 2 * (4096 + 9000 + 4 * scales) + 8 * 4095


@pytest.mark.parametrize(
    ("algorithm", "settings"),
    [
        ("nft", {"kl_coef": 0.1, "num_train_sigmas": 2, "old_policy": "copy"}),
        ("nft", {"kl_coef": 0.1, "num_train_sigmas": 2, "old_policy": "fixed"}),
        ("nft", {"kl_coef": 0.0, "num_train_sigmas": 1, "old_policy": "fixed"}),
        ("nft", {"timestep_fraction": 0.3, "background_coef": 0.1, "background_rows": 2}),
        ("grpo", {"kl_coef": 0.1, "window_size": 2, "guard": True}),
        ("grpo", {"kl_coef": 0.0, "window_size": 1}),
    ],
)
def test_forwards_files_and_encodings_are_those_of_a_real_run(
    algorithm, settings, train, values, encodings, monkeypatch
):
    from calligrapher.model.policy import Policy

    calls, velocity = [], Policy.velocity

    def counted(self, x, *more):
        calls.append((torch.is_grad_enabled(), self._used, len(x)))
        return velocity(self, x, *more)

    monkeypatch.setattr(Policy, "velocity", counted)
    changes = {algorithm: settings, "warmup": {"steps": 0}, "update": {"batch_size": 3}}
    params = RunParams.model_validate(values(algorithm, **changes))
    folder, _ = train("counted", algorithm, **changes)
    images = 2 * params.images_per_round
    told = forwards(params)
    found = Counter()
    for gradient, used, rows in calls:
        found["trained" if gradient else "used" if used else "plain"] += rows
    first = (
        params.images_per_round * told.old * (told.reference > 0)
    )  # `old` is the reference in round 0
    assert found["trained"] == pytest.approx(images * told.trained)
    assert found["plain"] == 0
    assert found["used"] == images * (told.rollout + told.old + told.reference) - first

    model = meta_model(params)
    sizes = row_bytes(params, model)
    shards = list(folder.glob("round-*/rollout/*.parquet"))
    pixels = params.model.width * params.model.height
    tables = 20_000 * len(shards)
    assert images * sizes["sampled"] < sum(s.stat().st_size for s in shards)
    assert sum(s.stat().st_size for s in shards) < images * (sizes["sampled"] + 3 * pixels) + tables
    entry = min(
        (encodings / "conditioning").glob("*.safetensors"),
        key=lambda p: abs(p.stat().st_size - sizes["conditioning"]),
    )
    assert (
        sizes["conditioning"] <= entry.stat().st_size <= sizes["conditioning"] + 600
    )  # its header


# --- the full-size model ---


def parts(params, stage=-1):
    return memory(params)[stage].parts


def test_nft_needs_copies_of_the_adapter_beyond_grpo_and_never_a_second_base():
    nft = load_params(NFT)
    grpo = other_algorithm(nft)
    assert (nft.algorithm, grpo.algorithm) == ("nft", "grpo")
    more = {name: v - parts(grpo)[name] for name, v in parts(nft).items() if v != parts(grpo)[name]}
    assert set(more) == {"old", "rows of the round"}
    held = held_bytes(meta_model(nft))
    assert more["old"] == held < 1.02 * 2 * 3_018_043_904
    assert copies(load_params(NFT, ["nft.old_policy=fixed"])) == {"old": False, "reference": True}
    assert copies(load_params(NFT, ["nft.kl_coef=0"])) == {"old": True, "reference": False}


def test_in_bfloat16_old_and_reference_are_half_as_large_and_without_them_nft_would_not_fit():
    full = parts(load_params(NFT, ["model.mixed_precision='no'"]))
    half = parts(load_params(NFT))
    assert full["old"] == 4 * 3_018_043_904
    assert half["old"] == pytest.approx(full["old"] / 2, rel=0.02)
    nft = load_params(NFT)
    assert needed(nft) < GPUS["h100"] < needed(nft) + 2 * (full["old"] - half["old"]) / GIB


@pytest.mark.parametrize("path", [NFT, GRPO])
def test_a_production_file_needs_what_its_header_says_and_fits_an_80_gb_gpu(path):
    header = re.search(r"reckons (\S+) GiB of an H100's (\S+)\)", path.read_text())
    plan = make_plan(path, [], *capacity("h100", None))
    assert plan.fits
    assert plan.changes == []
    assert f"{plan.needed_gib:.1f}" == header[1]
    assert str(plan.gpu_gib) == header[2]
    table = plan.text().partition("\n")[2]  # without the path, which is absolute here
    assert table in (ROOT / "docs/full-size.md").read_text()


@pytest.mark.parametrize("path", [NFT, GRPO])
def test_every_key_of_a_production_file_is_there_and_carries_its_reason(path):
    given = load_params(path)
    lines = path.read_text().splitlines()
    keys = [re.match(r"( *)(\w+):(.*)", line) for line in lines if not line.startswith("#")]
    named = {m[2] for m in keys if m}
    for name, section in given.resolved().items():
        if isinstance(section, dict):
            assert set(section) <= named, f"{name} lacks {set(section) - named}"
    bare = [
        m[2]
        for m in keys
        if m and not (m[3] == "" and m[1] == "") and not re.search(r"# \w.{4,}", m[3])
    ]
    assert bare == []


def test_smaller_batches_are_advised_together_where_the_update_needs_the_rollouts():
    plan = make_plan(GRPO, [], *capacity(None, 69.0))
    assert not plan.fits
    assert plan.changes == [
        "rollout.batch_size=1",
        "update.batch_size=1",
        "update.gradient_accumulation_steps=4",
    ]
    assert plan.needed_after_gib <= 69.0


def test_changes_are_the_least_that_make_it_fit_and_are_reckoned_not_assumed():
    def load(settings):
        return load_params(NFT, settings)

    wasteful = ["model.gradient_checkpointing=false"]
    assert needed(load(wasteful)) > GPUS["h100"]
    changes, after = changes_to_fit(load, wasteful, GPUS["h100"])
    assert changes == ["model.gradient_checkpointing=true"]
    assert after == needed(load([*wasteful, *changes])) <= GPUS["h100"]
    lora = ["model.train_adapter=false", "model.lora={}"]
    changes, after = changes_to_fit(load, [], GPUS["l40s"])
    assert (changes, after <= GPUS["l40s"]) == (
        lora,
        True,
    )  # smaller ones were tried, and taken out again
    changes, after = changes_to_fit(load, [], GPUS["4090"])
    assert after > GPUS["4090"]
    assert changes[-2:] == lora


def test_ranks_that_each_hold_too_much_are_advised_to_share_the_weights_out():
    def load(settings):
        ranks = ["launch.num_processes=8", "launch.allow_fewer_servers=true"]
        return load_params(NFT, [*ranks, *settings])

    changes, after = changes_to_fit(load, [], GPUS["4090"])
    assert changes == [
        "launch.strategy=fsdp2",
        "warmup.use_8bit_adam=false",
        "update.use_8bit_adam=false",
        "model.train_adapter=false",
        "model.lora={}",
    ]
    assert after == needed(load(changes)) <= GPUS["4090"]


def test_gpus_are_named_or_given_by_their_memory():
    assert capacity(None, None) == ("h100", GPUS["h100"])
    assert capacity("A100-40", None)[1] == GPUS["a100-40"]
    assert capacity(None, 96.0)[1] == 96.0
    with pytest.raises(ParamsError, match=r"--gpu must be one of 4090, .* Got 'tpu'"):
        capacity("tpu", None)
    for bad in (1.5, float("nan")):
        with pytest.raises(ParamsError, match="--gpu-memory must be a number of GiB above the 2"):
            capacity(None, bad)


def test_a_canvas_that_does_not_fit_the_model_is_refused():
    with pytest.raises(
        ParamsError, match=r"model.width must be a multiple of 16. Got 520. Nearest: 512, 528"
    ):
        memory(load_params(NFT, ["model.width=520"]))
