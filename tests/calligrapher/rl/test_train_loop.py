"""The optimisation loop: which rows make a step, at which rate, and that a saved state goes on as
it was."""

import math

import pytest
import torch
from torch import nn

from calligrapher.errors import CalligrapherError, CheckpointError
from calligrapher.model.policy import Policy
from calligrapher.rl.train_loop import BatchSchedule, TrainLoop, learning_rate_at
from calligrapher.rl.train_state import STATE_FILES, new_state
from tasks.params.run_params import UpdateParams

SIZE = 4


class Linear(nn.Module):
    def __init__(self):
        super().__init__()
        self.adapter = nn.Linear(SIZE, SIZE)
        torch.manual_seed(0)
        nn.init.normal_(self.adapter.weight)
        nn.init.normal_(self.adapter.bias)


def settings(**changes):
    return UpdateParams(**{"learning_rate": 0.1, "weight_decay": 0.0} | changes)


def make(objective=None, *, ema=False, interval=1, autocast=None, **changes):
    """A loop that fits `adapter(x)` to `-x` on rows of x."""
    policy = Policy(Linear(), autocast=autocast)
    state = new_state(policy, weight_decay=0.0, ema=ema)

    def fit(x, generator):
        loss = ((policy.model.adapter(x) + x) ** 2).mean()
        yield loss, {"loss": loss.detach()}

    return TrainLoop(
        policy,
        state,
        settings(**changes),
        objective(policy) if objective else fit,
        ema_max_decay=0.9,
        ema_interval=interval,
    )


def rows(count, seed=0):
    return torch.randn(count, SIZE, generator=torch.Generator().manual_seed(seed))


def run(loop, schedule, data=None, **how):
    data = rows(schedule.num_rows) if data is None else data
    history = []
    loop.run(lambda index: data[index], schedule, on_step=history.append, **how)
    return history


def weights(loop):
    return torch.cat([w.flatten() for w in loop.policy.snapshot().values()])


@pytest.mark.parametrize("batch_size", [3, 4, 5])  # 3 + 3, 4 + 2, 5 + 1
def test_accumulated_batches_are_one_large_batch(batch_size):
    large, small = make(), make()
    assert len(run(large, BatchSchedule(6, 6, 1, 2, "k"))) == 2
    history = run(small, BatchSchedule(6, batch_size, 2, 2, "k"))
    assert len(history) == 2
    assert (weights(large) - weights(small)).abs().max() <= 1e-6


def test_the_loss_of_a_step_is_the_mean_over_its_rows():
    data = rows(7)
    loop = make()
    expected = ((loop.policy.model.adapter(data) + data) ** 2).mean().item()
    (metrics,) = run(loop, BatchSchedule(7, 3, 3, 1, "k"), data)
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["learning_rate"] == 0.1
    assert metrics["grad_norm"] > 0


def test_the_last_partial_accumulation_is_a_step_of_its_own():
    steps = BatchSchedule(7, 2, 3, 1, "k").steps()
    assert [[len(batch.index) for batch in step] for step in steps] in (
        [[2, 2, 2], [1]],
        [[2, 2, 1], [2]],
        [[2, 1, 2], [2]],
        [[1, 2, 2], [2]],
    )
    assert len(run(make(), BatchSchedule(7, 2, 3, 1, "k"))) == 2


def test_a_plan_keeps_neighbours_together_and_orders_the_batches_anew_in_each_pass():
    schedule = BatchSchedule(8, 2, 1, 20, "k")
    passes = [[step[0].index for step in schedule.steps()[4 * p : 4 * p + 4]] for p in range(20)]
    assert all(sorted(batches) == [[0, 1], [2, 3], [4, 5], [6, 7]] for batches in passes)
    assert len({str(batches) for batches in passes}) > 5
    keys = [batch.key for step in schedule.steps() for batch in step]
    assert len(set(keys)) == 80
    assert (
        schedule.steps()
        == BatchSchedule(8, 2, 1, 20, "k").steps()
        != BatchSchedule(8, 2, 1, 20, "other").steps()
    )


