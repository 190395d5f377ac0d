"""The launcher of a run in one process: it calls the stage function here."""

from pathlib import Path

import torch

from tasks.artifacts.artifact import Artifact
from tasks.launch.calls import StageAnswer, StageCall
from tasks.launch.dispatch import do
from tasks.resources.resources import Resources


class InProcess:
    """Does every stage in this process, with these `resources`."""

    samplers = 0

    def __init__(self, resources: Resources) -> None:
        self.resources = resources

    def run(self, call: StageCall, out: Path) -> StageAnswer:
        """Do `call`; its cost is the peak of GPU memory, where there is a GPU."""
        if not torch.cuda.is_available():
            return StageAnswer(do(call, self.resources, out))
        torch.cuda.reset_peak_memory_stats()
        meta = do(call, self.resources, out)
        return StageAnswer(meta, {"gpu_peak_gib": torch.cuda.max_memory_allocated() / 2**30})

    def begin(self, call: StageCall, out: Path) -> None:
        raise NotImplementedError("one process does one thing after the other")

    def committed(self, path: Path) -> None:
        """Note that the weights in memory are those of the artifact in `path`, if it has any."""
        self.resources.mark_loaded(Artifact.load(path))
