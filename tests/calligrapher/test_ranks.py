"""What ranks tell each other: sums of gradients, metrics, and an error of one of them."""

import math

import pytest
import torch
from torch import nn
from two_ranks import on_ranks

from calligrapher import ranks as module
from calligrapher.ranks import ALONE, Ranks


def is_maximum(name):
    return "_max_" in name


def parameters():
    shapes = [(3, 2), (5,), (), (4, 1, 2), (7,)]
    made = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    made[1] = nn.Parameter(torch.zeros(5, dtype=torch.bfloat16))
    return made


def give_gradients(made, rank):
    """The last has no gradient anywhere, the fourth only on rank 1."""
    for number, parameter in enumerate(made[:3]):
        parameter.grad = torch.full_like(parameter, (rank + 1) * 10.0**number)
    if rank == 1:
        made[3].grad = torch.arange(8.0).reshape(4, 1, 2)


def everything(ranks):
    found = {"rank": (ranks.rank, ranks.size, ranks.is_first, ranks.alone)}
    found["owns"] = [n for n in range(7) if ranks.owns(n)]
    for name, bucket in (("one bucket", module.BUCKET_BYTES), ("small buckets", 24)):
        module.BUCKET_BYTES = bucket
        made = parameters()
        give_gradients(made, ranks.rank)
        ranks.sum_gradients(made)
        found[name] = [None if p.grad is None else p.grad.float().tolist() for p in made]
        found["types"] = [p.grad.dtype for p in made if p.grad is not None]
    own = {"loss": 0.1 * (ranks.rank + 1), "kl_max_row": float(ranks.rank), f"of_{ranks.rank}": 1.0}
    found["combined"] = ranks.combine(own, is_maximum)
    own = {"a_max_": math.nan if ranks.rank == 1 else 5.0, "b": math.nan if ranks.rank else 1.0}
    found["nan"] = ranks.combine(own, is_maximum)
    found["gathered"] = ranks.gather({"rank": ranks.rank, "bytes": b"x" * (1000 * ranks.rank)})
    ranks.barrier()
    return found


@pytest.fixture(scope="module")
def three():
    return on_ranks(3, everything)


def test_each_piece_of_work_has_one_owner(three):
    assert [found["owns"] for found in three] == [[0, 3, 6], [1, 4], [2, 5]]
    assert [found["rank"] for found in three] == [
        (0, 3, True, False),
        (1, 3, False, False),
        (2, 3, False, False),
    ]


@pytest.mark.parametrize("buckets", ["one bucket", "small buckets"])
def test_gradients_are_summed_and_those_that_nobody_has_stay_none(three, buckets):
    expected = [
        [[6.0, 6.0]] * 3,
        [60.0] * 5,
        600.0,
        torch.arange(8.0).reshape(4, 1, 2).tolist(),
        None,
    ]
    assert [found[buckets] for found in three] == [expected] * 3
    assert three[0]["types"] == [torch.float32, torch.bfloat16, torch.float32, torch.float32]


def test_metrics_are_sums_or_maxima_over_the_ranks_that_have_them(three):
    for found in three:
        assert found["combined"] == {
            "loss": pytest.approx(0.6),
            "kl_max_row": 2.0,
            "of_0": 1.0,
            "of_1": 1.0,
            "of_2": 1.0,
        }
        assert math.isnan(found["nan"]["a_max_"])
        assert math.isnan(found["nan"]["b"])
        assert found["combined"] == three[0]["combined"]  # to the bit


def test_objects_are_gathered_in_the_order_of_the_ranks(three):
    for found in three:
        assert [given["rank"] for given in found["gathered"]] == [0, 1, 2]
        assert [len(given["bytes"]) for given in found["gathered"]] == [0, 1000, 2000]


def test_alone_everything_is_as_it_was():
    made = parameters()
    give_gradients(made, 0)
    before = [p.grad for p in made]
    ALONE.sum_gradients(made)
    assert all(p.grad is g for p, g in zip(made, before, strict=True))
    assert ALONE.combine({"a": 1.5}, is_maximum) == {"a": 1.5}
    assert ALONE.gather("x") == ["x"]
    ALONE.barrier()
    assert all(ALONE.owns(n) for n in range(5))
    assert Ranks(0, 1) == ALONE


def fails_on_one(ranks):
    if ranks.rank == 1:
        raise ValueError("the picture is broken")
    ranks.barrier()


def test_the_error_of_one_rank_ends_the_others_and_is_the_one_shown():
    with pytest.raises(AssertionError, match=r"rank 1 failed(.|\n)*the picture is broken"):
        on_ranks(2, fails_on_one)
