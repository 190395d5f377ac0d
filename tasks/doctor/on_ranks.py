"""The check that needs processes: an all-reduce, and a forward and backward of a case on each rank.

`python -m tasks.doctor.on_ranks FOLDER RANK` is one of them; FOLDER holds `setup.json`.
"""

import contextlib
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path

from calligrapher.errors import CalligrapherError
from calligrapher.threads import wait_asleep
from tasks.params.run_params import RunParams

TAIL = 600  # characters of a rank's messages that are shown


def on_ranks(
    params: RunParams,
    runs_dir: Path,
    size: int,
    *,
    gpu_ids: list[int],
    timeout_s: float = 600.0,
    environment: Mapping[str, str] = os.environ,
) -> str:
    """Start `size` processes that sum a tensor and train a step's gradient on the first case.

    Raises CalligrapherError with the message of the rank that failed first.
    """
    with tempfile.TemporaryDirectory(prefix="calligrapher-doctor-") as temporary:
        folder = Path(temporary)
        setup = {
            "params": params.model_dump(mode="json"),
            "runs_dir": str(runs_dir.absolute()),
            "size": size,
            "timeout_s": timeout_s,
        }
        (folder / "setup.json").write_text(json.dumps(setup))
        threads = max(1, len(os.sched_getaffinity(0)) // size)
        seen = [part for part in environment.get("CUDA_VISIBLE_DEVICES", "").split(",") if part]
        processes: list[subprocess.Popen] = []
        try:
            for rank in range(size):
                gpu = gpu_ids[rank] if rank < len(gpu_ids) else None
                given = {"OMP_NUM_THREADS": str(threads)} | dict(environment)
                if gpu is not None:
                    given["CUDA_VISIBLE_DEVICES"] = seen[gpu] if gpu < len(seen) else str(gpu)
                with (folder / f"log-{rank}").open("wb") as log:
                    command = [sys.executable, "-m", "tasks.doctor.on_ranks", temporary, str(rank)]
                    processes.append(
                        subprocess.Popen(
                            command, env=given, stdin=subprocess.DEVNULL, stdout=log, stderr=log
                        )
                    )
            _wait(processes, folder, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        found = [json.loads((folder / f"result-{rank}").read_text()) for rank in range(size)]
    slowest, worst = max(f["seconds"] for f in found), max(f["peak"] for f in found)
    peak = f", {worst / 2**30:.1f} GiB at the peak" if worst else ""
    return (
        f"{size} sum their gradients; loss {found[0]['loss']:.4g}, gradient norm"
        f" {found[0]['norm']:.4g}, {slowest:.1f} s for a forward and backward{peak}"
    )


def _wait(processes: list[subprocess.Popen], folder: Path, timeout_s: float) -> None:
    """Wait until all have ended well; raise for the one that failed first."""
    stop_at = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        if time.monotonic() > stop_at or any(process.poll() for process in processes):
            break
        time.sleep(0.05)
    for rank in range(len(processes)):
        failed = folder / f"failed-{rank}"
        if failed.is_file():
            raise CalligrapherError(f"rank {rank} failed: {failed.read_text()}")
    for rank, process in enumerate(processes):
        if process.poll() != 0:
            tail = (folder / f"log-{rank}").read_text(errors="replace")[-TAIL:]
            how = "did not end in time" if process.poll() is None else f"ended ({process.poll()})"
            raise CalligrapherError(f"rank {rank} {how}. Its last words: {tail or 'none'}")


def _be(folder: Path, rank: int) -> None:
    """Be rank `rank`: write `result-RANK`, or why not to `failed-RANK`."""
    wait_asleep()
    import torch
    from torch.distributed import FileStore

    from calligrapher.model.loading import pick_device
    from calligrapher.ranks import ALONE, Ranks

    setup = json.loads((folder / "setup.json").read_text())
    params, size = RunParams.model_validate(setup["params"]), setup["size"]
    try:
        device = pick_device(params.model.device)
        joined = contextlib.nullcontext(ALONE)
        if size > 1:
            store = FileStore(str(folder / "store"), size)
            joined = Ranks.join(rank, size, store, device=device, timeout_s=setup["timeout_s"])
        with joined as ranks:
            tensor = torch.nn.Parameter(torch.zeros(3, device=device))
            tensor.grad = torch.full_like(tensor, rank + 1.0)
            ranks.sum_gradients([tensor])
            expected = size * (size + 1) / 2
            if tensor.grad.tolist() != [expected] * 3:
                raise CalligrapherError(
                    f"the sum over the ranks must be {expected}. Got {tensor.grad.tolist()}."
                    " Check the network between them (NCCL_DEBUG=INFO tells what it does)."
                )
            result = one_case(params, Path(setup["runs_dir"]), ranks)
        (folder / f"result-{rank}").write_text(json.dumps(result))
    except Exception as error:
        (folder / f"failed-{rank}").write_text(f"{type(error).__name__}: {error}")
        raise


def one_case(params: RunParams, runs_dir: Path, ranks) -> dict[str, float]:
    """Return loss, gradient norm, seconds and peak bytes of a forward and backward of one case.

    The objective is the warm-up's on the case's own source picture, so that every model and every
    algorithm can do it. Raises CalligrapherError unless loss and gradient are finite, and not 0.
    """
    import torch

    from calligrapher.data.canvas import Canvas
    from calligrapher.model.conditioning import ConditioningCache
    from calligrapher.rl.rows import TrainRows
    from calligrapher.rl.supervised import supervised
    from calligrapher.rl.train_loop import seeded
    from tasks.resources.cases import Cases
    from tasks.resources.resources import open_model
    from tasks.weights.model_files import model_files

    m = params.model
    model = open_model(params, model_files(m, runs_dir))
    data_dir = runs_dir / "data"
    canvas = Canvas(m.width, m.height, m.reference_context)
    cache = ConditioningCache(model.encoders, canvas, model.device, data_dir / "conditioning")
    cases = [Cases(params, data_dir).train[0]]
    x0 = cache.targets(cases, reconstruct=True).to(model.device)
    rows = TrainRows(x0, cache.batch(cases), torch.zeros(1, device=model.device))
    started = time.monotonic()
    ((loss, _),) = supervised(model.policy, rows, seeded(params.seed, "doctor"), 0.0)
    loss.backward()
    weights = list(model.policy.parameters.values())
    ranks.sum_gradients(weights)
    gradients = [w.grad.float() for w in weights if w.grad is not None]
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


if __name__ == "__main__":
    _be(Path(sys.argv[1]), int(sys.argv[2]))
