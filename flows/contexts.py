"""With-blocks: what a flow needs, put together and taken apart in every case of exit."""

import functools
import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

from calligrapher.data.canvas import Canvas
from calligrapher.errors import RewardError
from flows.prefect_ui import PrefectProgress
from tasks.artifacts.digests import code_version, path_digest
from tasks.artifacts.layout import RunsDir
from tasks.artifacts.provenance import fingerprint
from tasks.params.files import find_params_file
from tasks.params.names import check_run_name
from tasks.params.run_params import RewardParams, RunParams, load_params
from tasks.progress import Progress
from tasks.resources.rewards import RewardScorer, check_servers, scorer_identities
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
    preflight(params, runs.data, run=folder)
    check_servers(params.reward)
    with opened_run(params, folder, progress=PrefectProgress) as run:
        yield run


@contextmanager
def opened_run(
    params: RunParams,
    folder: Path,
    *,
    scorer: Any = None,
    progress: Callable[..., Progress] = Progress,
) -> Iterator[Run]:
    """The run in `folder`, locked, with all that its stages need.

    scorer: default, one that asks the reward servers of the params, or a server of our own.
    """
    runs = RunsDir(folder.parent)
    with ExitStack() as stack:
        scorer = scorer or stack.enter_context(lazy_scorer(params, folder, runs.data))
        resources = resources_of(params, runs, scorer, progress=progress)
        yield stack.enter_context(open_run(resources, folder))


@contextmanager
def lazy_scorer(params: RunParams, run_folder: Path, data_dir: Path) -> Iterator[RewardScorer]:
    """Yield the scorer of a run; a server of its own starts when something is to be scored."""
    canvas = Canvas(params.model.width, params.model.height, params.model.reference_context)
    own = not params.reward.disable_reward_model and not params.reward.server_urls
    with ExitStack() as stack:
        urls = functools.cache(lambda: stack.enter_context(reward_urls(params, run_folder)))
        note = identity_note(params, data_dir) if own else None
        yield RewardScorer(params.reward, urls, canvas, identity_note=note)


def identity_note(params: RunParams, data_dir: Path) -> Path:
    """Return where it is noted what our own server scores with.

    Its name stands for the server's packages, code and models.
    """
    key = fingerprint(
        "identity",
        1,
        {"versions": {name: version(name) for name in ENGINES}, "code": code_version()}
        | ({"ocr_mode": params.reward.ocr_mode} if params.reward.ocr_mode else {}),
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
def reward_urls(params: RunParams, run_folder: Path) -> Iterator[list[str]]:
    """The servers that the params name, or one of our own for as long as the block lasts."""
    reward = params.reward
    if reward.disable_reward_model or reward.server_urls:
        with nullcontext(list(reward.server_urls)) as urls:
            yield urls
        return
    from reward_server.processes.launch import ServerStartError, local_server

    run_folder.mkdir(parents=True, exist_ok=True)
    flags = [
        f"{OWN_SERVER_FLAGS[name]}={folder}" for name, folder in own_server_models(params).items()
    ]
    flags += scorer_flags(reward)
    if reward.ocr_mode is not None:
        flags.append(f"--ocr-mode={reward.ocr_mode}")
    with ExitStack() as stack:
        server = local_server(flags=flags, log_path=run_folder / "reward-server.log")
        try:
            url = stack.enter_context(server)
        except ServerStartError as error:
            raise RewardError(f"The run's own reward server must start. {error}") from error
        yield [url]
