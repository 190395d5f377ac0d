"""The command `init`: a params file to begin with, for the GPUs that are there."""

import argparse
from pathlib import Path

# Those of tasks/planning/presets.py, which loads torch.
MACHINES = ("24", "48", "80", "8x24", "8x80")
ALGORITHMS = ("nft", "grpo")


def add_init_commands(commands: argparse._SubParsersAction) -> None:
    """Add init."""
    init = commands.add_parser(
        "init", help="write a commented params file of the full-size model that fits your GPUs"
    )
    init.add_argument("name", help="of the run: the file is NAME.yaml, in this folder")
    init.add_argument(
        "--gpu", required=True, choices=MACHINES, help="GB of a GPU, or how many x GB"
    )
    init.add_argument("--algorithm", required=True, choices=ALGORITHMS)
    init.set_defaults(command=_init)


def _init(chosen: argparse.Namespace) -> int:
    from tasks.params.names import check_run_name
    from tasks.planning.presets import write_preset

    file = Path(f"{check_run_name(chosen.name, 'NAME')}.yaml")
    print(write_preset(file, chosen.gpu, chosen.algorithm))
    print(f"Set its paths of model and data, then: calligrapher doctor {file}")
    return 0
