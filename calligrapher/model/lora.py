"""Low-rank pairs beside linear layers (peft)."""

from collections.abc import Mapping

from torch import manual_seed, nn

from calligrapher.errors import ParamsError


def add_lora(module: nn.Module, *, rank: int, alpha: float, targets: list[str], seed: int) -> None:
    """Put trainable low-rank pairs (peft) beside the linear layers `targets`; they start as a
    no-op.

    A target is the end of a layer's dotted name. Raises ParamsError for one that no layer has. The
    layers of nn.MultiheadAttention are none: it reads their weights itself, past any pair.
    """
    from peft import LoraConfig, inject_adapter_in_model

    linear = [name for name, layer in module.named_modules() if type(layer) is nn.Linear]
    unmatched = [t for t in targets if not any(f".{name}".endswith(f".{t}") for name in linear)]
    if unmatched:
        ends = {".".join(name.split(".")[-2 if name[-1].isdigit() else -1 :]) for name in linear}
        raise ParamsError(
            f"A target of model.lora must be a linear layer of the {type(module).__name__}. Got "
            f"{', '.join(unmatched)}. It has: {', '.join(sorted(ends))}."
        )
    manual_seed(seed)
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, init_lora_weights=True)
    inject_adapter_in_model(config, module)


def add_loras(
    transformer: nn.Module, adapter: nn.Module, lora: Mapping | None, *, seed: int
) -> None:
    """The pairs that `lora` (rank, alpha, targets, adapter_targets) wants, on both; None: none."""
    for module, key in ((transformer, "targets"), (adapter, "adapter_targets")):
        if lora is not None and lora.get(key):
            add_lora(module, rank=lora["rank"], alpha=lora["alpha"], targets=lora[key], seed=seed)
