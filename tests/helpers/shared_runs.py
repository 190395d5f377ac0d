"""A run whose stages several ranks do, without a launcher: the first rank is the parent as well.

Functions for `two_ranks.on_ranks`; `values` is a params file as `tests/tasks/conftest.py` makes it.
"""

from pathlib import Path

from small_runs import HashScorer

from calligrapher.rl.train_loop import TrainLoop
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


def resources_on(ranks, values, runs_dir, scorer=None):
    params = RunParams.model_validate(values)
    resources = resources_of(params, RunsDir(Path(runs_dir)), scorer or HashScorer())
    resources.ranks, resources.strategy = ranks, params.launch.strategy
    return resources


def train_on(ranks, values, folder, runs_dir, *, names=None, scorer=None):
    """Make the artifacts `names` of the run in `folder` (default: all); return the resources.

    An Interrupted that every rank meets ends the run as a kill would.
    """
    resources = resources_on(ranks, values, runs_dir, scorer)
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


def interrupted(step, function, *args, **kwargs):
    """Call `function`; the process ends after the optimizer step `step` of an update."""
    real = TrainLoop.run

    def run(self, rows, schedule, *, on_step, **how):
        def counted(metrics):
            on_step(metrics)
            if "update" in schedule.key and self.state.step == step:
                raise Interrupted

        real(self, rows, schedule, on_step=counted, **how)

    TrainLoop.run = run
    try:
        function(*args, **kwargs)
    finally:
        TrainLoop.run = real


def _serve(resources):
    while (message := resources.ranks.gather(None)[0])[0] != "end":
        if message[0] == "committed":
            resources.mark_loaded(Artifact.load(Path(message[1])))
        else:
            InProcess(resources).run(StageCall.from_json(message[1]), Path(message[2]))
