"""Two ranks train and save as one process does, each with the whole model or with half of it."""

import dataclasses
import hashlib
import math

import pytest
import small_policy
import torch
from two_ranks import on_ranks

from calligrapher.errors import ParamsError
from calligrapher.model import sharding
from calligrapher.ranks import ALONE
from calligrapher.rl.grpo import GRPOParams
from calligrapher.rl.nft import NFTParams
from calligrapher.rl.rows import TrainRows
from calligrapher.rl.train_loop import BatchSchedule, TrainLoop
from calligrapher.rl.train_state import EMA, OPTIMIZER, STATE_FILES, new_state
from calligrapher.sampling.exploration import Window
from calligrapher.sampling.sampler import sample
from tasks.params.run_params import UpdateParams

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]
CPU = torch.device("cpu")
STEPS, ROWS = 4, 5
LORA = {"lora": True, "train_adapter": False}
KINDS = {
    "nft": ("nft", {}),
    "nft lora": ("nft", LORA),
    "nft both, recomputed": ("nft", {"lora": True, "recompute": True}),
    "nft bf16": ("nft", {"autocast": torch.bfloat16}),
    "nft lora bf16": ("nft", LORA | {"autocast": torch.bfloat16}),
    "grpo": ("grpo", {}),
    "grpo lora": ("grpo", LORA | {"recompute": True}),
}


STRATEGIES = ("ddp", "fsdp2")


def build(ranks, strategy="fsdp2", *, recompute=False, **how):
    policy = small_policy.build(**how)
    for name, parameter in policy.parameters.items():
        if "lora_B" in name:  # not a pair that is nothing
            torch.manual_seed(len(name))
            torch.nn.init.normal_(parameter.data, std=0.1)
    if recompute:
        policy.model.transformer.enable_gradient_checkpointing()
        policy.model.train()
    policy.shard(ranks if strategy == "fsdp2" else ALONE, CPU)
    return policy


def conditioning():
    _, _, c = small_policy.inputs(rows=3)
    return dataclasses.replace(c.rows([i % 3 for i in range(ROWS)]), image_ids=c.image_ids)


def algorithm(kind):
    if kind == "nft":
        return NFTParams(kl_coef=0.1, num_train_sigmas=2)
    return GRPOParams(kl_coef=0.1, window_size=2, noise_level=0.7)


def rollout(policy, params, weights):
    """Sampled in the update's batches: GRPO's ratio is exactly 1 among the same neighbours."""
    c, parts = conditioning(), []
    with policy.use(weights):
        for at in range(0, ROWS, 2):
            index = list(range(ROWS))[at : at + 2]
            parts.append(
                sample(
                    policy,
                    c.rows(index),
                    index,
                    STEPS,
                    window_starts=[0] * len(index) if params.exploration else None,
                    exploration=params.exploration,
                )
            )
    window = None
    if params.exploration:
        fields = ("trajectory", "log_prob", "mean", "sigmas")
        window = Window(*(torch.cat([getattr(p.window, f) for p in parts]) for f in fields))
    advantages = torch.tensor([1.0, -1.0, 0.5, -0.2, 2.0])
    x0 = torch.cat([part.x0 for part in parts])
    places = torch.stack([torch.arange(ROWS), torch.zeros(ROWS, dtype=torch.int64)], dim=1)
    return TrainRows(x0, c, advantages, window, places)


def step_of(ranks, strategy, kind):
    """Two optimizer steps: 3 batches of 2, 2 and 1 rows, then again; the gradients of the last."""
    name, how = KINDS[kind]
    policy, params = build(ranks, strategy, **how), algorithm(name)
    own = policy.to_storage(policy.snapshot(whole=False))
    other = policy.to_storage({n: 1.1 * w for n, w in own.items()})
    batch = rollout(policy, params, own)
    state = new_state(policy, weight_decay=0.01, ema=True)

    def objective(rows, at):
        key = at.pass_key
        return params.losses(policy, rows, key, num_steps=STEPS, old=own, reference=other)

    settings = UpdateParams(learning_rate=1e-3, max_grad_norm=0.005)
    loop = TrainLoop(policy, state, settings, objective, ema_max_decay=0.5, ranks=ranks)
    history, gradients = [], []

    def on_step(metrics):
        history.append(metrics)
        gradients.append({n: sharding.whole(p.grad).clone() for n, p in policy.parameters.items()})

    loop.run(batch.pick, BatchSchedule(ROWS, 2, 3, 2, "0/update/0"), on_step=on_step)
    return history, gradients, policy.snapshot()


