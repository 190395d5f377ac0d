"""With-blocks: what a flow needs, put together and taken apart in every case of exit."""

import functools
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

from calligrapher.data.canvas import Canvas
from calligrapher.errors import RewardError
from flows.prefect_ui import PrefectProgress
from tasks.artifacts.digests import code_version, path_digest
from tasks.artifacts.layout import RunsDir
from tasks.artifacts.provenance import fingerprint
from tasks.launch.places import (
    DEFAULT_PORT,
    Launched,
    check_places,
    named_servers,
    size_of,
    visible,
)
from tasks.launch.rank_group import Backend, RankGroup
from tasks.params.files import find_params_file
from tasks.params.names import check_run_name
from tasks.params.run_params import RewardParams, RunParams, load_params
from tasks.progress import Progress
from tasks.resources.resources import Resources
from tasks.resources.rewards import RewardScorer, scorer_identities
from tasks.runs.preflight import preflight
from tasks.runs.run import Run, open_run, resources_of
from tasks.weights.checkpoints import siglip_folder

ENGINES = (
    "paddleocr",
    "paddlex",
    "onnxruntime",
    "rapidocr",
    "opencv-python",
    "torch",
    "transformers",
)
OWN_SERVER_FLAGS = {"vlm": "--vlm-model-path", "siglip": "--siglip-path"}


@contextmanager
def training_run(
    params_file: str, overrides: list[str], name: str | None, runs_dir: Path
) -> Iterator[Run]:
    """Yield everything that the flow needs.

    Raises ParamsError, RewardError or RunLockedError before a model is loaded.
    """
    our_logs()
    file = find_params_file(params_file)
    params = load_params(file, overrides)
    name = check_run_name(file.stem if name is None else name)
    runs = RunsDir(runs_dir)
    folder = runs.run(name)
    launched = Launched.from_environment()
    preflight(params, runs.data, run=folder)
    check_places(params, launched)
    with opened_run(params, folder, progress=PrefectProgress, launched=launched) as run:
        yield run


@contextmanager
def opened_run(
    params: RunParams,
    folder: Path,
    *,
    scorer: Any = None,
    progress: Callable[..., Progress] = Progress,
    launched: Launched | None = None,
) -> Iterator[Run]:
    """The run in `folder`, locked, with all that its stages need.

    scorer: default, one that asks the reward servers of the params, or servers of our own.
    launched: by the user's launcher, whose processes are the ranks then.
    """
    runs = RunsDir(folder.parent)
    size = size_of(params, launched)
    with ExitStack() as stack:
        scorer = scorer or stack.enter_context(lazy_scorer(params, folder, runs.data, size=size))
        resources = resources_of(params, runs, scorer, progress=progress)
        group = ranks_of_run(resources, folder, launched)
        run = stack.enter_context(open_run(resources, folder, launcher=group))
        if group is not None:  # gone before the run's lock is
            stack.enter_context(closing(group))
        yield run


def ranks_of_run(
    resources: Resources, folder: Path, launched: Launched | None = None
) -> RankGroup | None:
    """Return the ranks that do the stages of the run in `folder`; None where this process does.

    They are started with the first stage that needs them.
    """
    launch, logs = resources.params.launch, folder / "logs"
    backend: Backend
    if launched is not None:
        from tasks.launch.joined import Joined

        backend = Joined(launched)
    elif launch.chosen_backend == "inline":
        return None
    elif launch.chosen_backend == "ray":
        from tasks.launch.ray_actors import RayActors

        backend = RayActors(logs, device=resources.params.model.device, wait_s=launch.wait_s)
    else:
        from tasks.launch.spawned import Spawned

        backend = Spawned(logs, launch.gpu_ids)
    return RankGroup(
        resources,
        backend,
        size=size_of(resources.params, launched),
        samplers=launch.rollout_processes,
        servers=lambda: resources.scorer.urls(),
        runs_dir=folder.parent,
        logs=logs,
    )


