"""The command `calligrapher`: train, serve rewards, look at runs, paint.

calligrapher train tiny-nft|FILE [run=NAME] [runs_dir=DIR] [rounds=5 ...] [--dry-run]
calligrapher init NAME --gpu 80|8x80|... --algorithm nft|grpo
calligrapher plan nft|FILE [KEY=VALUE ...] [--gpu h100 | --gpu-memory GIB] [--json]
calligrapher doctor nft|FILE [KEY=VALUE ...] [--ranks N] [--json]
calligrapher reward-server [--gpu-ids 0,1] [--port 8000] ...
calligrapher runs
calligrapher status|verify|gc|sync RUN
calligrapher evaluate RUN [round-0003]
calligrapher compare RUN RUN
calligrapher report RUN [RUN ...] [--out FILE]
calligrapher params [KEY]
calligrapher why RUN STAGE [KEY=VALUE ...]
calligrapher rerun RUN STAGE [KEY=VALUE ...] --fork NAME [--downstream]
calligrapher replay RUN [KEY=VALUE ...] --fork NAME
calligrapher data check DIR|FILE [--sheet sheet.png]
calligrapher data make PICTURES OUT
calligrapher data draw FONTS WORDS OUT
calligrapher data split DIR|FILE OUT [--held-out 0.1]
calligrapher convert WEIGHTS TARGET [--weights ema|trained] [--lora merged|separate] ...
calligrapher convert RUN TARGET --to diffusers-lora|kohya-lora|adapter-safetensors|hub
calligrapher generate --image IMG --mask MASK --reference REF --text TEXT [--run RUN] --out DIR
calligrapher generate --size WxH [--color #fff] --reference REF --text TEXT [--run RUN] --out DIR
calligrapher demo [--run RUN] [--base FOLDER --siglip FOLDER] [--adapter FILE] ...
calligrapher tiny pretrain OUT
calligrapher tiny cases OUT
calligrapher completion bash|zsh
"""

import argparse
import contextlib
import errno
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path

