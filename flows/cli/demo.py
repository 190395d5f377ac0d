"""The command `calligrapher demo`: a page in the browser to try a model on."""

import argparse
from pathlib import Path


def add_demo_commands(commands: argparse._SubParsersAction) -> None:
    """Add demo."""
    demo = commands.add_parser(
        "demo", help="a page to try a model on: paint a mask, give a style and a text"
    )
    demo.add_argument(
        "--run", help="a run: its folder, its name, or an artifact's path or MLflow URI"
    )
    demo.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="where names are looked up"
    )
    demo.add_argument(
        "--base", help="folder of a diffusers FLUX.1-Fill; default: the embedded tiny model"
    )
    demo.add_argument("--siglip", help="folder of its SigLIP")
    demo.add_argument("--adapter", help="its adapter's weights")
    demo.add_argument(
        "--reward-url",
        action="append",
        default=[],
        dest="reward_urls",
        help="a reward server (again for more); default: the run's, or one of our own",
    )
    demo.add_argument(
        "--host", default="127.0.0.1", help="there is no password: who reaches it may paint"
    )
    demo.add_argument("--port", type=int, default=7860)
    demo.set_defaults(command=_demo)


def _demo(chosen: argparse.Namespace) -> int:
    from flows.demo.server import serve

    options = vars(chosen)
    del options["command"]
    serve(**options)
    return 0