def test_a_plan_that_shuffles_rows_uses_each_once_a_pass():
    passes = BatchSchedule(5, 2, 3, 2, "k", shuffle_rows=True).steps()
    assert [sorted(i for batch in step for i in batch.index) for step in passes] == [
        [0, 1, 2, 3, 4]
    ] * 2
    assert passes[0][0].index not in ([0, 1], [2, 3], [4])


@pytest.mark.parametrize(
    ("scheduler", "step", "rate"),
    [
        ("constant", 0, 2.0),
        ("constant", 11, 2.0),
        ("constant_with_warmup", 0, 0.5),
        ("constant_with_warmup", 3, 2.0),
        ("constant_with_warmup", 11, 2.0),
        ("warmup_stable_decay", 0, 0.5),
        ("warmup_stable_decay", 10, 2.0),
        ("warmup_stable_decay", 11, 1.0),
        ("warmup_stable_decay", 12, 0.0),
        ("linear", 1, 1.0),
        ("linear", 4, 2.0),
        ("linear", 8, 1.0),
        ("linear", 11, 0.25),
        ("linear", 12, 0.0),
        ("linear", 30, 0.0),
        ("cosine", 4, 2.0),
        ("cosine", 6, 1.0 + math.sqrt(0.5)),
        ("cosine", 8, 1.0),
        ("cosine", 12, 0.0),
    ],
)
def test_learning_rates_at_hand_worked_steps(scheduler, step, rate):
    rise = 0 if scheduler == "constant" else 4
    given = settings(learning_rate=2.0, lr_scheduler=scheduler, lr_warmup_steps=rise)
    assert learning_rate_at(step, given, total_steps=12) == pytest.approx(rate, abs=1e-12)


def test_a_loop_stops_at_its_limit_of_steps():
    loop = make()
    assert len(run(loop, BatchSchedule(6, 2, 1, 5, "k"), limit=4)) == 4
    assert loop.state.step == 4
    before = weights(loop)
    assert run(loop, BatchSchedule(6, 2, 1, 5, "k"), limit=4) == []
    assert torch.equal(weights(loop), before)


def test_gradients_are_scaled_down_to_the_maximal_norm():
    moved = {}
    for limit in (1e-6, 1e9):
        # Plain descent shows the scale; Adam's step does not depend on it.
        loop = make(max_grad_norm=limit)
        loop.state.optimizer = torch.optim.SGD(loop.policy.parameters.values(), lr=0.0)
        before = weights(loop)
        (metrics,) = run(loop, BatchSchedule(3, 3, 1, 1, "k"))
        moved[limit] = (weights(loop) - before).norm().item()
    assert moved[1e-6] == pytest.approx(0.1 * 1e-6, rel=0.2)
    assert moved[1e9] == pytest.approx(0.1 * metrics["grad_norm"], rel=1e-4)


def test_ema_follows_the_formula():
    loop = make(ema=True)
    start = weights(loop)
    run(loop, BatchSchedule(3, 3, 1, 1, "k"))
    first = weights(loop)
    ema = torch.cat([w.flatten() for w in loop.state.ema.values()])
    torch.testing.assert_close(ema, 2 / 11 * start + 9 / 11 * first)
    run(loop, BatchSchedule(3, 3, 1, 2, "k"), done=1)
    expected = 3 / 12 * ema + 9 / 12 * weights(loop)
    torch.testing.assert_close(torch.cat([w.flatten() for w in loop.state.ema.values()]), expected)


def test_ema_moves_every_few_steps_when_asked_to():
    loop = make(ema=True, interval=2)
    start = weights(loop)
    run(loop, BatchSchedule(3, 3, 1, 1, "k"))
    assert torch.equal(torch.cat([w.flatten() for w in loop.state.ema.values()]), start)
    run(loop, BatchSchedule(3, 3, 1, 2, "k"), done=1)
    expected = 3 / 12 * start + 9 / 12 * weights(loop)
    torch.testing.assert_close(torch.cat([w.flatten() for w in loop.state.ema.values()]), expected)


