"""The optimisation loop: batches of rows in, optimizer steps out; the same for warm-up, NFT and
GRPO.

Everything random derives from names: of the seed, the stage, the pass, and the batch or the row in
it. So a loop that starts again at step k goes on exactly as it would have gone.
"""

import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from calligrapher.errors import CalligrapherError
from calligrapher.model import sharding
from calligrapher.model.policy import Policy
from calligrapher.ranks import ALONE, Ranks
from calligrapher.rl.algorithm import Losses
from calligrapher.rl.ema import ema_decay, follow_
from calligrapher.rl.rows import TrainRows
from calligrapher.rl.seeds import seeded
from calligrapher.rl.train_state import RELATIVE_RATE, TrainState

LEAST_SCALE = 1e-4  # of fp16's losses: gradients that overflow below it are not the scale's fault


class OptimizerSettings(Protocol):
    """What the loop reads of `warmup` and `update` params."""

    batch_size: int
    gradient_accumulation_steps: int
    learning_rate: float
    lr_scheduler: str
    lr_warmup_steps: int
    weight_decay: float
    max_grad_norm: float


_DECAY = 0.25  # of the steps after the rise, the last


def learning_rate_at(step: int, settings: OptimizerSettings, total_steps: int | None) -> float:
    """Return the learning rate of step `step` (from 0), after a linear rise.

    constant, linear, cosine, or as transformers' `warmup_stable_decay`, which falls linearly in the
    last quarter of the steps.
    """
    rise = settings.lr_warmup_steps
    if settings.lr_scheduler != "constant" and step < rise:
        return settings.learning_rate * (step + 1) / rise
    if settings.lr_scheduler in ("constant", "constant_with_warmup"):
        return settings.learning_rate
    done = min(1.0, (step - rise) / max(1, total_steps - rise))
    match settings.lr_scheduler:
        case "linear":
            factor = 1 - done
        case "warmup_stable_decay":
            factor = min(1.0, (1 - done) / _DECAY)
        case _:
            factor = 0.5 * (1 + math.cos(math.pi * done))
    return settings.learning_rate * factor


def is_maximum(name: str) -> bool:
    """Return whether the metric `name` is a maximum: over rows, and over what they are part of.

    The others are means, over rows and over steps.
    """
    return "_max_" in name


@dataclass(frozen=True)
class Batch:
    """The rows of one forward and backward, and what their random numbers derive from.

    pass_key: for what belongs to a row in this pass, whatever batch it is in, as in `0/update/3/1`.
    """

    pass_key: str
    number: int  # within the pass
    index: list[int]

    @property
    def key(self) -> str:
        """For what belongs to the batch."""
        return f"{self.pass_key}/{self.number}"


def batches_of(
    rows: Sequence[int], size: int, kinds: Sequence[Hashable] | None = None
) -> list[list[int]]:
    """Return `rows` in batches of at most `size`, each of one kind; kinds: of row 0, 1, ...

    Rows of a kind stay in their order; without kinds, batches are runs of the rows.
    """
    alike: dict[Hashable, list[int]] = {}
    for row in rows:
        alike.setdefault(kinds[row] if kinds else None, []).append(row)
    return [run[at : at + size] for run in alike.values() for at in range(0, len(run), size)]


@dataclass(frozen=True)
class BatchSchedule:
    """Which rows form which optimizer step.

    Batches are runs of consecutive rows, so that a row has the neighbours that it had in the
    rollout (GRPO's ratio is then exactly 1 at first); only the order of the batches is shuffled,
    anew in each pass. With `shuffle_rows` the rows themselves are shuffled. `teaches` says which
    rows have something to teach: a step in which none has is left out. A batch has rows of one of
    the `kinds` only.
    """

    num_rows: int
    batch_size: int
    accumulation: int
    passes: int
    key: str  # what the order derives from, as in `0/update/3`
    shuffle_rows: bool = False
    teaches: Sequence[bool] | None = None
    kinds: Sequence[Hashable] | None = None

    def steps(self) -> list[list[Batch]]:
        """Return the optimizer steps, each with the batches whose gradients it adds up."""
        steps = []
        for p in range(self.passes):
            generator = seeded(self.key, "order", p)
            rows = list(range(self.num_rows))
            if self.shuffle_rows:
                rows = torch.randperm(self.num_rows, generator=generator).tolist()
            runs = batches_of(rows, self.batch_size, self.kinds)
            order = torch.randperm(len(runs), generator=generator).tolist()
            batches = [Batch(f"{self.key}/{p}", i, runs[i]) for i in order]
            steps += [
                batches[i : i + self.accumulation]
                for i in range(0, len(batches), self.accumulation)
            ]
        return [step for step in steps if self._teaches(step)]

    def _teaches(self, step: list[Batch]) -> bool:
        teaches = self.teaches
        return teaches is None or any(teaches[row] for batch in step for row in batch.index)


