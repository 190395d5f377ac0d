"""Runs a function on several ranks, each a process of its own that talks gloo with the others.

```
def sums(ranks, number):                       # at the top of a test file
    return ranks.gather(number + ranks.rank)

assert on_ranks(2, sums, 5) == [[5, 6], [5, 6]]
```
Each call costs some seconds of imports: check many things in one, and share it between tests with a
module-scoped fixture. Functions of a test file or of a helper will do; arguments and results are
pickled. The processes compute with one thread each.
"""

import importlib.util
import os
import pickle
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
TAIL = 4000  # characters of a failed rank's output that the error shows


def on_ranks(size, function, *args, timeout_s=240, **kwargs):
    """Return what `function(ranks, *args, **kwargs)` returns on each of `size` ranks.

    Raises AssertionError with the output of the rank that failed first; the others are ended.
    """
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        path = Path(function.__code__.co_filename)
        call = (function.__name__, args, kwargs)
        (folder / "call").write_bytes(
            pickle.dumps((size, str(path), function.__module__, timeout_s))
        )
        (folder / "arguments").write_bytes(pickle.dumps(call))
        places = [str(ROOT), str(path.parent), *filter(None, sys.path)]
        environment = os.environ | {
            "PYTHONPATH": os.pathsep.join(places),
            "OMP_NUM_THREADS": "1",
            "MKL_NUM_THREADS": "1",
        }
        processes = []
        try:
            for rank in range(size):
                with open(folder / f"log-{rank}", "wb") as log:
                    command = [sys.executable, __file__, str(folder), str(rank)]
                    processes.append(
                        subprocess.Popen(command, env=environment, stdout=log, stderr=log)
                    )
            _wait(processes, folder, timeout_s)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(size)]


def _wait(processes, folder, timeout_s):
    """Wait until all have ended well; raise for the first that has not."""
    deadline = time.monotonic() + timeout_s
    while any(process.poll() is None for process in processes):
        # Not the one whose collective fails because another ended: that one failed before it.
        failed = sorted(folder.glob("failed-*"), key=lambda path: path.stat().st_mtime_ns) or [
            folder / f"failed-{r}" for r, p in enumerate(processes) if p.poll()
        ]
        if failed:
            rank = failed[0].name.rpartition("-")[2]
            raise AssertionError(f"rank {rank} failed:\n{_tail(folder, rank)}")
        if time.monotonic() > deadline:
            tails = "\n".join(f"rank {r}:\n{_tail(folder, r)}" for r in range(len(processes)))
            raise AssertionError(f"the ranks took more than {timeout_s} s\n{tails}")
        time.sleep(0.02)
    for rank, process in enumerate(processes):
        assert process.returncode == 0, f"rank {rank} failed:\n{_tail(folder, rank)}"


def _tail(folder, rank):
    time.sleep(0.2)  # the trace is written after the mark
    return (folder / f"log-{rank}").read_text(errors="replace")[-TAIL:]


def _be(folder, rank):
    """Be one of the ranks: what the processes of `on_ranks` run."""
    from calligrapher.threads import wait_asleep

    wait_asleep()
    import torch
    from torch.distributed import FileStore

    from calligrapher.ranks import Ranks

    torch.set_num_threads(1)
    size, path, name, timeout_s = pickle.loads((folder / "call").read_bytes())
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # so that its classes can be unpickled
    spec.loader.exec_module(module)
    function, args, kwargs = pickle.loads((folder / "arguments").read_bytes())
    store = FileStore(str(folder / "store"), size)
    cpu = torch.device("cpu")
    try:
        with Ranks.join(rank, size, store, device=cpu, timeout_s=timeout_s) as ranks:
            result = getattr(module, function)(ranks, *args, **kwargs)
            (folder / f"result-{rank}").write_bytes(pickle.dumps(result))
    except BaseException:
        (folder / f"failed-{rank}").touch()
        raise


if __name__ == "__main__":
    _be(Path(sys.argv[1]), int(sys.argv[2]))
