"""The optimisation loop: batches of rows in, optimizer steps out; the same for warm-up, NFT and
GRPO.

Everything random derives from (seed, stage, pass, batch), so a loop that starts again at step k
goes on exactly as it would have gone.
"""

import hashlib
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor

from calligrapher.durable import save_tensors
from calligrapher.errors import CalligrapherError
from calligrapher.model.policy import Policy, Weights
from calligrapher.rl.ema import ema_decay, lerp_
from calligrapher.rl.rows import Losses, Rows

TRAINED, EMA, OPTIMIZER, STATE = (
    "trained.safetensors",
    "ema.safetensors",
    "optimizer.safetensors",
    "state.json",
)
STATE_FILES = (TRAINED, EMA, OPTIMIZER, STATE)


class OptimizerSettings(Protocol):
    """What the loop reads of `warmup` and `update` params."""

    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler: str
    lr_warmup_steps: int
    weight_decay: float
    max_grad_norm: float


@dataclass
class TrainState:
    """What moves while training, besides the trained weights in the policy themselves."""

    optimizer: torch.optim.Optimizer
    step: int = 0  # optimizer steps since the optimizer was new
    ema: Weights | None = None
    scaler: torch.amp.GradScaler | None = None  # fp16 only

    def save(self, policy: Policy, folder: Path) -> None:
        """Write the four state files; the same state gives the same bytes."""
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(policy.snapshot(), folder / TRAINED)
        save_tensors(self.ema or {}, folder / EMA)
        save_tensors(_flat(self.optimizer.state_dict()["state"]), folder / OPTIMIZER)
        scaler = self.scaler.state_dict() if self.scaler else None
        (folder / STATE).write_text(json.dumps({"step": self.step, "scaler": scaler}) + "\n")

    def load(self, policy: Policy, folder: Path) -> None:
        """Read what `save` wrote, into the policy and this state."""
        policy.load(load_file(folder / TRAINED))
        self.ema = load_file(folder / EMA) or None
        state = _nested(load_file(folder / OPTIMIZER))
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        saved = json.loads((folder / STATE).read_text())
        self.step = saved["step"]
        if self.scaler is not None and saved["scaler"] is not None:
            self.scaler.load_state_dict(saved["scaler"])


def _flat(state: Mapping[Any, Any], prefix: str = "") -> dict[str, Tensor]:
    """An optimizer's state as tensors on the CPU, `0|exp_avg`; that of bitsandbytes is nested."""
    found: dict[str, Tensor] = {}
    for key, value in state.items():
        if isinstance(value, Mapping):
            found |= _flat(value, f"{prefix}{key}|")
        else:
            found[f"{prefix}{key}"] = (
                torch.as_tensor(value).detach().to("cpu", copy=True).contiguous()
            )
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


def new_state(
    policy: Policy,
    *,
    betas: tuple[float, float] = (0.9, 0.999),
    epsilon: float = 1e-8,
    weight_decay: float,
    use_8bit: bool = False,
    ema: bool,
) -> TrainState:
    """A fresh optimizer over the trained weights; `ema` starts as a copy of them."""
    weights = list(policy.parameters.values())
    settings = {"betas": betas, "eps": epsilon, "weight_decay": weight_decay}
    if use_8bit:
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
    return TrainState(optimizer, ema=policy.snapshot() if ema else None, scaler=scaler)


def learning_rate_at(step: int, settings: OptimizerSettings, total_steps: int | None) -> float:
    """The learning rate of step `step` (from 0): constant, linear or cosine, after a linear
    rise."""
    rise = settings.lr_warmup_steps
    if settings.lr_scheduler != "constant" and step < rise:
        return settings.learning_rate * (step + 1) / rise
    if settings.lr_scheduler in ("constant", "constant_with_warmup"):
        return settings.learning_rate
    done = min(1.0, (step - rise) / max(1, total_steps - rise))
    factor = 1 - done if settings.lr_scheduler == "linear" else 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * factor


