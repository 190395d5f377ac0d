"""The followers of the trained weights: their schedules at chosen steps, and that copies are
copies."""

import pytest
import torch

from calligrapher.errors import InputError
from calligrapher.rl import ema
from calligrapher.rl.ema import ema_decay, lerp_, old_policy_decay, snapshot

STEPS = [0, 74, 75, 76, 208, 500, 1000]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("fixed", [1.0] * 7),
        ("slow", [0.0, 0.074, 0.075, 0.076, 0.208, 0.5, 0.5]),
        ("fast", [0.0, 0.0, 0.0, 0.0075, 0.9975, 0.999, 0.999]),
        ("copy", [0.0] * 7),
    ],
)
def test_the_old_policy_follows_its_schedule(kind, expected):
    assert [old_policy_decay(kind, step) for step in STEPS] == pytest.approx(expected)


def test_the_average_forgets_its_start_and_settles():
    assert [ema_decay(t, 0.999) for t in (0, 9, 90, 10**5)] == pytest.approx(
        [0.1, 10 / 19, 0.91, 0.999]
    )
    assert ema_decay(10**5, 0.9) == 0.9


def test_unknown_schedules_and_negative_steps_are_refused():
    with pytest.raises(InputError, match="one of fixed, slow, fast, copy"):
        old_policy_decay("sometimes", 3)
    assert old_policy_decay(0.9, 3) == 0.9
    for call in (lambda: old_policy_decay("slow", -1), lambda: ema_decay(-1, 0.9)):
        with pytest.raises(InputError, match="0 or more"):
            call()


def test_a_lerp_worked_by_hand():
    target = {"a": torch.tensor([1.0, 2.0, 4.0]), "b": torch.tensor([[8.0]])}
    kept = target["a"]
    lerp_(target, {"a": torch.tensor([3.0, 2.0, 0.0]), "b": torch.tensor([[0.0]])}, 0.75)
    assert kept is target["a"]
    torch.testing.assert_close(kept, torch.tensor([1.5, 2.0, 3.0]))
    assert target["b"].item() == 6.0


def test_decay_one_keeps_and_decay_zero_copies_exactly():
    source = {"a": torch.randn(5, generator=torch.Generator().manual_seed(0)).requires_grad_()}
    target = {"a": torch.ones(5)}
    lerp_(target, source, 1.0)
    assert target["a"].tolist() == [1.0] * 5
    lerp_(target, source, 0.0)
    assert torch.equal(target["a"], source["a"].detach())
    with torch.no_grad():
        source["a"].zero_()
    assert target["a"].abs().min() > 0


def test_a_snapshot_does_not_follow_the_weights_even_on_the_cpu():
    weight = torch.nn.Parameter(torch.ones(3))
    copy = snapshot({"w": weight})
    before = copy["w"].tolist()
    with torch.no_grad():
        weight.add_(1.0)
    assert copy["w"].tolist() == before
    assert not copy["w"].requires_grad
    assert copy["w"].data_ptr() != weight.data_ptr()


def test_weights_that_need_a_gradient_can_be_moved_in_place():
    target = {"w": torch.nn.Parameter(torch.zeros(2))}
    lerp_(target, {"w": torch.nn.Parameter(torch.ones(2))}, 0.5)
    assert target["w"].tolist() == [0.5, 0.5]
    assert target["w"].requires_grad


def test_float32_copies_of_bfloat16_weights_keep_small_updates():
    target = {"w": torch.ones(2)}
    lerp_(target, {"w": torch.full((2,), 2.0, dtype=torch.bfloat16)}, 0.9999)
    torch.testing.assert_close(target["w"], torch.full((2,), 1.0001))


@pytest.mark.parametrize(
    ("target", "source", "decay", "message"),
    [
        ({"a": torch.ones(2)}, {"a": torch.ones(2)}, 1.5, "decay must lie"),
        ({"a": torch.ones(2)}, {"b": torch.ones(2)}, 0.5, "same names"),
        ({"a": torch.ones(2)}, {"a": torch.ones(1)}, 0.5, "one shape"),
    ],
)
def test_a_lerp_between_different_things_is_refused(target, source, decay, message):
    with pytest.raises(InputError, match=message):
        lerp_(target, source, decay)


def test_a_copy_that_is_the_weights_themselves_is_refused():
    weight = torch.nn.Parameter(torch.ones(3))
    alias = {"w": weight.detach().cpu()}
    with pytest.raises(InputError, match="shares its memory"):
        lerp_(alias, {"w": weight}, 0.5)


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_weights_that_come_in_chunks_are_blended_as_at_once(monkeypatch, decay):
    monkeypatch.setattr(ema, "CHUNK", 8)
    torch.manual_seed(0)
    average = {"a": torch.randn(5, 7), "b": torch.randn(3), "none": torch.empty(0, 4)}
    trained = {name: torch.randn_like(tensor) for name, tensor in average.items()}
    expected = snapshot(average)
    lerp_(expected, trained, decay)
    ema.follow_in_chunks_(average, trained, decay)
    for name, tensor in expected.items():
        torch.testing.assert_close(average[name], tensor, rtol=0, atol=1e-7)


def test_on_one_device_following_is_lerp_to_the_bit():
    torch.manual_seed(0)
    average, trained = {"a": torch.randn(9, 5)}, {"a": torch.randn(9, 5)}
    expected = (average["a"] + 0).lerp(trained["a"], 1 - 0.9)
    ema.follow_(average, trained, 0.9)
    assert torch.equal(average["a"], expected)
