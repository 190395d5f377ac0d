"""What moves while training besides the weights: optimizer, step count, average."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from calligrapher.durable import save_tensors
from calligrapher.errors import CalligrapherError, CheckpointError
from calligrapher.model import sharding
from calligrapher.model.policy import ADAPTER, Policy, Weights

TRAINED, EMA, OPTIMIZER, STATE = (
    "trained.safetensors",
    "ema.safetensors",
    "optimizer.safetensors",
    "state.json",
)
STATE_FILES = (TRAINED, EMA, OPTIMIZER, STATE)
RELATIVE_RATE = "relative_rate"  # of a group of the optimizer's weights: times the learning rate
NO_TENSORS = 16  # bytes of a safetensors file without a tensor, as `EMA` is where none is kept


@dataclass
class TrainState:
    """What moves while training, besides the trained weights in the policy themselves.

    Of a sharded policy each rank holds its shards of the average and of the optimizer's moments.
    The files hold whole tensors in either case, and do not depend on the number of ranks.
    """

    optimizer: torch.optim.Optimizer
    step: int = 0  # optimizer steps since the optimizer was new
    ema: Weights | None = None
    scaler: torch.amp.GradScaler | None = None  # fp16 only
    kl_coef: float | None = None  # of the round, where it follows a target

    def save(self, policy: Policy, folder: Path) -> None:
        """Write the four state files; the same state gives the same bytes.

        All ranks of a sharded policy must call it. Tensors are gathered one by one; the first rank
        keeps and writes them, a file at a time.
        """
        if policy.keeps_whole:
            folder.mkdir(parents=True, exist_ok=True)

        def write(tensors: Weights, name: str) -> None:
            if policy.keeps_whole:
                save_tensors(tensors, folder / name)

        write(policy.snapshot(), TRAINED)
        write(self._whole_average(policy), EMA)
        state = self.optimizer.state_dict()["state"]
        write(_flat(state, keep=policy.keeps_whole), OPTIMIZER)
        if policy.keeps_whole:
            scaler = self.scaler.state_dict() if self.scaler else None
            saved = {"step": self.step, "scaler": scaler}
            if self.kl_coef is not None:
                saved["kl_coef"] = self.kl_coef
            (folder / STATE).write_text(json.dumps(saved, allow_nan=False) + "\n")

    def _whole_average(self, policy: Policy) -> Weights:
        kept: Weights = {}
        for name, part in (self.ema or {}).items():
            tensor = policy.whole(name, part)
            if policy.keeps_whole:
                kept[name] = tensor.to("cpu")
        return kept

    def load(self, policy: Policy, folder: Path) -> None:
        """Read what `save` wrote, into the policy and this state.

        What this state is decides, where the saved one is of another kind: without an average, the
        saved one is left behind; with one where none was saved, it starts from the trained weights.
        The settings of the optimizer stay. Raises CheckpointError for moments of another precision.
        """
        policy.load(load_file(folder / TRAINED))
        if self.ema is not None:
            average = load_file(folder / EMA)
            self.ema = {
                # A real copy of a part: a view would keep the whole tensor in memory.
                n: policy.part(n, w).clone() if policy.sharded else w
                for n, w in average.items()
            } or policy.snapshot(whole=False)
        tensors = load_file(folder / OPTIMIZER)
        self._must_fit(tensors, folder)
        groups = self.optimizer.state_dict()["param_groups"]
        state = _nested(tensors)
        if policy.sharded:
            state = _shards(state, list(policy.parameters.values()))
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        saved = json.loads((folder / STATE).read_text())
        self.step, self.kl_coef = saved["step"], saved.get("kl_coef")
        if self.scaler is not None and saved["scaler"] is not None:
            self.scaler.load_state_dict(saved["scaler"])

    def _must_fit(self, tensors: Mapping[str, Tensor], folder: Path) -> None:
        saved = any(name.endswith("|exp_avg") for name in tensors)  # as torch's AdamW names it
        own = isinstance(self.optimizer, torch.optim.AdamW)
        if tensors and saved != own:
            kinds = {True: "32-bit", False: "8-bit"}
            raise CheckpointError(
                f"{folder / OPTIMIZER} must hold the {kinds[own]} moments that"
                f" update.use_8bit_adam={str(not own).lower()} goes on with. It holds"
                f" {kinds[saved]} ones. Set update.use_8bit_adam={str(not saved).lower()}, or begin"
                " anew with the first round's update, whose optimizer is new"
                " (`rerun RUN round-0000/update --downstream --fork NAME`)."
            )


def _flat(state: Mapping[Any, Any], prefix: str = "", *, keep: bool = True) -> dict[str, Tensor]:
    """An optimizer's state as whole tensors on the CPU, `0|exp_avg`; that of bitsandbytes is
    nested. Without `keep` this rank hands in its shards, and gets nothing."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}|", keep=keep)
            continue
        tensor = sharding.whole(torch.as_tensor(value))
        if keep:
            found[f"{prefix}{key}"] = tensor.to("cpu", copy=True).contiguous()
    return found


