"""A run whose stages several ranks do, without a launcher: the first rank is the parent as well.

Functions for `two_ranks.on_ranks`; `values` is a params file as `tests/tasks/conftest.py` makes it.
"""

from pathlib import Path

from small_runs import HashScorer

from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import RunsDir
from tasks.launch.calls import StageCall
from tasks.launch.in_process import InProcess
from tasks.params.run_params import RunParams
from tasks.pipeline import STAGES, stage_of
from tasks.runs.run import open_run, resources_of


class Told(InProcess):
    """Tells the other ranks, as JSON, of each call that is not the parent's alone."""

    def run(self, call, out):
        if STAGES[stage_of(call.name)].done_by == "ranks":
            self.resources.ranks.gather(("call", call.to_json(), str(out)))
        return super().run(call, out)

    def committed(self, path):
        self.resources.ranks.gather(("committed", str(path)))
        super().committed(path)


def resources_on(ranks, values, runs_dir):
    params = RunParams.model_validate(values)
    resources = resources_of(params, RunsDir(Path(runs_dir)), HashScorer())
    resources.ranks = ranks
    return resources


def train_on(ranks, values, folder, runs_dir, *, names=None):
    """Make the artifacts `names` of the run in `folder` (default: all); return the resources.

    An Interrupted that every rank meets ends the run as a kill would.
    """
    resources = resources_on(ranks, values, runs_dir)
    try:
        if ranks.is_first:
            with open_run(resources, Path(folder), launcher=Told(resources)) as run:
                run.make_planned(names)
            ranks.gather(("end",))
        else:
            _serve(resources)
    except Interrupted:
        pass
    ranks.barrier()
    return resources


class Interrupted(BaseException):
    """The end of the process, had this been one."""


def _serve(resources):
    while (message := resources.ranks.gather(None)[0])[0] != "end":
        if message[0] == "committed":
            resources.mark_loaded(Artifact.load(Path(message[1])))
        else:
            InProcess(resources).run(StageCall.from_json(message[1]), Path(message[2]))
