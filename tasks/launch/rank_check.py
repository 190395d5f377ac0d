"""What ranks are asked before a run: a sum over all, and a forward and backward of a case."""

import math
import time

import torch

from calligrapher.errors import CalligrapherError
from calligrapher.model import sharding
from calligrapher.ranks import Ranks
from calligrapher.rl.rows import TrainRows
from calligrapher.rl.supervised import supervised
from calligrapher.rl.train_loop import seeded
from tasks.resources.resources import Resources


def check_rank(resources: Resources) -> dict[str, float]:
    """Return loss, gradient norm, seconds and peak bytes of a forward and backward of one case.

    The objective is the warm-up's on the case's own source picture, so that every model and every
    algorithm can do it. Raises CalligrapherError unless the ranks add up right, and loss and
    gradient are finite, and not 0.
    """
    ranks, model, params = resources.ranks, resources.model, resources.params
    _sum(ranks, model.device)
    cases = [resources.cases.train[0]]
    x0 = resources.conditioning.targets(cases, reconstruct=True).to(model.device)
    advantages = torch.zeros(1, device=model.device)
    rows = TrainRows(x0, resources.conditioning.batch(cases), advantages)
    started = time.monotonic()
    ((loss, _),) = supervised(model.policy, rows, seeded(params.seed, "doctor"), 0.0)
    loss.backward()
    weights = list(model.policy.parameters.values())
    ranks.sum_gradients(weights)
    gradients = [sharding.whole(w.grad).float() for w in weights if w.grad is not None]
    norm = torch.stack([g.norm() for g in gradients]).norm().item() if gradients else 0.0
    if not math.isfinite(loss.item()) or not math.isfinite(norm) or norm == 0:
        raise CalligrapherError(
            f"loss and gradient of a case must be finite, and not 0. Got {loss.item()} and {norm}."
            " Look for broken weights, or use mixed_precision bf16 or no."
        )
    cuda = model.device.type == "cuda"
    return {
        "loss": loss.item(),
        "norm": norm,
        "seconds": time.monotonic() - started,
        "peak": float(torch.cuda.max_memory_allocated()) if cuda else 0.0,
    }


def _sum(ranks: Ranks, device: torch.device) -> None:
    """Raise CalligrapherError unless a sum over the ranks is right."""
    tensor = torch.nn.Parameter(torch.zeros(3, device=device))
    tensor.grad = torch.full_like(tensor, ranks.rank + 1.0)
    ranks.sum_gradients([tensor])
    expected = ranks.size * (ranks.size + 1) / 2
    if tensor.grad.tolist() != [expected] * 3:
        raise CalligrapherError(
            f"the sum over the ranks must be {expected}. Got {tensor.grad.tolist()}."
            " Check the network between them (NCCL_DEBUG=INFO tells what it does)."
        )