@dataclass
class TrainLoop:
    """Runs a schedule's optimizer steps on a policy.

    With several ranks, batch i of a step is that of rank i mod N. Their gradients are added up, and
    every rank takes the same step; the metrics are those of all batches, on every rank.
    """

    policy: Policy
    state: TrainState
    settings: OptimizerSettings
    objective: Callable[[TrainRows, Batch], Losses]
    total_steps: int | None = None  # where a falling learning rate reaches 0
    ema_max_decay: float = 0.999
    ema_interval: int = 1
    ranks: Ranks = ALONE

    def run(
        self,
        rows: Callable[[list[int]], TrainRows],
        schedule: BatchSchedule,
        *,
        done: int = 0,
        limit: int | None = None,
        on_step: Callable[[dict[str, float]], None] = lambda metrics: None,
    ) -> None:
        """Take the optimizer steps of `schedule` from number `done` on.

        limit: optimizer steps that the state may have at most. on_step: gets each step's metrics.
        In fp16 a step whose scaled gradients overflow is skipped: it changes nothing but the scale,
        does not count in the state, and its metrics are `skipped_steps` 1 alone.
        """
        self.policy.loaded = None
        if self.state.scaler:  # It has no scale before its first loss, and a rank may have none.
            self.state.scaler.scale(torch.zeros((), device=self.policy.device))
        for batches in schedule.steps()[done:]:
            if limit is not None and self.state.step >= limit:
                return
            on_step(self._step(rows, batches))

    def _step(
        self, rows: Callable[[list[int]], TrainRows], batches: list[Batch]
    ) -> dict[str, float]:
        optimizer = self.state.optimizer
        rate = learning_rate_at(self.state.step, self.settings, self.total_steps)
        for group in optimizer.param_groups:
            group["lr"] = rate * group.get(RELATIVE_RATE, 1.0)
        optimizer.zero_grad(set_to_none=True)
        metrics = self.ranks.combine(self._backward(rows, batches), is_maximum)
        self.ranks.sum_gradients(self.policy.parameters.values())
        if self.state.scaler:
            self.state.scaler.unscale_(optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            self.policy.parameters.values(), self.settings.max_grad_norm
        )
        norm = sharding.whole(norm).item()
        if not math.isfinite(norm):
            self._must_be_an_overflow(norm)
            return {"skipped_steps": 1}
        if self.state.scaler:
            self.state.scaler.step(optimizer)
            self.state.scaler.update()
            metrics["skipped_steps"] = 0
        else:
            optimizer.step()
        self.state.step += 1
        if self.state.ema is not None and self.state.step % self.ema_interval == 0:
            current = {n: sharding.held(p) for n, p in self.policy.parameters.items()}
            follow_(self.state.ema, current, ema_decay(self.state.step, self.ema_max_decay))
        if self.state.kl_coef is not None:
            metrics["kl_coef"] = self.state.kl_coef
        return metrics | {"grad_norm": norm, "learning_rate": rate}

    def _backward(
        self, rows: Callable[[list[int]], TrainRows], batches: list[Batch]
    ) -> dict[str, float]:
        """Add up the gradients of this rank's `batches` of a step; return their part of the
        metrics."""
        scaler = self.state.scaler
        metrics: dict[str, float] = {}
        for batch, share in self._shares(batches):
            parts: list[dict[str, Tensor]] = []
            for loss, measured in self.objective(rows(batch.index), batch):
                scaled = loss * share
                (scaler.scale(scaled) if scaler else scaled).backward()
                parts.append(measured)
            if not share:
                continue
            for name in dict.fromkeys(name for part in parts for name in part):
                values = torch.stack([part[name].double() for part in parts if name in part])
                if is_maximum(name):
                    before = values.new_tensor([metrics.get(name, -math.inf)])
                    metrics[name] = torch.cat([before, values]).max().item()  # NaN stays NaN
                else:
                    metrics[name] = metrics.get(name, 0.0) + share * values.mean().item()
        return metrics

    def _shares(self, batches: list[Batch]) -> Iterator[tuple[Batch, float]]:
        """Yield this rank's `batches` of a step, each with its share of the step's rows.

        Where each forward is the work of all ranks, one that has no batch left goes through another
        one's, which counts nothing.
        """
        total = sum(len(batch.index) for batch in batches)
        for first in range(0, len(batches), self.ranks.size):
            own = first + self.ranks.rank
            if own < len(batches):
                yield batches[own], len(batches[own].index) / total
            elif self.policy.sharded:
                yield batches[first], 0.0

    def _must_be_an_overflow(self, norm: float) -> None:
        """Lower the scale of fp16's losses, which the gradients outgrew.

        Raises CalligrapherError where no scale explains the norm: without a scaler, where the
        gradients themselves are finite, and where the scale has been lowered to its least.
        """
        scaler = self.state.scaler
        if scaler:
            before = scaler.get_scale()
            scaler.update()
            if LEAST_SCALE <= scaler.get_scale() < before:
                return
        cause = f" A scale of {scaler.get_scale():g} is not the cause." if scaler else ""
        raise CalligrapherError(
            f"The gradient must be finite. Its norm is {norm} at step {self.state.step}: the"
            f" weights were not changed.{cause} Lower the learning rate, or use mixed_precision"
            " bf16 or no."
        )