from calligrapher import __version__
from calligrapher.errors import CalligrapherError
from calligrapher.threads import wait_asleep
from flows.cli.completion import add_completion_commands
from flows.cli.convert import add_convert_commands
from flows.cli.data import add_data_commands, count, positive
from flows.cli.demo import add_demo_commands
from flows.cli.doctor import add_doctor_commands
from flows.cli.generate import add_generate_commands
from flows.cli.init import add_init_commands
from flows.cli.look import add_look_commands
from flows.cli.measures import add_measures_commands
from flows.cli.output import add_json, show
from flows.cli.plan import add_plan_commands
from flows.cli.report import add_report_commands
from flows.cli.runs import add_run_commands
from flows.cli.settings import split_settings

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}  # told without the name of a file
ONLY_PRINT = {"compare", "completion", "data", "params", "plan", "runs", "status", "verify", "why"}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit status; a user's mistake is one line on stderr."""
    sys.stdout.reconfigure(errors="backslashreplace")  # A file's name may be no UTF-8.
    wait_asleep()
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] in (["reward-server"], ["run_server"]):
        from reward_server.processes.launch import main as reward_server

        return reward_server(arguments[1:])
    chosen = parsed(arguments)
    what = vars(chosen).pop("what")
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", datefmt="%H:%M:%S"
    )
    for noisy in ("httpx", "alembic", "diffusers", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        with _ending_with_the_reader() if what in ONLY_PRINT else nullcontext():
            return chosen.command(chosen)
    except CalligrapherError as error:
        print("\n".join([f"{type(error).__name__}: {error}", *_notes(error)]), file=sys.stderr)
        return 2
    except OSError as error:
        if error.filename is None and error.errno not in _FULL:
            raise
        where = f"{error.filename} must be usable" if error.filename else "The disk must have room"
        print("\n".join([f"{where}. Found: {error.strerror}.", *_notes(error)]), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        goes_on = " The same command goes on from here." if hasattr(chosen, "resumes") else ""
        print(f"Stopped.{goes_on}", file=sys.stderr)
        return 130


def _notes(error: BaseException) -> list[str]:
    return getattr(error, "__notes__", [])


@contextmanager
def _ending_with_the_reader() -> Iterator[None]:
    """What is printed to `| head`, which has seen enough, ends the process in silence."""
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        yield
        sys.stdout.flush()
    finally:
        signal.signal(signal.SIGPIPE, before)


def parsed(arguments: list[str]) -> argparse.Namespace:
    """Return what the arguments choose; settings may stand before, between and after options."""
    parser = command_parser()
    chosen, rest = parser.parse_known_args(arguments)
    # argparse looks for positional arguments that may be none, as KEY=VALUE, up to the first option
    # alone, and leaves the later ones over.
    if rest and not (hasattr(chosen, "settings") and all(not r.startswith("-") for r in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        chosen.settings = [*chosen.settings, *rest]
    return chosen


def command_parser() -> argparse.ArgumentParser:
    """Return what reads the arguments of all commands; the reward server reads its own."""
    parser = argparse.ArgumentParser(
        prog="calligrapher",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="what")

    train = commands.add_parser("train", help="train a run, or go on with it")
    train.add_argument(
        "params", help="a YAML file, as params/tiny-nft.yaml, or the name of a shipped one"
    )
    train.add_argument(
        "settings", nargs="*", metavar="KEY=VALUE", help="run=, runs_dir= or any dotted key"
    )
    train.add_argument(
        "--dry-run", action="store_true", help="only say what would be made, in what time and room"
    )
    add_json(train)
    train.set_defaults(command=_train, resumes=True)

    commands.add_parser("reward-server", help="serve rewards (`calligrapher reward-server --help`)")

    sync = commands.add_parser(
        "sync", help="send what a run logged to its trackers again, without duplicates"
    )
    sync.add_argument("run", type=Path, help="the run's folder")
    sync.add_argument("--uri", help="MLflow store; default: where the run was tracked")
    sync.add_argument(
        "--to",
        nargs="+",
        default=(),
        metavar="TRACKER",
        help="mlflow, tensorboard, wandb; default: the run's own (tracking.backends)",
    )
    add_json(sync)
    sync.set_defaults(command=_sync)

    add_init_commands(commands)
    add_run_commands(commands)
    add_look_commands(commands)
    add_report_commands(commands)
    add_data_commands(commands)
    add_convert_commands(commands)
    add_generate_commands(commands)
    add_demo_commands(commands)
    add_plan_commands(commands)
    add_doctor_commands(commands)
    add_measures_commands(commands)

    add_completion_commands(commands, command_parser)
    tiny = commands.add_parser("tiny", help="the embedded tiny model").add_subparsers(
        required=True, metavar="WHAT"
    )
    pretrain = tiny.add_parser(
        "pretrain", help="train it from nothing (about an hour on two cores); resumes"
    )
    pretrain.add_argument("out", type=Path)
    pretrain.add_argument(
        "--start",
        type=Path,
        help="folder of a model that can spell, or 'tiny': transformer and adapter go on from there"
        " (about 15 minutes), the rest is kept",
    )
    pretrain.set_defaults(command=_pretrain, resumes=True)
    cases = tiny.add_parser("cases", help="draw cases in the bench layout")
    cases.add_argument("out", type=Path)
    cases.add_argument("--num", type=positive, default=64)
    cases.add_argument("--split", choices=("train", "evaluation"), default="evaluation")
    cases.add_argument("--seed", type=count, default=0)
    cases.set_defaults(command=_cases)
    return parser


def _train(chosen: argparse.Namespace) -> int:
    run, runs_dir, overrides = split_settings(chosen.settings)
    from tasks.launch.failures import log_of
    from tasks.launch.places import Launched, check_places
    from tasks.params.files import find_params_file
    from tasks.params.names import check_run_name
    from tasks.params.run_params import load_params
    from tasks.runs.preflight import preflight

    # The user's mistakes are told before anything is started.
    file = find_params_file(chosen.params)
    run = check_run_name(file.stem if run is None else run)
    launched = Launched.from_environment()
    if launched is not None and launched.rank > 0:
        from tasks.launch.joined import serve_parent

        return serve_parent(launched, log_of(runs_dir / run / "logs", launched.rank))
    params = load_params(file, overrides)
    preflight(params, runs_dir / "data", run=runs_dir / run)
    check_places(params, launched)
    if chosen.dry_run:
        from tasks.runs.dry_run import dry_run

        found = dry_run(params, runs_dir / run)
        show(found, found.text, as_json=chosen.json)
        return 0 if found.fits else 1
    from flows.services.prefect_api import QUIET, prefect_api

    for name, value in (QUIET | {"PREFECT_LOGGING_LEVEL": "WARNING"}).items():
        os.environ.setdefault(name, value)
    from flows.rl_train import rl_train
    from tasks.reports.summary import closing_lines

    for handler in logging.getLogger().handlers:
        handler.addFilter(_is_no_copy)
    try:
        with prefect_api():
            summary = rl_train(str(file), overrides, run, str(runs_dir))
    except (CalligrapherError, OSError):
        _keep_traceback(runs_dir / run)
        raise
    show(summary, lambda: "\n".join(closing_lines(summary, runs_dir)), as_json=chosen.json)
    return 1 if summary.reward_hacking else 0


def _is_no_copy(record: logging.LogRecord) -> bool:
    """Whether `record` says something new: Prefect logs each exception that goes on to `main`."""
    return not (
        record.name.startswith(("prefect.flow_runs", "prefect.task_runs"))
        and (record.levelno >= logging.ERROR)
    )


def _keep_traceback(folder: Path) -> None:
    """Append the exception at hand to `errors.log` in a run's folder, where there is one."""
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    with contextlib.suppress(OSError), (folder / "errors.log").open("a") as file:
        file.write(f"{now}\n{traceback.format_exc()}\n")


def _sync(chosen: argparse.Namespace) -> int:
    from tasks.tracking.mirror import sync

    places = sync(chosen.run, chosen.uri, chosen.to)
    complete = "\n".join(f"{place} is complete." for place in places)
    show({"complete": places}, lambda: complete, as_json=chosen.json)
    return 0


def _pretrain(chosen: argparse.Namespace) -> int:
    from calligrapher.tiny.pack import DATA, TINY
    from calligrapher.tiny.pretrain import Recipe, pretrain

    start = DATA if str(chosen.start) == TINY else chosen.start
    print(f"The model is in {pretrain(chosen.out, Recipe(), start=start)}.")
    return 0


def _cases(chosen: argparse.Namespace) -> int:
    from calligrapher.tiny.world import write_bench

    folder = write_bench(chosen.out, num_cases=chosen.num, split=chosen.split, seed=chosen.seed)
    print(f"{chosen.num} {chosen.split} cases are in {folder}.")
    return 0
