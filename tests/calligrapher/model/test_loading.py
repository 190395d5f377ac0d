"""Loading a whole model: precision, what trains, gradient checkpointing, pictures, bad folders."""

import pytest
import torch

from calligrapher.data.canvas import Canvas
from calligrapher.data.dataset import load_cases
from calligrapher.errors import CheckpointError, ParamsError
from calligrapher.model import compiling
from calligrapher.model.conditioning import ConditioningCache
from calligrapher.model.loading import load_model, pick_device, pictures
from calligrapher.tiny.world import write_bench

CANVAS = Canvas(48, 32)
LORA = {"rank": 2, "alpha": 4.0, "targets": ["to_q"]}


@pytest.fixture
def load(random_model):
    def load(**changes):
        given = {
            "base": random_model / "flux-fill",
            "siglip": random_model / "siglip",
            "adapter": random_model / "calligrapher.bin",
            "digest": "random",
            "guidance_scale": 3.5,
            "max_sequence_length": 24,
            "device": "cpu",
        }
        return load_model(**given | changes)

    return load


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    return load_cases(write_bench(tmp_path_factory.mktemp("c"), num_cases=2, split="train", seed=0))


def gradients(model, cases):
    conditioning = ConditioningCache(model.encoders, CANVAS, model.device).batch(cases)
    length = conditioning.masked.shape[1]
    x = torch.randn(2, length, 64, generator=torch.Generator().manual_seed(0))
    model.policy.velocity(x, torch.tensor([0.8, 0.3]), conditioning).square().mean().backward()
    return {n: p.grad for n, p in model.policy.parameters.items()}


def test_gradient_checkpointing_computes_twice_and_gives_the_same_gradient(load, cases):
    found = {}
    for on in (False, True):
        model = load(gradient_checkpointing=on, lora=LORA)
        calls = []
        model.policy.model.transformer.transformer_blocks[0].norm1.register_forward_hook(
            lambda *_, calls=calls: calls.append(1)
        )
        found[on] = gradients(model, cases)
        assert len(calls) == (2 if on else 1)
    assert found[False].keys() == found[True].keys()
    for name, plain in found[False].items():
        torch.testing.assert_close(found[True][name], plain, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("mixed_precision", "dtype"), [("no", torch.float32), ("bf16", torch.bfloat16)]
)
def test_frozen_weights_have_the_forwards_type_and_trained_ones_float32(
    load, cases, mixed_precision, dtype
):
    model = load(mixed_precision=mixed_precision, lora=LORA)
    transformer = model.policy.model.transformer
    assert transformer.x_embedder.weight.dtype == dtype
    assert {p.dtype for p in model.policy.parameters.values()} == {torch.float32}
    found = gradients(model, cases)
    assert all(g is not None and g.isfinite().all() for g in found.values())
    trained = {n for n, p in model.policy.model.named_parameters() if p.requires_grad}
    assert trained == found.keys()
    assert any("lora_" in n for n in trained)
    assert any(n.startswith("adapter.") for n in trained)


def test_the_adapter_can_be_left_as_it_is(load):
    names = load(train_adapter=False, lora=LORA).policy.parameters
    assert names
    assert all("lora_" in name for name in names)


def test_the_matrices_of_an_adapter_that_is_not_trained_are_held_in_the_forwards_type(load, cases):
    lora = {"rank": 2, "alpha": 4.0, "targets": [], "adapter_targets": ["to_k_ip", "id_proj.2"]}
    model = load(train_adapter=False, mixed_precision="bf16", lora=lora)
    adapter = model.policy.model.adapter
    frozen = {(n, p.dtype) for n, p in adapter.named_parameters() if not p.requires_grad}
    assert ("attn_adapter.0.to_v_ip.weight", torch.bfloat16) in frozen
    assert {d for n, d in frozen if "norm" in n or n.endswith("bias")} == {torch.float32}, (
        "nothing is rounded"
    )
    assert {p.dtype for p in model.policy.parameters.values()} == {torch.float32}
    found = gradients(model, cases)
    assert len(found) == 2 * (3 + 1)  # keys in three blocks, one layer of the QFormer
    assert all(g is not None and g.isfinite().all() for g in found.values())


