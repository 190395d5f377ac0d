"""What a rank holds of a weight, and what is gathered for it, as `sharding.shard` cuts it up."""

from dataclasses import dataclass

from torch import Tensor, nn

from calligrapher.sizing.meta_model import MetaModel
from tasks.params.run_params import RunParams


@dataclass(frozen=True)
class Shares:
    """Tensors cut up among `ranks` along their first dimension, as `torch.chunk` does."""

    ranks: int = 1

    def of(self, tensor: Tensor) -> int:
        """Return how many numbers of `tensor` rank 0 holds; no rank holds more."""
        if self.ranks == 1 or not tensor.dim():
            return tensor.numel()
        return -(-len(tensor) // self.ranks) * (tensor.numel() // max(1, len(tensor)))


WHOLE = Shares()


def shares_of(params: RunParams) -> Shares:
    """Return how the weights lie on the ranks of a run: whole with ddp."""
    launch = params.launch
    return Shares(launch.size) if launch.strategy == "fsdp2" else WHOLE


def gathered_bytes(model: MetaModel, *, trains: bool) -> int:
    """Return the bytes of gathered weights at the worst moment of a forward, or of a backward.

    The root's own weights stay for a whole forward. Beside them lie a group (a block with its style
    attention, or a projection of the adapter) and the buffer that the next one is gathered into;
    in a backward, the group's whole gradient in float32 and the copy of it that is summed.
    """
    adapter, transformer = model.adapter, model.transformer
    projections = [*filter(None, (adapter.image_proj_mlp, adapter.image_proj_qformer))]
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    groups = [[part] for part in projections]
    groups += [list(pair) for pair in zip(blocks, adapter.attn_adapter, strict=True)]
    size = _bytes_by_weight(model)
    grouped = {p: g for g, parts in enumerate(groups) for p in _weights(parts)}
    root = sum(size[p] for p in size if p not in grouped)
    sums = [0] * len(groups)
    gradients = [0] * len(groups)
    for weight, group in grouped.items():
        sums[group] += size[weight]
        gradients[group] += 4 * weight.numel() * weight.requires_grad
    forward = 2 * max(sums)
    backward = max(s + 2 * g for s, g in zip(sums, gradients, strict=True))
    return root + max(forward, backward * trains)


def _bytes_by_weight(model: MetaModel) -> dict[Tensor, int]:
    """Bytes of each weight as the model holds it."""
    policy = model.policy
    base = policy.autocast.itemsize if policy.autocast else 4
    return {
        p: p.numel()
        * (
            4
            if p.requires_grad
            else base
            if name.startswith("transformer.")
            else policy.storage_dtype(name).itemsize
        )
        for name, p in policy.model.named_parameters()
    }


def _weights(parts: list[nn.Module]) -> list[Tensor]:
    """Weights of modules, each once."""
    return list(dict.fromkeys(p for part in parts for p in part.parameters()))
