"""The threads that compute: how they wait, and how many there are.

Sums in another order, by another number of threads or on another kind of processor, differ in their
last bits: results are equal to the bit only on equal machines.
"""

import os
import platform
import re
import sys
from pathlib import Path


def wait_asleep() -> None:
    """Let OpenMP's threads sleep while they wait, unless the user has said how they are to wait.

    By default they spin: on a machine with other work, such as the run's own reward server, two
    threads are then slower than one. Only what is set before torch is imported has an effect.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


_ranks = 1


def compute_in(ranks: int, threads: int) -> None:
    """Say that `ranks` processes of so many threads compute, this one with as many if it does."""
    global _ranks
    import torch

    _ranks = ranks
    torch.set_num_threads(threads)


def machine() -> dict[str, str]:
    """Return processes, threads of each, and processor: the last bits of a result depend on them.

    Nothing where torch was not imported: then it has computed nothing.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    return {
        "ranks": str(_ranks),
        "threads": str(torch.get_num_threads()),
        "cpu": f"{_processor()}, {torch.backends.cpu.get_cpu_capability()}",
    }


def _processor() -> str:
    listing = Path("/proc/cpuinfo")
    text = listing.read_text() if listing.is_file() else ""
    name = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return name[1] if name else platform.processor() or platform.machine()
