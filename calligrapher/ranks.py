"""The processes that share the work of a stage, and what they have to tell each other.

Who does what is a pure function of (params, round, rank, size): `owns` answers it, and nobody is
asked. What is asked of the others are sums of gradients, metrics, and to wait. Alone, every method
gives back what it got and costs nothing.

```
with Ranks.join(rank, size, store, device=device, timeout_s=600) as ranks:
    for number, shard in enumerate(shards):
        if ranks.owns(number):
            ...
    ranks.barrier()
```
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor

BUCKET_BYTES = 64 * 2**20  # of gradients that are summed at a time


@dataclass(frozen=True)
class Ranks:
    """This process among those of its group. All of them call the same methods in the same order.

    A rank that fails lets the others wait until their time-out, or until the process that started
    them ends them: that one is told of the failure.
    """

    rank: int = 0
    size: int = 1
    _objects: Any = field(default=None, repr=False, compare=False)  # a gloo group

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is one file."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        """Whether there is no other process."""
        return self.size == 1

    def owns(self, number: int) -> bool:
        """Return whether the piece of work `number` (a shard, a batch of a step) is this rank's."""
        return number % self.size == self.rank

    @torch.no_grad()
    def sum_gradients(self, parameters: Iterable[Tensor]) -> None:
        """Replace each parameter's gradient by its sum over the ranks, in float32.

        parameters: the same, in the same order, on every rank. A gradient that some ranks do not
        have counts as 0 there; one that nobody has stays None, so that the optimizer passes over it
        as it would in one process. Sharded parameters (DTensor) are left alone: FSDP has summed
        theirs. The sums have the same bits on all ranks.
        """
        if self.alone:
            return
        from torch.distributed.tensor import DTensor

        whole = [p for p in parameters if not isinstance(p, DTensor)]
        if not whole:
            return
        # Over gloo: the ranks meet here, and one that waits takes no time of a processor.
        there = torch.tensor([float(p.grad is not None) for p in whole])
        dist.all_reduce(there, group=self._objects)
        somewhere = [p for p, n in zip(whole, there.tolist(), strict=True) if n]
        for bucket in _buckets(somewhere):
            flat = torch.cat([_flat_gradient(p) for p in bucket])
            dist.all_reduce(flat)
            parts = flat.split([p.numel() for p in bucket])
            for parameter, part in zip(bucket, parts, strict=True):
                if parameter.grad is None:
                    parameter.grad = torch.empty_like(parameter)
                parameter.grad.copy_(part.view_as(parameter))

    def combine(
        self, values: Mapping[str, float], maxima: Callable[[str], bool] = lambda name: False
    ) -> dict[str, float]:
        """Return the sum of each value over the ranks that have it; the maximum where `maxima`.

        maxima: says by its name which value is a maximum. A NaN stays one. The result is the same
        on all ranks: it is reckoned in their order.
        """
        if self.alone:
            return dict(values)
        combined: dict[str, float] = {}
        for given in self.gather(dict(values)):
            for name, value in given.items():
                if name not in combined:
                    combined[name] = value
                elif not maxima(name):
                    combined[name] += value
                elif not math.isnan(combined[name]):
                    combined[name] = value if math.isnan(value) else max(combined[name], value)
        return combined

    def gather(self, what: Any) -> list[Any]:
        """Return what each rank gives, in their order; anything that can be pickled."""
        if self.alone:
            return [what]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, what, group=self._objects)
        return found

    def barrier(self) -> None:
        """Wait until all ranks are here: what they wrote before can be read then."""
        if not self.alone:
            dist.barrier(group=self._objects)

    @classmethod
    @contextmanager
    def join(
        cls,
        rank: int,
        size: int,
        store: dist.Store,
        *,
        device: torch.device,
        timeout_s: float,
    ) -> Iterator[Self]:
        """Be rank `rank` of `size` until the block ends.

        store: where the ranks find each other. device: that of this rank's model; gradients go over
        NCCL where it is a GPU, all else over gloo. timeout_s: how long a rank waits for the others
        before it raises; they may have a shard more to sample.
        """
        timeout = timedelta(seconds=timeout_s)
        backend = "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
        try:
            objects = dist.new_group(backend="gloo", timeout=timeout)
            yield cls(rank, size, objects)
        finally:
            dist.destroy_process_group()


ALONE = Ranks()


def _buckets(parameters: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """Yield `parameters` in runs of at most `BUCKET_BYTES` of float32, or of one parameter."""
    bucket: list[Tensor] = []
    room = BUCKET_BYTES
    for parameter in parameters:
        size = 4 * parameter.numel()
        if bucket and size > room:
            yield bucket
            bucket, room = [], BUCKET_BYTES
        bucket.append(parameter)
        room -= size
    if bucket:
        yield bucket


def _flat_gradient(parameter: Tensor) -> Tensor:
    if parameter.grad is None:
        return torch.zeros(parameter.numel(), device=parameter.device)
    return parameter.grad.detach().float().flatten()