def endless(policy):
    def objective(x, generator):
        loss = policy.model.adapter(x).sum() * float("inf")
        yield loss, {"loss": loss.detach()}

    return objective


def test_a_gradient_that_is_not_finite_is_an_error_and_changes_nothing():
    loop = make(endless, ema=True)
    before = weights(loop)
    with pytest.raises(
        CalligrapherError, match=r"gradient must be finite.*step 0.*were not changed"
    ):
        run(loop, BatchSchedule(3, 3, 1, 1, "k"))
    assert torch.equal(weights(loop), before)
    assert loop.state.step == 0
    assert loop.state.optimizer.state_dict()["state"] == {}


def huge_at(*calls):
    """Fits `adapter(x)` to `-x`; the loss is beyond fp16's scale in the calls of these numbers."""

    def of(policy):
        count = iter(range(99))

        def objective(x, generator):
            factor = 1e36 if next(count) in calls else 1.0
            loss = ((policy.model.adapter(x) + x) ** 2).mean() * factor
            yield loss, {"loss": loss.detach()}

        return objective

    return of


def test_in_fp16_an_overflow_skips_the_step_and_changes_nothing_but_the_scale():
    loop = make(huge_at(0), ema=True, autocast=torch.float16)
    before, average = weights(loop), {n: w.clone() for n, w in loop.state.ema.items()}
    scale = loop.state.scaler.get_scale()
    assert run(loop, BatchSchedule(3, 3, 1, 1, "k")) == [{"skipped_steps": 1}]
    assert torch.equal(weights(loop), before)
    assert all(torch.equal(loop.state.ema[n], average[n]) for n in average)
    assert loop.state.scaler.get_scale() == scale / 2
    assert loop.state.step == 0
    assert loop.state.optimizer.state_dict()["state"] == {}


def test_in_fp16_a_skipped_step_takes_its_rows_and_no_other_steps_rate_or_average():
    how = {"lr_scheduler": "constant_with_warmup", "lr_warmup_steps": 9}
    skipping = make(huge_at(1), ema=True, autocast=torch.float16, **how)
    history = run(skipping, BatchSchedule(8, 2, 1, 1, "k"))
    assert [row["skipped_steps"] for row in history] == [0, 1, 0, 0]
    assert skipping.state.step == 3
    rates = [row["learning_rate"] for row in history if "learning_rate" in row]
    assert rates == pytest.approx([0.1 / 9, 0.2 / 9, 0.3 / 9])
    # The same as if the schedule had not had the step.
    without = make(ema=True, autocast=torch.float16, **how)
    schedule = BatchSchedule(8, 2, 1, 1, "k")
    run(without, schedule, limit=1)
    without.state.scaler.update(without.state.scaler.get_scale() / 2)
    run(without, schedule, done=2)
    assert torch.equal(weights(skipping), weights(without))
    assert all(torch.equal(skipping.state.ema[n], without.state.ema[n]) for n in without.state.ema)


def test_a_limit_counts_the_steps_that_were_taken():
    loop = make(huge_at(0, 2), autocast=torch.float16)
    history = run(loop, BatchSchedule(12, 2, 1, 1, "k"), limit=2)
    assert [row["skipped_steps"] for row in history] == [1, 0, 1, 0]
    assert loop.state.step == 2


def test_in_fp16_gradients_that_no_scale_makes_finite_are_an_error_in_the_end():
    loop = make(endless, autocast=torch.float16)
    history = []
    with pytest.raises(CalligrapherError, match=r"scale of \S+ is not the cause.* bf16"):
        loop.run(lambda i: rows(3)[i], BatchSchedule(3, 3, 1, 99, "k"), on_step=history.append)
    assert 20 < len(history) < 40
    assert loop.state.step == 0


