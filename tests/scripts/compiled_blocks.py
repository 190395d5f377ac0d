"""Says what `model.compile` gains: seconds of a forward alone, and of one with its backward.

    python tests/scripts/compiled_blocks.py tiny-nft --batch 24

Two lines, the model of a params file as it is and compiled: the best of `--turns`, the two in turn
(processor seconds; on a GPU the clock's), and what the first of each took, which compiles.
"""

import argparse
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from calligrapher.data.canvas import Canvas
from calligrapher.model.conditioning import Conditioning, ConditioningCache
from calligrapher.model.policy import Policy
from tasks.params.files import find_params_file
from tasks.params.run_params import RunParams, load_params
from tasks.resources.cases import Cases
from tasks.resources.resources import open_model
from tasks.weights.model_files import model_files

CHANNELS = 64  # of a packed latent


def seconds(do: Callable[[], object], device: torch.device) -> float:
    """What `do` takes, the processes that it starts included."""

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize()
            return time.perf_counter()
        return sum(os.times()[:4])

    started = now()
    do()
    return now() - started


def calls_of(
    params: RunParams, folder: Path, batch: int
) -> tuple[dict[str, Callable[[], object]], torch.device]:
    """Return what is measured of the model of `params`, and where it runs."""
    model = open_model(params, model_files(params.model, folder))
    m, cases = params.model, Cases(params, folder / "data").train
    canvas = Canvas(m.width, m.height, m.reference_context)
    encodings = ConditioningCache(model.encoders, canvas, model.device, folder / "encodings")
    conditioning: Conditioning = encodings.batch([cases[n % len(cases)] for n in range(batch)])
    shape = (batch, conditioning.masked.shape[1], CHANNELS)
    x, sigma = torch.randn(shape, device=model.device), torch.linspace(0.1, 0.9, batch)
    policy: Policy = model.policy

    def velocity() -> torch.Tensor:
        return policy.velocity(x, sigma.to(model.device), conditioning)

    calls = {
        "forward": torch.no_grad()(velocity),
        "and backward": lambda: velocity().square().mean().backward(),
    }
    return calls, model.device


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("params", help="a file, or the name of one in params/")
    parser.add_argument("--batch", type=int, default=24)
    parser.add_argument("--turns", type=int, default=8)
    chosen = parser.parse_args()
    first: dict[tuple[bool, str], float] = {}
    best: dict[tuple[bool, str], float] = {}
    with tempfile.TemporaryDirectory() as temporary:
        calls = {}
        for compiled in (False, True):
            params = load_params(
                find_params_file(chosen.params), [f"model.compile={str(compiled).lower()}"]
            )
            found, device = calls_of(params, Path(temporary), chosen.batch)
            calls |= {(compiled, name): call for name, call in found.items()}
        for turn in range(chosen.turns + 1):
            for key, call in calls.items():
                took = seconds(call, device)
                if turn == 0:
                    first[key] = took
                else:
                    best[key] = min(took, best.get(key, took))
    for compiled, told in ((False, "as it is"), (True, "compiled")):
        print(
            f"{told:9}",
            *(
                f"{name} {best[compiled, name]:.3f} s (first {first[compiled, name]:.1f})"
                for name in ("forward", "and backward")
            ),
        )
    for name in ("forward", "and backward"):
        print(f"{name}: {best[True, name] / best[False, name]:.2f} of the time")


if __name__ == "__main__":
    main()
