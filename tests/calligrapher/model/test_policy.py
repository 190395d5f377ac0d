"""Policies: sets of weights on one base that are switched, copied and put back without a trace."""

import pytest
import torch
from small_policy import TARGETS, build, inputs, moved, velocity

from calligrapher.errors import CheckpointError, ParamsError
from calligrapher.model.ip_adapter import set_scale
from calligrapher.model.lora import add_lora
from calligrapher.model.policy import Policy


@pytest.fixture
def policy():
    return build()


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


# --- what is trained ---


@pytest.mark.parametrize(
    ("lora", "train_adapter", "trained"),
    [
        (False, True, {"adapter"}),
        (True, True, {"adapter", "lora"}),
        (True, False, {"lora"}),
        (False, False, set()),
    ],
)
def test_only_adapter_and_lora_weights_are_trained(lora, train_adapter, trained):
    policy = build(lora, train_adapter)
    kinds = {"lora" if "lora_" in name else name.split(".")[0] for name in policy.parameters}
    assert kinds == trained
    for name, parameter in policy.model.named_parameters():
        assert parameter.requires_grad == (name in policy.parameters)
    assert set(policy.snapshot()) == set(policy.parameters)


def test_the_adapter_is_trained_whole_and_counted_once(policy):
    adapter = policy.model.adapter.state_dict()
    assert set(policy.parameters) == {f"adapter.{name}" for name in adapter}
    assert len({id(p) for p in policy.model.parameters()}) == len(list(policy.model.parameters()))


def test_lora_sits_on_its_targets_and_starts_as_nothing():
    plain, with_lora = build(), build(lora=True)
    assert torch.equal(velocity(plain), velocity(with_lora))
    pairs = {name.split(".lora_")[0] for name in with_lora.parameters if "lora_" in name}
    assert all(name.endswith(tuple(TARGETS)) for name in pairs)
    assert (
        len(pairs) == 3 + 1 + 2
    )  # to_q in all three blocks, to_out in the double one, proj_mlp in the single ones
    up = next(p for name, p in with_lora.parameters.items() if "lora_B" in name)
    up.data.fill_(0.5)
    assert not torch.equal(velocity(plain), velocity(with_lora))


def test_lora_may_be_added_before_or_after_the_adapter():
    before, after = build(lora=True, before=True), build(lora=True)
    assert list(before.parameters) == list(after.parameters)
    assert torch.equal(velocity(before), velocity(after))
    assert equal(before.snapshot(), after.snapshot())


ADAPTER_TARGETS = ["to_k_ip", "to_v_ip", "proj.0", "proj.2", "id_proj.0", "id_proj.2"]


def test_lora_on_the_adapter_starts_as_nothing_and_trains_alone():
    plain = build(train_adapter=False)
    policy = build(train_adapter=False, adapter_targets=ADAPTER_TARGETS)
    assert torch.equal(velocity(plain), velocity(policy))
    layers = {name.split(".lora_")[0] for name in policy.parameters}
    assert len(policy.parameters) == 2 * len(layers) == 2 * (3 * 2 + 2 + 2)
    assert all(name.startswith("adapter.") for name in layers)
    x, sigma, conditioning = inputs()
    policy.velocity(x, sigma, conditioning).square().mean().backward()
    ups = [p for name, p in policy.parameters.items() if "lora_B" in name]
    assert all(up.grad.abs().max() > 0 for up in ups)
    assert all(
        p.grad is None for n, p in policy.model.named_parameters() if n not in policy.parameters
    )


@pytest.mark.parametrize("target", ADAPTER_TARGETS)
def test_every_target_of_the_adapter_has_an_effect(target):
    plain, policy = velocity(build()), build(train_adapter=False, adapter_targets=[target])
    with policy.use(moved(policy, 1)):
        assert (velocity(policy) - plain).abs().max() > 1e-5