def overflow(ranks, strategy):
    """Two steps in fp16; in the first, a batch of the first rank is beyond the scale.

    Returns the weights, then of each step its metrics, the scale, the count and the weights after.
    """
    policy = build(ranks, strategy, lora=True, autocast=torch.float16)
    state = new_state(policy, weight_decay=0.01, ema=True)
    c = conditioning()
    x0 = torch.randn(ROWS, 6, 8, generator=torch.Generator().manual_seed(3))
    schedule = BatchSchedule(ROWS, 2, 3, 2, "key")
    beyond = schedule.steps()[0][0].key  # the first rank's first batch
    batch = TrainRows(x0, c, torch.zeros(ROWS))

    def objective(rows, at):
        sigma = torch.full((len(rows),), 0.5)
        loss = ((policy.velocity(rows.x0, sigma, rows.conditioning) - rows.x0) ** 2).mean()
        yield loss * (1e35 if at.key == beyond else 1.0), {"loss": loss.detach()}

    settings = UpdateParams(learning_rate=1e-3)
    loop = TrainLoop(policy, state, settings, objective, ema_max_decay=0.5, ranks=ranks)
    before, history = policy.snapshot(), []

    def on_step(metrics):
        history.append((metrics, state.scaler.get_scale(), state.step, policy.snapshot()))

    loop.run(batch.pick, schedule, on_step=on_step)
    return before, history


def switching(ranks):
    """Velocities under own weights, under others, nested, and after; with `load`."""
    policy = build(ranks)
    plain = build(ALONE)
    old, older = small_policy.moved(plain, 1), small_policy.moved(plain, 2)
    found = {"own": small_policy.velocity(policy)}
    with policy.use(old):
        found["old"] = small_policy.velocity(policy)
        with policy.use(policy.to_storage(older)):
            found["older"] = small_policy.velocity(policy)
        found["old again"] = small_policy.velocity(policy)
    found["back"] = small_policy.velocity(policy)
    with pytest.raises(KeyboardInterrupt), policy.use(old):
        raise KeyboardInterrupt
    found["after an error"] = small_policy.velocity(policy)
    policy.load(older)
    found["loaded"] = small_policy.velocity(policy)
    whole = policy.snapshot()
    held = sum(w.numel() for w in policy.snapshot(whole=False).values())
    base = sum(sharding.held(p).numel() for p in policy.model.parameters())
    return found, whole, held, base


def states(ranks, folder, *, save, load=None, steps=1):
    """Train `steps` steps from the state in `load`, or from new, and save to `save`."""
    policy = build(ranks, lora=True)
    state = new_state(policy, weight_decay=0.01, ema=True)
    if load is not None:
        state.load(policy, folder / load)
    c = conditioning()
    x0 = torch.randn(ROWS, 6, 8, generator=torch.Generator().manual_seed(3))
    batch = TrainRows(x0, c, torch.zeros(ROWS))

    def objective(rows, at):
        sigma = torch.full((len(rows),), 0.5)
        loss = ((policy.velocity(rows.x0, sigma, rows.conditioning) - rows.x0) ** 2).mean()
        yield loss, {"loss": loss.detach()}

    settings = UpdateParams(learning_rate=1e-2)
    loop = TrainLoop(policy, state, settings, objective, ema_max_decay=0.5, ranks=ranks)
    loop.run(batch.pick, BatchSchedule(ROWS, 2, 3, steps, "key"))
    state.save(policy, folder / save)
    return state.step


def everything(ranks, folder):
    steps = {(s, kind): step_of(ranks, s, kind) for s in STRATEGIES for kind in KINDS}
    overflows = {strategy: overflow(ranks, strategy) for strategy in STRATEGIES}
    states(ranks, folder, save="one")
    states(ranks, folder, load="one", save="again", steps=0)
    ranks.barrier()
    states(ranks, folder, load="alone-1", save="two-1", steps=1)
    return switching(ranks), steps, overflows


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("states")


@pytest.fixture(scope="module")
def two(folder):
    torch.manual_seed(0)
    states(ALONE, folder, save="alone-1")
    return on_ranks(2, everything, folder)


@pytest.mark.parametrize("rank", [0, 1])
def test_use_changes_the_velocity_to_the_other_policys_and_back_to_the_bit(two, rank):
    expected = switching(ALONE)[0]
    found = two[rank][0][0]
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert not torch.equal(found["own"], found["old"])
    assert torch.equal(found["own"], found["back"])