def test_in_fp16_a_norm_beyond_float32_of_finite_gradients_is_an_error():
    def steep(policy):
        def objective(x, generator):
            yield (policy.model.adapter(x) * 1e20).sum(), {"loss": torch.tensor(0.0)}

        return objective

    loop = make(steep, autocast=torch.float16)
    loop.state.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
    with pytest.raises(CalligrapherError, match="gradient must be finite"):
        run(loop, BatchSchedule(3, 3, 1, 1, "k"))


def test_a_maximum_is_one_over_the_losses_batches_and_other_metrics_are_means():
    def told(policy):
        values = iter([1.0, 5.0, 2.0, 3.0])

        def objective(x, generator):
            for _ in range(2):
                value = torch.tensor(next(values))
                loss = policy.model.adapter(x).sum()
                yield loss, {"loss": value, "ratio_max_dev": value}

        return objective

    (metrics,) = run(make(told), BatchSchedule(4, 2, 2, 1, "k"))
    assert metrics["ratio_max_dev"] == 5.0
    assert metrics["loss"] == 2.75


def test_in_fp16_the_scale_does_not_change_the_step():
    plain, scaled = make(), make(autocast=torch.float16)
    for loop in (plain, scaled):
        run(loop, BatchSchedule(6, 3, 1, 1, "k"))
    torch.testing.assert_close(weights(plain), weights(scaled), atol=1e-6, rtol=0)


@pytest.mark.parametrize("ema", [False, True])
@pytest.mark.parametrize("autocast", [None, torch.float16])
def test_a_saved_state_is_read_back_to_the_last_bit_and_goes_on_as_it_was(tmp_path, ema, autocast):
    schedule = BatchSchedule(6, 2, 1, 2, "k")
    whole = make(ema=ema, autocast=autocast)
    run(whole, schedule)
    first = make(ema=ema, autocast=autocast)
    run(first, schedule, limit=4)
    first.state.save(first.policy, tmp_path / "a")
    second = make(ema=ema, autocast=autocast)
    second.state.load(second.policy, tmp_path / "a")
    second.state.save(second.policy, tmp_path / "b")
    for name in STATE_FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    run(second, schedule, done=4)
    assert torch.equal(weights(second), weights(whole))
    assert second.state.step == 6
    if ema:
        assert all(torch.equal(second.state.ema[n], whole.state.ema[n]) for n in whole.state.ema)