def test_a_layer_with_a_pair_is_itself_left_as_it_is_while_the_rest_trains():
    names = set(build(adapter_targets=["proj.2"]).parameters)
    assert {n for n in names if "image_proj_mlp" in n} == {
        "adapter.image_proj_mlp.proj.0.weight",
        "adapter.image_proj_mlp.proj.0.bias",
        "adapter.image_proj_mlp.proj.2.lora_A.default.weight",
        "adapter.image_proj_mlp.proj.2.lora_B.default.weight",
        "adapter.image_proj_mlp.norm.weight",
        "adapter.image_proj_mlp.norm.bias",
    }


@pytest.mark.parametrize("target", ["cross_attn", "out_proj", "norm", "to_q", "proj", "roj.0"])
def test_a_target_that_no_linear_layer_of_the_adapter_has_is_refused(target):
    message = (
        f"must be a linear layer of the StyleAdapter. Got {target}. It has: id_proj.0, id_proj.2, "
    )
    with pytest.raises(ParamsError, match=message):
        build(adapter_targets=["to_k_ip", target])


def test_lora_weights_follow_from_their_seed_alone():
    policies = [build(), build()]
    for policy, state in zip(policies, (1, 2), strict=True):
        torch.manual_seed(state)
        add_lora(policy.model.transformer, rank=2, alpha=4.0, targets=["to_q"], seed=9)
    a, b = (Policy(p.model).snapshot() for p in policies)
    assert equal(a, b)
    assert any("lora_A" in name for name in a)


# --- the model call ---


def test_a_row_does_not_depend_on_its_neighbours(policy):
    x, sigma, conditioning = inputs()
    with torch.no_grad():
        together = policy.velocity(x, sigma, conditioning)
        alone = [
            policy.velocity(x[i : i + 1], sigma[i : i + 1], conditioning.rows([i]))
            for i in range(3)
        ]
    torch.testing.assert_close(torch.cat(alone), together, rtol=0, atol=1e-5)


def test_rows_are_picked_in_the_order_asked_for():
    _, _, conditioning = inputs()
    picked = conditioning.rows([2, 0, 2, 2])
    assert torch.equal(picked.style, conditioning.style[[2, 0, 2, 2]])
    assert torch.equal(picked.masked, conditioning.masked[[2, 0, 2, 2]])
    assert torch.equal(picked.image_ids, conditioning.image_ids)


@pytest.mark.parametrize("field", ["prompt", "pooled", "style", "masked", "image_ids"])
def test_every_part_of_the_conditioning_matters(policy, field):
    value = getattr(inputs()[2], field)
    assert (velocity(policy, **{field: value + 1.0}) - velocity(policy)).abs().max() > 1e-5


def test_sigma_and_guidance_matter(policy):
    x, sigma, conditioning = inputs()
    plain = velocity(policy)
    with torch.no_grad():
        assert not torch.equal(policy.velocity(x, sigma / 2, conditioning), plain)
    policy.model.guidance_scale = 30.0
    assert not torch.equal(velocity(policy), plain)


def test_a_row_without_style_is_the_unstyled_model_and_the_others_are_untouched(policy):
    x, sigma, conditioning = inputs()
    with torch.no_grad():
        styled = policy.velocity(x, sigma, conditioning)
        mixed = policy.velocity(x, sigma, conditioning, torch.tensor([1.0, 0.0, 1.0]))
        set_scale(policy.model.transformer, 0.0)
        plain = policy.velocity(x, sigma, conditioning)
    assert torch.equal(mixed[[0, 2]], styled[[0, 2]])
    assert torch.equal(mixed[1], plain[1])
    assert not torch.equal(styled[1], plain[1])


def test_a_dropped_style_trains_nothing(policy):
    x, sigma, conditioning = inputs()
    policy.velocity(x, sigma, conditioning, torch.zeros(3)).square().mean().backward()
    assert all(p.grad is None or not p.grad.any() for p in policy.parameters.values())