def _nested(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Any]]:
    """The reverse of `_flat`; whole numbers become plain ones again, as bitsandbytes counts its
    steps."""
    state: dict[Any, Any] = {}
    for name, tensor in tensors.items():
        index, *path, key = name.split("|")
        place = state.setdefault(int(index), {})
        for part in path:
            place = place.setdefault(part, {})
        place[key] = tensor.item() if tensor.ndim == 0 and tensor.dtype == torch.int64 else tensor
    return state


def _shards(state: dict[int, dict[str, Any]], weights: list[Tensor]) -> dict[int, dict[str, Any]]:
    """Return an optimizer's state with this rank's shards of what has the shape of its weight."""
    found: dict[int, dict[str, Any]] = {}
    for index, values in state.items():
        like = weights[index]
        found[index] = {
            key: sharding.as_shard(sharding.part_of(value, like).to(like.device, copy=True), like)
            if isinstance(value, Tensor) and value.shape == like.shape
            else value
            for key, value in values.items()
        }
    return found


def new_state(
    policy: Policy,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float,
    use_8bit: bool = False,
    ema: bool,
    adapter_rate: float = 1.0,
) -> TrainState:
    """A fresh optimizer over the trained weights; `ema` starts as a copy of them.

    adapter_rate: the style adapter's learning rate over that of the others.
    """
    weights = _groups(policy, adapter_rate)
    settings = {"betas": betas, "eps": epsilon, "weight_decay": weight_decay}
    if use_8bit:
        sharding.check_strategy("fsdp2" if policy.sharded else "ddp", use_8bit_adam=True)
        try:
            from bitsandbytes.optim import AdamW8bit
        except ImportError as error:
            raise CalligrapherError(
                "use_8bit_adam needs the package bitsandbytes, which is not installed. Install it "
                "(`pip install bitsandbytes`), or set use_8bit_adam to false."
            ) from error
        optimizer: torch.optim.Optimizer = AdamW8bit(weights, lr=0.0, **settings)
    else:
        optimizer = torch.optim.AdamW(weights, lr=0.0, **settings)
    scaler = torch.amp.GradScaler(policy.device.type) if policy.autocast == torch.float16 else None
    return TrainState(optimizer, ema=policy.snapshot(whole=False) if ema else None, scaler=scaler)


def _groups(policy: Policy, adapter_rate: float) -> list[Any]:
    """The trained weights, or groups of them where the adapter's rate is its own; in their order,
    by which the optimizer's state is numbered."""
    if adapter_rate == 1.0:
        return list(policy.parameters.values())
    runs = groupby(policy.parameters.items(), key=lambda named: named[0].startswith(ADAPTER))
    return [
        {"params": [w for _, w in run], RELATIVE_RATE: adapter_rate if is_adapters else 1.0}
        for is_adapters, run in runs
    ]
