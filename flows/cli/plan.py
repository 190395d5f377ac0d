"""The command `plan`: what a run needs, reckoned before anything is loaded."""

import argparse

from flows.cli.output import add_json, show


def add_plan_commands(commands: argparse._SubParsersAction) -> None:
    """Add plan."""
    plan = commands.add_parser(
        "plan", help="what a run needs of a GPU, a disk and time; no weights needed"
    )
    plan.add_argument(
        "params", help="a YAML file, as params/nft.yaml, or the name of a shipped one"
    )
    plan.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="any dotted key, as for train"
    )
    plan.add_argument("--gpu", help="h100 (default), h200, a100-80, a100-40, l40s, 4090")
    plan.add_argument(
        "--gpu-memory", type=float, metavar="GIB", help="instead: its memory as PyTorch reports it"
    )
    plan.add_argument(
        "--tflops", type=float, help="10^12 operations a second of a GPU: adds a round's time"
    )
    plan.add_argument("--bandwidth", type=float, help="GB/s of a rank's links, for ddp's sums")
    plan.add_argument("--price", type=float, help="of a GPU hour")
    plan.add_argument("--scale", action="store_true", help="that for 1 to 512 GPUs alone")
    add_json(plan)
    plan.set_defaults(command=_plan)


def _plan(chosen: argparse.Namespace) -> int:
    from tasks.params.files import find_params_file
    from tasks.planning.gpu_fit import capacity
    from tasks.planning.run_plan import make_plan
    from tasks.planning.scale import check_rates, scale_table

    rates = (chosen.tflops, chosen.bandwidth, chosen.price)
    check_rates(*rates, needed=chosen.scale, as_json=chosen.json)
    if chosen.scale:
        print(scale_table(find_params_file(chosen.params), chosen.settings, *rates))
        return 0
    gpu = capacity(chosen.gpu, chosen.gpu_memory)
    found = make_plan(find_params_file(chosen.params), chosen.settings, *gpu)
    show(found.as_json(), found.text, as_json=chosen.json)
    if chosen.tflops is not None:
        print(
            "\n" + scale_table(find_params_file(chosen.params), chosen.settings, *rates, own=True)
        )
    return 0 if found.fits else 1
