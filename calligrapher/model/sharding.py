"""A model whose weights are shared out among ranks (FSDP2), and whole tensors cut up for it.

Each block, each style attention and each projection of the adapter is gathered when it runs and let
go afterwards; between forwards a rank holds its shard of every weight, the frozen base included.
Every forward and backward is therefore the work of all ranks together. A weight is cut along its
first dimension, as `torch.chunk` does.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from calligrapher.errors import ParamsError
from calligrapher.ranks import Ranks

Strategy = Literal["ddp", "fsdp2", "deepspeed"]


def check_strategy(strategy: Strategy, *, use_8bit_adam: bool, compiled: bool = False) -> None:
    """Raise ParamsError for a strategy that cannot run, or not with these settings."""
    if strategy == "deepspeed":
        raise ParamsError(
            "launch.strategy must be ddp or fsdp2. Got deepspeed: its engine would own the"
            " optimizer, the clipping and the files of a checkpoint, which are the same here for"
            " every number of ranks. fsdp2 shares out the model as its stage 3 does."
        )
    if strategy == "fsdp2" and use_8bit_adam:
        raise ParamsError(
            "use_8bit_adam must be false with launch.strategy fsdp2. Got true: bitsandbytes scales"
            " its moments by blocks of a whole tensor, which shards would cut. Moments in 32 bits"
            " take 8 bytes a trained weight, divided by the number of ranks."
        )
    if strategy == "fsdp2" and compiled:
        raise ParamsError(
            "model.compile must be false with launch.strategy fsdp2. Got true: the weights of the"
            " style attentions are gathered inside the blocks, where a graph would break."
        )


def shard(model: nn.Module, ranks: Ranks, device: torch.device) -> None:
    """Cut the weights of a `StyledTransformer` up among `ranks`, group by group, onto `device`.

    No more than one group's whole weights are on the device at a time. Gradients are summed over
    the ranks, not averaged.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import FSDPModule, fully_shard

    if device.type == "cuda":
        torch.cuda.set_device(device)
    mesh = init_device_mesh(device.type, (ranks.size,))
    transformer, adapter = model.transformer, model.adapter
    projections = [adapter.image_proj_mlp, adapter.image_proj_qformer]
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    # The style attentions run inside the blocks, but are the adapter's: groups of their own.
    for part in (*adapter.attn_adapter, *filter(None, projections), *blocks, model):
        # The root as well: else its weights stay gathered after a forward without gradient, and
        # would hide what `Policy.use` puts into the shards.
        fully_shard(part, mesh=mesh, reshard_after_forward=True)
    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)
            part.set_force_sum_reduction_for_comms(True)


def reshard(model: nn.Module) -> None:
    """Let go of every gathered weight, so that the next forward gathers the shards anew."""
    from torch.distributed.fsdp import FSDPModule

    for part in model.modules():
        if isinstance(part, FSDPModule):
            part.reshard()


def is_sharded(tensor: Tensor) -> bool:
    return isinstance(tensor, DTensor)


def held(tensor: Tensor) -> Tensor:
    """Return what this rank holds of `tensor`, without a copy; of one that is not sharded, all."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return `tensor` gathered from all ranks, who all must ask; one that is not sharded as is."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def part_of(tensor: Tensor, like: Tensor) -> Tensor:
    """Return this rank's part of a whole `tensor`, cut as the weight `like` is; a view.

    A tensor that is such a part already is returned as it is.
    """
    if not isinstance(like, DTensor) or tensor.shape != like.shape:
        return tensor
    mesh = like.device_mesh
    parts = torch.chunk(tensor, mesh.size(), dim=0)
    rank = mesh.get_local_rank()
    return parts[rank] if rank < len(parts) else tensor[:0]


def as_shard(part: Tensor, like: Tensor) -> Tensor:
    """Return a rank's `part` of a tensor as the sharded tensor, of the shape of `like`."""
    if not isinstance(like, DTensor) or isinstance(part, DTensor):
        return part
    return DTensor.from_local(
        part, like.device_mesh, like.placements, shape=like.shape, stride=like.stride()
    )