def test_8_bit_adam_without_its_package_is_a_clear_error(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    monkeypatch.setitem(sys.modules, "bitsandbytes.optim", None)
    with pytest.raises(
        CalligrapherError, match=r"use_8bit_adam needs the package bitsandbytes.*set .* false"
    ):
        new_state(Policy(Linear()), weight_decay=0.0, use_8bit=True, ema=False)


class NestedAdam(torch.optim.AdamW):
    """Tells its state as bitsandbytes does: nested, steps as an int, a table that is shared."""

    def state_dict(self):
        told = super().state_dict()
        table = torch.arange(3.0)
        told["state"] = {
            i: {
                "step": int(entry["step"]),
                "quantised": {k: v for k, v in entry.items() if k != "step"},
                "t": table,
            }
            for i, entry in told["state"].items()
        }
        return told

    def load_state_dict(self, told):
        state = {
            i: {"step": torch.tensor(float(entry["step"])), **entry["quantised"]}
            for i, entry in told["state"].items()
            if type(entry["step"]) is int
        }
        super().load_state_dict(told | {"state": state})


def test_an_optimizer_with_a_nested_state_goes_on_as_if_it_had_not_stopped(tmp_path):
    schedule = BatchSchedule(8, 2, 1, 1, "0/update/0")
    whole, first, second = make(), make(), make()
    for loop in (whole, first, second):
        loop.state.optimizer = NestedAdam(loop.policy.parameters.values(), lr=0.0)
    run(whole, schedule)
    run(first, schedule, limit=2)
    first.state.save(first.policy, tmp_path)
    second.state.load(second.policy, tmp_path)
    run(second, schedule, done=2)
    assert torch.equal(weights(second), weights(whole))


@pytest.mark.parametrize("saved", [False, True])
def test_a_state_that_is_read_back_has_an_average_if_it_is_one_with_an_average(tmp_path, saved):
    first, second = make(ema=saved), make(ema=not saved)
    run(first, BatchSchedule(6, 2, 1, 1, "k"))
    first.state.save(first.policy, tmp_path)
    second.state.load(second.policy, tmp_path)
    if saved:
        assert second.state.ema is None
    else:
        average = torch.cat([w.flatten() for w in second.state.ema.values()])
        assert torch.equal(average, weights(first))


class EightBit(torch.optim.Optimizer):
    """Tells moments as bitsandbytes does."""

    def __init__(self, params, **settings):
        super().__init__(params, settings)

    def step(self):
        for weight in self.param_groups[0]["params"]:
            self.state[weight] = {"step": 1, "state1": torch.zeros(3, dtype=torch.uint8)}


@pytest.mark.parametrize("saved", [32, 8])
def test_moments_of_another_precision_are_refused_with_what_to_do(tmp_path, saved):
    loops = {32: make(), 8: make()}
    loops[8].state.optimizer = EightBit(loops[8].policy.parameters.values(), lr=0.0)
    first, second = loops[saved], loops[40 - saved]
    run(first, BatchSchedule(3, 3, 1, 1, "k"))
    first.state.save(first.policy, tmp_path)
    way_out = f"holds {saved}-bit ones. Set update.use_8bit_adam={str(saved == 8).lower()}, or"
    with pytest.raises(CheckpointError, match=way_out):
        second.state.load(second.policy, tmp_path)
    loops[saved].state.load(first.policy, tmp_path)


class TwoParts(nn.Module):
    """A LoRA pair before and after the adapter, all of the same value."""

    def __init__(self):
        super().__init__()
        self.lora_first = nn.Parameter(torch.ones(3))
        self.adapter = nn.Linear(3, 2)
        self.lora_last = nn.Parameter(torch.ones(2))
        nn.init.ones_(self.adapter.weight)
        nn.init.ones_(self.adapter.bias)


def moved(policy, **how):
    """How far each weight moves in two steps along a gradient of ones: Adam takes its rate each."""
    loop = TrainLoop(
        policy,
        new_state(policy, weight_decay=0.0, ema=False, **how),
        settings(lr_scheduler="linear", max_grad_norm=1e9),
        lambda rows, batch: [(sum(w.sum() for w in policy.parameters.values()), {})],
        total_steps=4,
    )
    before = policy.snapshot()
    run(loop, BatchSchedule(2, 1, 1, 1, "k"), rows(2))
    return loop, {n: (before[n] - w).mean().item() for n, w in policy.snapshot().items()}


def test_the_adapter_has_a_learning_rate_of_its_own_and_the_state_keeps_its_order(tmp_path):
    _, plain = moved(Policy(TwoParts()))
    loop, split = moved(Policy(TwoParts()), adapter_rate=0.25)
    assert plain == pytest.approx(dict.fromkeys(plain, 0.1 * (1 + 0.75)), rel=1e-5)
    for name, way in split.items():
        assert way == pytest.approx(plain[name] * (0.25 if "adapter" in name else 1), rel=1e-5)
    loop.state.save(loop.policy, tmp_path)
    again = Policy(TwoParts())
    state = new_state(again, weight_decay=0.0, ema=False)
    state.load(again, tmp_path)
    shapes = [tuple(w.shape) for w in again.parameters.values()]
    moments = state.optimizer.state_dict()["state"]
    assert [tuple(moments[i]["exp_avg"].shape) for i in range(len(shapes))] == shapes
