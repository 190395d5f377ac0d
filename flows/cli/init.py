"""The command `init`: a params file to begin with, for the GPUs that are there."""

import argparse
from pathlib import Path

from flows.cli.output import add_json, show

MACHINES = ("48", "80", "2x80", "4x48", "8x24", "8x48", "8x80")  # the usual ones, offered by shells
ALGORITHMS = ("nft", "grpo")  # those of tasks/planning/presets.py, which loads torch


def add_init_commands(commands: argparse._SubParsersAction) -> None:
    """Add init."""
    init = commands.add_parser(
        "init", help="write a commented params file of the full-size model that fits your GPUs"
    )
    init.add_argument("name", help="of the run: the file is NAME.yaml, in this folder")
    init.add_argument(
        "--gpu",
        dest="machine",
        metavar="GB",
        required=True,
        help="GB of a GPU (24, 40, 48, 80, 141), or how many x GB, such as 8x80",
    )
    init.add_argument("--algorithm", required=True, choices=ALGORITHMS)
    add_json(init)
    init.set_defaults(command=_init)


def _init(chosen: argparse.Namespace) -> int:
    from tasks.params.names import check_run_name
    from tasks.planning.presets import write_preset

    file = Path(f"{check_run_name(chosen.name, 'NAME')}.yaml")
    needs = write_preset(file, chosen.machine, chosen.algorithm)
    further = f"Set its paths of model and data, then: calligrapher doctor {file}"
    show({"params": file, "needs": needs}, lambda: f"{needs}\n{further}", as_json=chosen.json)
    return 0