@contextmanager
def lazy_scorer(
    params: RunParams, run_folder: Path, data_dir: Path, *, size: int = 1
) -> Iterator[RewardScorer]:
    """Yield the scorer of a run of `size` ranks.

    Servers of the run's own start when something is to be scored.
    """
    canvas = Canvas(params.model.width, params.model.height, params.model.reference_context)
    own = not params.reward.disable_reward_model and not named_servers(params, size)
    with ExitStack() as stack:
        urls = functools.cache(lambda: stack.enter_context(reward_urls(params, run_folder, size)))
        note = identity_note(params, data_dir) if own else None
        yield RewardScorer(params.reward, urls, canvas, identity_note=note)


def identity_note(params: RunParams, data_dir: Path) -> Path:
    """Return where it is noted what our own server scores with.

    Its name stands for the server's packages, code and models.
    """
    device = {"device": "cuda"} if params.launch.reward_gpu_ids else {}
    key = fingerprint(
        "identity",
        1,
        {"versions": {name: version(name) for name in ENGINES}, "code": code_version()}
        | ({"ocr_mode": params.reward.ocr_mode} if params.reward.ocr_mode else {})
        | device,
        {name: path_digest(folder) for name, folder in own_server_models(params).items()}
        | {f"scorer {name}": told for name, told in scorer_identities(params.reward).items()},
    )
    return data_dir / "reward-identity" / f"{key[:16]}.json"


def own_server_models(params: RunParams) -> dict[str, str]:
    """Return the model folders that the run's own server needs besides its OCR, by name."""
    models = {}
    if params.reward.vlm is not None:
        models["vlm"] = params.reward.vlm
    if params.reward.style_weight > 0:
        models["siglip"] = str(siglip_folder(params.model.siglip))
    return models


def scorer_flags(reward: RewardParams) -> list[str]:
    """Return the flags that give a reward server the scorers that the params name."""
    return [f"--scorer={name}={text}" for name, text in reward.scorers.items()]


def our_logs() -> None:
    """Our loggers speak at INFO, to whoever listens; without the loading bars of libraries."""
    for name in ("calligrapher", "flows", "tasks"):
        logging.getLogger(name).setLevel(logging.INFO)
    import diffusers.utils.logging
    import transformers.utils.logging

    diffusers.utils.logging.disable_progress_bar()
    transformers.utils.logging.disable_progress_bar()


@contextmanager
def reward_urls(params: RunParams, run_folder: Path, size: int = 1) -> Iterator[list[str]]:
    """The servers that the params name for `size` ranks, or our own for as long as the block lasts.

    Those are one on the CPU, or one on each of `launch.reward_gpu_ids`.
    """
    named = named_servers(params, size)
    if params.reward.disable_reward_model or named:
        yield named
        return
    from reward_server.processes.launch import ServerStartError, local_fleet, local_server

    run_folder.mkdir(parents=True, exist_ok=True)
    flags = [
        f"{OWN_SERVER_FLAGS[name]}={folder}" for name, folder in own_server_models(params).items()
    ]
    flags += scorer_flags(params.reward)
    if params.reward.ocr_mode is not None:
        flags.append(f"--ocr-mode={params.reward.ocr_mode}")
    gpu_ids = params.launch.reward_gpu_ids
    with ExitStack() as stack:
        try:
            if gpu_ids:
                fleet = local_fleet(
                    visible(gpu_ids, os.environ).split(","),
                    first_port=params.reward.server_port or DEFAULT_PORT,
                    flags=flags,
                    log_dir=run_folder / "logs",
                )
                urls = stack.enter_context(fleet)
            else:
                server = local_server(flags=flags, log_path=run_folder / "reward-server.log")
                urls = [stack.enter_context(server)]
        except ServerStartError as error:
            raise RewardError(f"The run's own reward server must start. {error}") from error
        yield urls
