"""Memory of several ranks: against the shards that ranks really hold, and by its own arithmetic."""

from pathlib import Path

import pytest
import small_policy
import torch
from two_ranks import on_ranks

from calligrapher.model import sharding
from calligrapher.ranks import ALONE
from tasks.params.run_params import load_params
from tasks.planning.gpu_fit import GIB, RESERVE, largest_batches, needed
from tasks.planning.memory import memory
from tasks.planning.shares import Shares

NFT = Path(__file__).parents[3] / "params/nft.yaml"
FLOAT_MOMENTS = ["update.use_8bit_adam=false", "warmup.use_8bit_adam=false"]


def held_numbers(ranks):
    """Numbers of each weight that this rank holds, by name."""
    policy = small_policy.build(lora=True)
    policy.shard(ranks, torch.device("cpu"))
    return {n: sharding.held(p).numel() for n, p in policy.model.named_parameters()}


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_the_first_rank_holds_what_is_reckoned_and_no_rank_holds_more(size):
    reckoned = {
        n: Shares(size).of(p) for n, p in small_policy.build(lora=True).model.named_parameters()
    }
    found = on_ranks(size, held_numbers)
    assert found[0] == reckoned
    assert all(rank[n] <= reckoned[n] for rank in found for n in reckoned)
    whole = held_numbers(ALONE)
    assert {n: sum(rank[n] for rank in found) for n in whole} == whole


def test_a_dimension_that_does_not_divide_is_rounded_up():
    assert Shares(3).of(torch.empty(7, 5)) == 3 * 5
    assert Shares(4).of(torch.empty(2, 5)) == 5
    assert Shares(1).of(torch.empty(7, 5)) == 35


def test_ddp_holds_everything_on_each_rank_and_fsdp2_shares_out_all_weights():
    one = memory(load_params(NFT, FLOAT_MOMENTS))[-1].parts
    ddp = memory(load_params(NFT, [*FLOAT_MOMENTS, "launch.num_processes=4"]))[-1].parts
    settings = [*FLOAT_MOMENTS, "launch.num_processes=4", "launch.strategy=fsdp2"]
    shared = memory(load_params(NFT, settings))[-1].parts
    assert ddp == one
    for name in ("transformer", "trained weights", "old", "reference", "gradients", "optimizer"):
        assert shared[name] == pytest.approx(one[name] / 4, rel=1e-3)
    for name in ("VAE, CLIP, SigLIP", "T5", "rows of the round"):
        assert shared[name] == one[name]
    assert shared["set aside by use"] == shared["trained weights"]
    # The largest group is the MLP of the adapter, in float32, with its gradient and the copy of it.
    assert shared["gathered"] > 3 * 4 * 1_211_148_544


def test_a_batch_one_larger_than_the_largest_that_fits_does_not_fit():
    gib = 79.1
    params = load_params(NFT)
    most = largest_batches(params, gib)
    for stage, rows in most.items():
        for more, fits in ((0, True), (1, False)):
            section = getattr(params, stage).model_copy(update={"batch_size": rows + more})
            changed = params.model_copy(update={stage: section})
            (found,) = (s for s in memory(changed) if s.stage == stage)
            assert (found.total / GIB + RESERVE <= gib) is fits
    assert largest_batches(params, 20.0) == {"rollout": 0, "update": 0}
    assert needed(params) < gib
