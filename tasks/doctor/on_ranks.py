"""The check that needs processes: an all-reduce, and a forward and backward of a case on each rank.

They are started, watched and ended as those of a run are.
"""

from contextlib import closing
from pathlib import Path

from calligrapher.data.canvas import Canvas
from calligrapher.errors import CalligrapherError
from tasks.artifacts.layout import RunsDir
from tasks.launch.failures import log_of
from tasks.launch.rank_group import Backend, RankGroup
from tasks.params.run_params import RunParams
from tasks.resources.cases import Cases
from tasks.resources.resources import Resources
from tasks.resources.rewards import RewardScorer
from tasks.weights.model_files import model_files

LOGS = "doctor-logs"
"""Folder in that of the data with what the ranks printed last."""


def on_ranks(params: RunParams, runs_dir: Path, size: int) -> str:
    """Let `size` ranks sum a tensor and train a step's gradient on the first case.

    Raises CalligrapherError with the message of the rank that failed first.
    """
    m, runs = params.model, RunsDir(runs_dir)
    scorer = RewardScorer(params.reward, [], Canvas(m.width, m.height, m.reference_context))
    resources = Resources(params, model_files(m, runs.path), Cases(params, runs.data), scorer)
    logs = runs.data / LOGS
    for rank in range(size):
        log_of(logs, rank).unlink(missing_ok=True)
    group = RankGroup(
        resources,
        _backend(params, logs),
        size=size,
        servers=list,
        runs_dir=runs.path,
        logs=logs,
    )
    with closing(group):
        try:
            found = group.check()
        except CalligrapherError as error:
            notes = getattr(error, "__notes__", [])
            raise CalligrapherError(" ".join([str(error), *notes])) from error
    slowest, worst = max(f["seconds"] for f in found), max(f["peak"] for f in found)
    peak = f", {worst / 2**30:.1f} GiB at the peak" if worst else ""
    return (
        f"{size} sum their gradients; loss {found[0]['loss']:.4g}, gradient norm"
        f" {found[0]['norm']:.4g}, {slowest:.1f} s for a forward and backward{peak}"
    )


def _backend(params: RunParams, logs: Path) -> Backend:
    if params.launch.chosen_backend == "ray":
        from tasks.launch.ray_actors import RayActors

        return RayActors(logs, device=params.model.device, wait_s=params.launch.wait_s)
    from tasks.launch.spawned import Spawned

    return Spawned(logs, params.launch.gpu_ids)