def seeded(*parts: Any) -> torch.Generator:
    """A CPU generator whose stream is given by `parts` alone."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


@dataclass(frozen=True)
class Plan:
    """Which rows form which optimizer step.

    Batches are runs of consecutive rows, so that a row has the neighbours that it had in the
    rollout (GRPO's ratio is then exactly 1 at first); only the order of the batches is shuffled,
    anew in each pass. With `shuffle_rows` the rows themselves are shuffled.
    """

    num_rows: int
    batch_size: int
    accumulation: int
    passes: int
    key: str  # what the order derives from, as in `0/update/3`
    shuffle_rows: bool = False

    def steps(self) -> list[list[tuple[str, list[int]]]]:
        """Optimizer steps; each is a list of (random key, row indices)."""
        steps = []
        for p in range(self.passes):
            generator = seeded(self.key, "order", p)
            rows = list(range(self.num_rows))
            if self.shuffle_rows:
                rows = torch.randperm(self.num_rows, generator=generator).tolist()
            runs = [
                rows[at : at + self.batch_size] for at in range(0, self.num_rows, self.batch_size)
            ]
            order = torch.randperm(len(runs), generator=generator).tolist()
            batches = [(f"{self.key}/{p}/{i}", runs[i]) for i in order]
            steps += [
                batches[i : i + self.accumulation]
                for i in range(0, len(batches), self.accumulation)
            ]
        return steps


@dataclass
class Loop:
    """Runs a plan's optimizer steps on a policy."""

    policy: Policy
    state: TrainState
    settings: OptimizerSettings
    objective: Callable[[Rows, torch.Generator], Losses]
    total_steps: int | None = None  # where a falling learning rate reaches 0
    ema_max_decay: float = 0.999
    ema_interval: int = 1
    on_step: Callable[[dict[str, float]], None] = field(default=lambda metrics: None)

    def run(
        self,
        rows: Callable[[list[int]], Rows],
        plan: Plan,
        *,
        done: int = 0,
        limit: int | None = None,
    ) -> None:
        """Take the plan's optimizer steps from number `done` on, at most up to `limit` steps of the
        state."""
        self.policy.loaded = None
        for batches in plan.steps()[done:]:
            if limit is not None and self.state.step >= limit:
                return
            self.on_step(self._step(rows, batches))

    def _step(
        self, rows: Callable[[list[int]], Rows], batches: list[tuple[str, list[int]]]
    ) -> dict[str, float]:
        optimizer, scaler = self.state.optimizer, self.state.scaler
        rate = learning_rate_at(self.state.step, self.settings, self.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate
        optimizer.zero_grad(set_to_none=True)
        total = sum(len(index) for _, index in batches)
        sums: dict[str, float] = {}
        for key, index in batches:
            share = len(index) / total
            parts: list[dict[str, Tensor]] = []
            for loss, metrics in self.objective(rows(index), seeded(key)):
                scaled = loss * share
                (scaler.scale(scaled) if scaler else scaled).backward()
                parts.append(metrics)
            for name in parts[0]:
                mean = torch.stack([m[name].double() for m in parts]).mean().item()
                sums[name] = sums.get(name, 0.0) + share * mean
        if scaler:
            scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            self.policy.parameters.values(), self.settings.max_grad_norm
        )
        if not scaler and not math.isfinite(norm.item()):
            raise CalligrapherError(
                f"The gradient must be finite. Its norm is {norm.item()} at step {self.state.step}:"
                " the weights were not changed. Lower the learning rate, or use mixed_precision"
                " bf16 or no."
            )
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        self.state.step += 1
        if self.state.ema is not None and self.state.step % self.ema_interval == 0:
            current = {
                n: p.detach().to("cpu", torch.float32) for n, p in self.policy.parameters.items()
            }
            lerp_(self.state.ema, current, ema_decay(self.state.step, self.ema_max_decay))
        return sums | {"grad_norm": norm.item(), "learning_rate": rate}