def test_autocast_gives_float32_near_the_exact_velocity():
    exact, half = velocity(build()), velocity(build(autocast=torch.bfloat16))
    assert half.dtype == torch.float32
    assert not torch.equal(exact, half)
    torch.testing.assert_close(half, exact, rtol=0, atol=0.05)


# --- policies ---


def test_a_snapshot_is_a_copy(policy):
    before = policy.snapshot()
    kept = {n: w.clone() for n, w in before.items()}
    for parameter in policy.parameters.values():
        parameter.data.add_(1)
    assert equal(before, kept)
    for weight in before.values():
        weight.zero_()
    assert all(p.abs().sum() > 0 for p in policy.parameters.values())


def test_four_policies_take_turns_and_each_comes_back_bit_by_bit():
    policy = build(lora=True)
    weights = {"trained": policy.snapshot()} | {
        name: moved(policy, seed) for seed, name in enumerate(("old", "reference", "ema"))
    }
    kept = {name: {n: w.clone() for n, w in w_.items()} for name, w_ in weights.items()}
    own = velocity(policy)
    first = {}
    for name in ("old", "ema", "trained", "reference"):
        with policy.use(weights[name]):
            first[name] = velocity(policy)
        assert torch.equal(velocity(policy), own)
    assert torch.equal(first["trained"], own)
    outputs = list(first.values())
    assert all(not torch.equal(a, b) for i, a in enumerate(outputs) for b in outputs[:i])
    for name in ("reference", "old", "ema", "trained", "old"):
        with policy.use(weights[name]):
            assert torch.equal(velocity(policy), first[name])
    assert all(equal(weights[name], kept[name]) for name in weights)
    assert equal(policy.snapshot(), weights["trained"])


def test_uses_can_be_nested(policy):
    a, b = moved(policy, 1), moved(policy, 2)
    with policy.use(a):
        inside = velocity(policy)
        with policy.use(b):
            assert not torch.equal(velocity(policy), inside)
        assert torch.equal(velocity(policy), inside)


def test_use_puts_the_trained_weights_back_after_an_exception(policy):
    before, own = policy.snapshot(), velocity(policy)
    places = {n: p.data_ptr() for n, p in policy.parameters.items()}
    with pytest.raises(KeyboardInterrupt), policy.use(moved(policy, 1)):
        raise KeyboardInterrupt
    assert equal(policy.snapshot(), before)
    assert {n: p.data_ptr() for n, p in policy.parameters.items()} == places
    assert torch.equal(velocity(policy), own)
    assert torch.is_grad_enabled()


def test_use_that_fails_half_way_puts_everything_back(policy):
    before = policy.snapshot()
    weights = moved(policy, 1)

    class Broken(torch.Tensor):
        def to(self, *_):
            raise RuntimeError("CUDA out of memory")

    last = list(weights)[-1]
    weights[last] = weights[last].as_subclass(Broken)
    with pytest.raises(RuntimeError, match="out of memory"), policy.use(weights):
        pass
    assert equal(policy.snapshot(), before)


def test_nothing_under_use_has_a_gradient_and_training_goes_on_afterwards(policy):
    x, sigma, conditioning = inputs()
    with policy.use(moved(policy, 1)):
        assert not policy.velocity(x, sigma, conditioning).requires_grad
    optimizer = torch.optim.SGD(policy.parameters.values(), lr=0.1)
    before = policy.snapshot()
    policy.velocity(x, sigma, conditioning).square().mean().backward()
    optimizer.step()
    assert not equal(policy.snapshot(), before)


def test_a_gradient_is_the_same_whether_another_policy_ran_before_backward_or_not(policy):
    x, sigma, conditioning = inputs()
    gradients = []
    for between in (False, True):
        policy.model.zero_grad()
        loss = policy.velocity(x, sigma, conditioning).square().mean()
        if between:
            with policy.use(moved(policy, 1)):
                policy.velocity(x, sigma, conditioning)
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in policy.parameters.items()})
    assert equal(*gradients)


