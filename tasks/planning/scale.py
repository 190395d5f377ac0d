"""A round on 1 to 512 GPUs as a table."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from calligrapher.errors import ParamsError
from tasks.params.run_params import RunParams, load_params
from tasks.planning.cost import Cost, Price, cost, price

SIZES = tuple(2**n for n in range(10))


def check_rates(
    tflops: float | None,
    bandwidth: float | None,
    hourly: float | None,
    *,
    needed: bool,
    as_json: bool,
) -> None:
    """Raise ParamsError for a rate that is none, and for what cannot be told."""
    for name, value in (("--tflops", tflops), ("--bandwidth", bandwidth), ("--price", hourly)):
        if value is not None and not 0 < value < math.inf:
            raise ParamsError(f"{name} must be a number above 0. Got {value}.")
    if tflops is None and (needed or bandwidth is not None or hourly is not None):
        raise ParamsError(
            "--scale, --bandwidth and --price need --tflops. Got none: give what a GPU reaches."
        )
    if as_json and tflops is not None:
        raise ParamsError("--json must not be given beside --tflops: time is told as a table.")


def scale_table(
    path: Path,
    overrides: Sequence[str],
    tflops: float,
    bandwidth: float | None,
    hourly: float | None,
    *,
    own: bool = False,
) -> str:
    """Return a line per number of ranks, with ddp; own: that of the params alone.

    With `rollout.staleness` a column tells how many of the ranks sample beside the others, in `own`
    as the params say, else so many that the round is shortest. Where a round may be refilled a last
    column tells the seconds of one with all its refills.
    """
    params = load_params(path, overrides)
    if params.launch.strategy != "ddp":
        raise ParamsError(
            f"launch.strategy must be ddp where time is asked for. Got {params.launch.strategy}:"
            " what its gathers cost is not modelled."
        )
    lines = [
        f"{'GPUs':>5}{'rollout s':>11}{'update s':>11}{'all-reduce s':>14}{'round s':>10}"
        f"{'busy':>7}{'GPU h':>9}"
        + f"{'sample':>8}" * params.rollout.staleness
        + f"{'price':>10}" * (hourly is not None)
        + f"{'up to s':>10}" * (params.rollout.refill > 0)
    ]
    priced = partial(price, params, tflops=tflops, bandwidth=bandwidth, hourly=hourly)
    alone = priced(cost(params, 1, 0)).total
    for ranks in (params.launch.size,) if own else SIZES:
        found = cost(params) if own else _shortest(params, ranks, priced)
        p = priced(found)
        s = p.seconds
        summed = f"{s['all-reduce']:.1f}" if "all-reduce" in s else "-"
        line = (
            f"{ranks:>5}{s['rollout']:>11.1f}{s['update']:>11.1f}{summed:>14}{p.total:>10.1f}"
            f"{alone / (ranks * p.total):>7.0%}{p.gpu_hours:>9.2f}"
        )
        line += f"{found.samplers:>8}" * params.rollout.staleness
        line += f"{p.money:>10.2f}" if p.money is not None else ""
        lines.append(line + f"{p.at_most:>10.1f}" * (params.rollout.refill > 0))
    return "\n".join(lines)


def _shortest(params: RunParams, ranks: int, priced: Callable[[Cost], Price]) -> Cost:
    """Return the round on `ranks` ranks, with as many set apart to sample as make it shortest."""
    most = ranks if params.rollout.staleness else 1
    return min((cost(params, ranks, n) for n in range(most)), key=lambda c: priced(c).total)