def test_the_first_rank_alone_gets_whole_weights_and_each_holds_half_of_all(two):
    _, whole, held, base = switching(ALONE)
    (_, first, held_0, base_0), (_, second, held_1, base_1) = (rank[0] for rank in two)
    assert second == {}
    assert first.keys() == whole.keys()
    assert all(torch.equal(first[name], whole[name]) for name in whole)
    assert (held_0 + held_1, base_0 + base_1) == (held, base)
    assert base_1 > 0.4 * base


def assert_close(found, expected, tolerance):
    """Each gradient's error is within `tolerance` of its norm, or of 1/100 of the largest norm."""
    least = 1e-2 * max(g.norm() for g in expected.values())
    for name, gradient in expected.items():
        error = (found[name] - gradient).norm() / max(gradient.norm(), least)
        assert error <= tolerance, (name, error)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_step_on_two_ranks_has_the_gradients_of_one_process(two, strategy, kind):
    """In bf16 the second step has not: its weights are others by a last bit, which may round them
    to other ones of bf16."""
    history, gradients, weights = step_of(ALONE, strategy, kind)
    tolerances = [1e-6, 1e-2] if "bf16" in kind else [1e-6, 1e-6]
    assert history[0]["grad_norm"] > 0.005  # it was clipped
    for rank in two:
        rows, found, _ = rank[1][strategy, kind]
        for i, tolerance in enumerate(tolerances):
            assert_close(found[i], gradients[i], tolerance)
            for name in ("grad_norm", "loss"):
                assert rows[i][name] == pytest.approx(history[i][name], rel=tolerance), name
    if "bf16" not in kind:
        first = two[0][1][strategy, kind][2]
        assert max((first[n] - w).abs().max() for n, w in weights.items()) < 1e-4


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_with_the_whole_model_have_the_same_bits(two, kind):
    (_, gradients, weights), (_, others, other) = (rank[1]["ddp", kind] for rank in two)
    assert all(torch.equal(weights[n], other[n]) for n in weights)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(gradients, others, strict=True) for n in a)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_overflow_of_one_rank_halves_the_scale_of_both_and_moves_no_weight(two, strategy):
    for number, rank in enumerate(two):
        before, ((skipped, scale, step, still), (taken, after, _, moved)) = rank[2][strategy]
        assert (skipped, scale, step) == ({"skipped_steps": 1}, 2.0**15, 0)
        assert (taken["skipped_steps"], after) == (0, 2.0**15)
        if number and strategy == "fsdp2":  # the first rank gets whole weights, this one none
            assert before == {}
            continue
        assert len(before) > 0
        assert all(torch.equal(still[n], before[n]) for n in before)
        assert any(not torch.equal(moved[n], before[n]) for n in before)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_ratio_before_the_first_step_is_one_on_every_rank(two, strategy):
    for rank in two:
        first, second = rank[1][strategy, "grpo"][0]
        assert first["ratio_max_dev"] == 0
        assert second["ratio_max_dev"] > 0


def test_a_state_read_by_two_ranks_and_written_again_has_the_same_bytes(two, folder):
    for name in STATE_FILES:
        digests = {
            hashlib.sha256((folder / place / name).read_bytes()).hexdigest()
            for place in ("one", "again")
        }
        assert len(digests) == 1, name


def test_a_run_goes_on_from_two_ranks_to_one_and_back(two, folder):
    from safetensors.torch import load_file

    states(ALONE, folder, load="alone-1", save="alone-2")  # 1 -> 1, and 1 -> 2 ranks beside it
    states(ALONE, folder, load="one", save="one-2")  # 2 ranks -> 1
    for name in STATE_FILES[:3]:
        expected = load_file(folder / "alone-2" / name)
        for place in ("two-1", "one-2"):
            found = load_file(folder / place / name)
            assert found.keys() == expected.keys()
            for key, value in expected.items():
                assert found[key].shape == value.shape
                torch.testing.assert_close(found[key], value, rtol=1e-4, atol=3e-5)
    steps = load_file(folder / "two-1" / OPTIMIZER)
    assert steps["0|step"].item() == 2
    assert math.isfinite(sum(w.sum().item() for w in load_file(folder / "two-1" / EMA).values()))


@pytest.mark.parametrize(
    ("strategy", "how", "says"),
    [
        ("deepspeed", {}, "must be ddp or fsdp2"),
        ("fsdp2", {"use_8bit_adam": True}, "use_8bit_adam must be false"),
        ("fsdp2", {"compiled": True}, r"model\.compile must be false"),
    ],
)
def test_a_strategy_that_cannot_run_is_refused_with_its_reason(strategy, how, says):
    with pytest.raises(ParamsError, match=says):
        sharding.check_strategy(strategy, **{"use_8bit_adam": False} | how)
    sharding.check_strategy("ddp", use_8bit_adam=True, compiled=True)