def test_gradient_checkpointing_changes_no_gradient_even_when_another_policy_runs_in_between(
    policy,
):
    x, sigma, conditioning = inputs()
    gradients = []
    for checkpointing in (False, True):
        policy.model.zero_grad()
        if checkpointing:
            policy.model.transformer.enable_gradient_checkpointing()
        loss = policy.velocity(x, sigma, conditioning).square().mean()
        with policy.use(moved(policy, 1)):
            policy.velocity(x, sigma, conditioning)
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in policy.parameters.items()})
    assert equal(*gradients)


def test_load_makes_the_weights_the_trained_ones_and_copies_them(policy):
    weights = moved(policy, 1)
    policy.loaded = "somebody"
    policy.load(weights)
    assert policy.loaded is None
    assert equal(policy.snapshot(), weights)
    for parameter in policy.parameters.values():
        parameter.data.zero_()
    assert all(w.abs().sum() > 0 for w in weights.values())


def test_load_under_use_is_a_mistake(policy):
    """It would write into the weights in use, and what it loaded would be gone afterwards."""
    old = moved(policy, 1)
    kept = {n: w.clone() for n, w in old.items()}
    with pytest.raises(AssertionError), policy.use(old):
        policy.load(moved(policy, 2))
    assert equal(old, kept)


def test_float16_weights_on_disk_are_used_in_the_models_precision(policy):
    half = {n: w.half() for n, w in moved(policy, 1).items()}
    with policy.use(half):
        assert velocity(policy).dtype == torch.float32
        assert equal(policy.snapshot(), {n: w.float() for n, w in half.items()})
    assert {w.dtype for w in policy.snapshot().values()} == {torch.float32}


@pytest.mark.parametrize("how", ["missing", "unknown", "another shape"])
@pytest.mark.parametrize("way", ["load", "use"])
def test_weights_of_another_model_are_refused_and_nothing_changes(policy, how, way):
    before = policy.snapshot()
    weights = moved(policy, 1)
    name = "adapter.image_proj_mlp.norm.bias"
    if how == "missing":
        del weights[name]
    elif how == "unknown":
        weights["transformer.x.lora_A.default.weight"] = torch.zeros(2)
    else:
        weights[name] = torch.zeros(15)
    with pytest.raises(
        CheckpointError, match=r"must be those of this model .* 1 are missing, unknown or"
    ):
        policy.load(weights) if way == "load" else policy.use(weights).__enter__()
    assert equal(policy.snapshot(), before)


def test_matrices_held_in_autocasts_type_change_no_bit_of_the_velocity():
    policy = build(lora=True, autocast=torch.bfloat16)
    weights = moved(policy, 1)
    held = policy.to_storage(weights)
    assert {n for n, w in held.items() if w.dtype == torch.bfloat16} == {
        n
        for n, w in weights.items()
        if n.endswith(".weight") and w.ndim == 2 and "in_proj" not in n
    }
    assert sum(w.nbytes for w in held.values()) < sum(w.nbytes for w in weights.values())
    own = policy.snapshot()
    with policy.use(held):
        under_use = velocity(policy)
    assert equal(policy.snapshot(), own)
    policy.load(weights)  # in float32, as trained weights are
    with torch.no_grad():
        assert torch.equal(velocity(policy), under_use)


def test_a_gradient_is_the_same_after_a_policy_that_is_held_in_bfloat16_took_its_turn():
    policy = build(lora=True, autocast=torch.bfloat16)
    gradients = []
    for between in (False, True):
        policy.model.zero_grad()
        loss = policy.velocity(*inputs()).square().mean()
        if between:
            with policy.use(policy.to_storage(moved(policy, 1))):
                velocity(policy)
        loss.backward()
        gradients.append({n: p.grad.clone() for n, p in policy.parameters.items()})
    assert equal(*gradients)
    assert {g.dtype for g in gradients[1].values()} == {torch.float32}


def test_without_autocast_every_weight_is_held_in_float32(policy):
    assert {w.dtype for w in policy.to_storage(policy.snapshot()).values()} == {torch.float32}
