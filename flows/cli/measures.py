"""The command `measures`: what each measure says of pictures whose worth is known."""

import argparse
import json
import sys
import tempfile
from pathlib import Path

from flows.cli.data import positive
from flows.cli.settings import split_settings


def add_measures_commands(commands: argparse._SubParsersAction) -> None:
    """Add measures."""
    measures = commands.add_parser(
        "measures", help="each measure on right, wrong, untouched and painted pictures"
    )
    measures.add_argument(
        "settings",
        nargs="*",
        metavar="PARAMS | KEY=VALUE",
        help="whose held-out cases, servers and SigLIP (default: the embedded model's, tiny-nft),"
        " and settings as for train",
    )
    measures.add_argument("--num", type=positive, default=32, help="cases; default 32")
    measures.add_argument("--no-paint", action="store_true", help="leave out the model's pictures")
    measures.add_argument(
        "--write", action="store_true", help="write style_scale.json into the SigLIP's folder"
    )
    measures.add_argument("--json", action="store_true", help="for programs")
    measures.set_defaults(command=_measures)


def _measures(chosen: argparse.Namespace) -> int:
    from calligrapher.durable import atomic_write
    from calligrapher.errors import ParamsError
    from flows.contexts import lazy_scorer, our_logs
    from reward_server.style_scale import STYLE_SCALE
    from tasks.artifacts.layout import RunsDir
    from tasks.evaluation.calibration import calibrate
    from tasks.params.files import find_params_file
    from tasks.params.run_params import RunParams, load_params
    from tasks.runs.run import resources_of
    from tasks.weights.checkpoints import siglip_folder

    our_logs()
    files = [word for word in chosen.settings if "=" not in word] or ["tiny-nft"]
    if len(files) > 1:
        raise ParamsError(f"PARAMS must be one file. Got {' and '.join(files)}.")
    _, runs_dir, overrides = split_settings([s for s in chosen.settings if "=" in s])
    members = ["evaluate.num_images_per_case=2", f"evaluate.num_cases={chosen.num}"]
    grid = [f"evaluate.grid_cases={min(chosen.num, 8)}"]
    params: RunParams = load_params(find_params_file(files[0]), [*overrides, *members, *grid])
    runs = RunsDir(runs_dir)
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        with lazy_scorer(params, folder, runs.data) as scorer:
            found = calibrate(
                resources_of(params, runs, scorer),
                folder,
                num_cases=chosen.num,
                paint=not chosen.no_paint,
            )
    print(json.dumps(found.to_json(), indent=1) if chosen.json else found.text())
    if chosen.write:
        path = siglip_folder(params.model.siglip) / STYLE_SCALE
        atomic_write(path, found.scale.text().encode())
        said = f"Written: {path}. Runs that were begun without it go on in a fork."
        print(said, file=sys.stderr)  # what is printed may be JSON
    return 0
