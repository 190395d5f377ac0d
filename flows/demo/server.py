"""Puts the page together (model, examples, reward server, a folder) and serves it."""

import logging
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from calligrapher.data.case import Case
from calligrapher.data.dataset import load_cases
from calligrapher.errors import DataError, ParamsError
from calligrapher.tiny.pack import TINY
from flows.contexts import our_logs, scorer_flags
from flows.demo.hosts import is_loopback
from flows.demo.scores import picture_scorer
from flows.demo.session import DemoSession
from flows.services.loopback import ask_this_machine_directly
from reward_server.processes.process import url_of
from tasks.artifacts.layout import PARAMS
from tasks.inference.painter import Painter, open_painter
from tasks.params.run_params import DataParams, RunParams, load_params
from tasks.pipeline import WARMUP
from tasks.tracking.locate import locate

logger = logging.getLogger(__name__)

NUM_EXAMPLES = 12
TINY_DATA = DataParams(train=TINY, evaluation=TINY)


def serve(
    *,
    run: str | None,
    runs_dir: Path,
    base: str | None,
    siglip: str | None,
    adapter: str | None,
    reward_urls: Sequence[str],
    host: str,
    port: int,
) -> None:
    """Serve the page until Ctrl-C or SIGTERM, both of which raise KeyboardInterrupt.

    Raises ParamsError before a model is loaded when gradio is not installed or the port is taken.
    """
    if run and (base or siglip or adapter):
        raise ParamsError("--run brings its own model. Leave out --base, --siglip and --adapter.")
    our_logs()
    with tempfile.TemporaryDirectory(prefix="calligrapher-demo-") as name:
        folder = Path(name)
        layout = _layout(folder)
        _check_port(host, port)
        signal.signal(
            signal.SIGTERM, signal.default_int_handler
        )  # so that what was started ends with us
        run_folder = locate(run, runs_dir)[0] if run else None
        params = load_params(run_folder / PARAMS) if run_folder else None
        painter = open_painter(
            run, runs_dir=runs_dir, base=base or TINY, siglip=siglip, adapter=adapter
        )
        data = (
            params.data if params else TINY_DATA if base in (None, TINY) else DataParams(train=base)
        )
        examples = example_cases(
            data, folder, run_folder and run_folder.parent / "data" / "pictures"
        )
        urls = reward_urls or (params.reward.server_urls if params else [])
        flags = scorer_flags(params.reward) if params else []
        with picture_scorer(urls, folder, flags) as scorer:
            is_tiny = (params.model.base if params else base or TINY) == TINY
            session = DemoSession(painter, _shown(painter, params), scorer, folder, is_tiny)
            ask_this_machine_directly()  # Gradio asks its own page whether it is there
            layout.Page(session, examples, _about(run_folder)).launch(host, port)
            if not is_loopback(host):
                logger.warning(
                    "The page has no password: whoever reaches %s on port %d may paint, and read"
                    " what was uploaded. --host 127.0.0.1 keeps it to this machine.",
                    host,
                    port,
                )
            print(f"The page is at {url_of(host, port)} (Ctrl-C ends it).", flush=True)
            threading.Event().wait()


def _layout(folder: Path) -> ModuleType:
    """`flows.demo.page`. Set before gradio reads it: no telemetry, a folder of our own."""
    os.environ |= {"GRADIO_ANALYTICS_ENABLED": "False", "GRADIO_TEMP_DIR": str(folder / "gradio")}
    try:
        from flows.demo import page as demo_page
    except ModuleNotFoundError as error:
        if error.name != "gradio":
            raise
        raise ParamsError(
            "The page needs the package gradio: `pip install 'gradio>=6.31,<7'`, or in the"
            " repository `pip install -e '.[demo]'`."
        ) from None
    return demo_page


def _check_port(host: str, port: int) -> None:
    try:
        socket.create_server((host, port)).close()
    except (OSError, OverflowError) as error:
        raise ParamsError(
            f"--host and --port must be free to listen on. Got {host}:{port}: {error}."
        ) from None


def example_cases(data: DataParams, folder: Path, pictures: Path | None) -> list[Case]:
    """Return the first held-out cases; none where they are not on this disk.

    Tiny ones are drawn into `folder`. `pictures` is where runs keep the pictures of tables.
    """
    where = data.evaluation
    if where == TINY:
        from calligrapher.tiny.world import write_bench

        write_bench(folder / "examples", num_cases=NUM_EXAMPLES, split="evaluation", seed=0)
        where = str(folder / "examples")
    try:
        return load_cases(where, data.kind, pictures, data.columns)[:NUM_EXAMPLES] if where else []
    except DataError as error:
        logger.warning("The page shows no examples. %s", error)
        return []


def _shown(painter: Painter, params: RunParams | None) -> list[str]:
    """The variants, without the warm-up where there was none: it is the base once more."""
    no_warm_up = params is not None and params.warmup.steps == 0
    return [variant for variant in painter.variants if not (variant == WARMUP and no_warm_up)]


def _about(run: Path | None) -> str:
    """What the page says of the model that it shows."""
    if run:
        return f"What the model of the run **{run.name}** paints, before and after its training."
    return (
        "What the model paints as it is. To see it trained as well: `make demo`, then "
        "`calligrapher demo --run demo`."
    )