def test_a_new_adapter_comes_from_the_seed(load):
    one, same, other = (load(adapter=None, seed=seed).policy.snapshot() for seed in (1, 1, 2))
    assert all(torch.equal(one[n], same[n]) for n in one)
    assert any(not torch.equal(one[n], other[n]) for n in one)


def test_lora_starts_without_an_effect(load, cases):
    plain, with_lora = load(), load(lora=LORA)
    conditioning = ConditioningCache(plain.encoders, CANVAS, plain.device).batch(cases)
    x, sigma = torch.randn(2, conditioning.masked.shape[1], 64), torch.tensor([0.8, 0.3])
    with torch.no_grad():
        assert torch.equal(*(m.policy.velocity(x, sigma, conditioning) for m in (plain, with_lora)))


def test_pictures_have_the_canvas_size_and_lose_the_strip_on_top(load):
    model = load()
    whole = torch.randn(2, 6 * 6, 64, generator=torch.Generator().manual_seed(0))  # 48 x 48 pixels
    images = pictures(model, whole, CANVAS)
    assert [image.size for image in images] == [(48, 32)] * 2
    uncut = pictures(model, whole, Canvas(48, 48))
    assert images[0].tobytes() == uncut[0].crop((0, 16, 48, 48)).tobytes()


@pytest.mark.parametrize("part", ["base", "siglip", "adapter"])
def test_a_missing_folder_is_named(load, tmp_path, part):
    with pytest.raises(CheckpointError, match="nowhere"):
        load(**{part: tmp_path / "nowhere"})


def test_an_unknown_device_is_an_error_of_the_params():
    assert pick_device("cpu").type == "cpu"
    with pytest.raises(ParamsError, match=r"model.device must be.*Got 'warp'"):
        pick_device("warp")


def test_attention_through_diffusers_native_backend_has_the_same_bits(load, cases):
    plain, native = (load(attention_backend=backend) for backend in (None, "native"))
    processors = native.policy.model.transformer.attn_processors.values()
    assert {processor._attention_backend for processor in processors} == {"native"}
    first, second = gradients(plain, cases), gradients(native, cases)
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_backend_of_attention_that_nobody_has_is_refused(load):
    with pytest.raises(ParamsError, match=r"model\.attention_backend.*Got 'slow'"):
        load(attention_backend="slow")


def use_changes_the_velocity(model, cases):
    """Whether `Policy.use` is seen by the model's next call, and its end as well."""
    policy = model.policy
    conditioning = ConditioningCache(model.encoders, CANVAS, model.device).batch(cases)
    x = torch.ones(2, conditioning.masked.shape[1], 64), torch.tensor([0.8, 0.3]), conditioning
    with torch.no_grad():
        before = policy.velocity(*x)
        with policy.use({name: 2 * weight for name, weight in policy.snapshot().items()}):
            other = policy.velocity(*x)
        return not torch.allclose(before, other) and torch.equal(before, policy.velocity(*x))


def test_blocks_that_were_traced_run_under_the_weights_in_use(load, cases, monkeypatch):
    monkeypatch.setattr(compiling, "HOW", {"backend": "eager", "dynamic": False})
    model = load(compiled=True)
    assert use_changes_the_velocity(model, cases)
    expected, found = gradients(load(), cases), gradients(model, cases)
    assert all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.slow
def test_compiled_blocks_give_the_same_within_rounding(load, cases):
    model = load(compiled=True, lora=LORA, gradient_checkpointing=True)
    expected, found = gradients(load(lora=LORA), cases), gradients(model, cases)
    for name, gradient in expected.items():
        assert (found[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    assert use_changes_the_velocity(model, cases)


@pytest.mark.slow
def test_compiled_blocks_say_the_same_with_and_without_a_gradient_in_half_precision(load, cases):
    model = load(compiled=True, mixed_precision="bf16")
    conditioning = ConditioningCache(model.encoders, CANVAS, model.device).batch(cases)
    x = torch.randn(2, conditioning.masked.shape[1], 64), torch.tensor([0.8, 0.3]), conditioning
    with torch.no_grad():
        sampled = model.policy.velocity(*x)
    assert torch.equal(model.policy.velocity(*x), sampled)
