"""The commands that look at the folder of a run, or make stages of it anew in a fork."""

import argparse
import json
import sys
from contextlib import nullcontext
from pathlib import Path

from calligrapher.errors import ParamsError
from flows.cli.output import add_json, show


def add_run_commands(commands: argparse._SubParsersAction) -> None:
    """Add status, why, verify, gc, rerun and replay."""
    status = _add(commands, "status", _status, "what a run has done, is doing and has still to do")
    add_json(status)
    status.add_argument(
        "--verify", action="store_true", help="also read every byte, as `verify` does"
    )

    why = _add(
        commands, "why", _why, "why a stage is not what the params would make now (exit status 1)"
    )
    _stage_and_settings(why, "params to compare with")
    add_json(why)

    verify = _add(
        commands,
        "verify",
        _verify,
        "read every byte of a run and name what is damaged (exit status 1)",
    )
    add_json(verify)

    gc = _add(commands, "gc", _gc, "delete the weights that retention does not keep, and leftovers")
    gc.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as retention.keep_last=1")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be deleted")
    add_json(gc)

    rerun = _add(commands, "rerun", _rerun, "make a stage anew, in a fork that shares the rest")
    _stage_and_settings(rerun, "changed params")
    rerun.set_defaults(resumes=True)
    rerun.add_argument("--fork", required=True, metavar="NAME", help="name of the new run")
    rerun.add_argument(
        "--downstream", action="store_true", help="also all that is made from the stage"
    )

    replay = _add(
        commands, "replay", _replay, "train anew, in a fork, on the images that a run sampled"
    )
    replay.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="changed params")
    replay.set_defaults(resumes=True)
    replay.add_argument("--fork", required=True, metavar="NAME", help="name of the new run")


def _add(
    commands: argparse._SubParsersAction, name: str, command, text: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=text)
    parser.add_argument(
        "run", help="a run: its folder, its name, or an artifact's path or MLflow URI"
    )
    parser.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="where names are looked up"
    )
    parser.set_defaults(command=command)
    return parser


def _stage_and_settings(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "settings", nargs="*", metavar="STAGE|KEY=VALUE", help=f"as round-0003/update; {what}"
    )


def _split(settings: list[str]) -> tuple[str | None, list[str]]:
    """The stage, if one is named, and the overrides."""
    stages = [setting for setting in settings if "=" not in setting]
    if len(stages) > 1:
        raise ParamsError(f"at most one stage can be named. Got {', '.join(stages)}.")
    return (stages or [None])[0], [setting for setting in settings if "=" in setting]


def _located(chosen: argparse.Namespace) -> tuple[Path, str | None]:
    from tasks.tracking.locate import locate

    return locate(chosen.run, chosen.runs_dir)


def _status(chosen: argparse.Namespace) -> int:
    from tasks.reports.status import status
    from tasks.reports.verify import verify

    folder, _ = _located(chosen)
    found = status(folder)
    show(found, found.text, as_json=chosen.json)
    if not chosen.verify:
        return 0
    read = verify(folder)
    print(read.text(), file=sys.stderr if chosen.json else sys.stdout)
    return 1 if read.problems else 0


def _why(chosen: argparse.Namespace) -> int:
    from tasks.reports.why import why

    (folder, named), (stage, overrides) = _located(chosen), _split(chosen.settings)
    if not (stage or named):
        raise ParamsError("why needs a stage, as round-0003/update.")
    found = why(folder, stage or named, overrides, folder.parent / "data")
    show(found, found.text, as_json=chosen.json)
    return 1 if found.reasons else 0


def _verify(chosen: argparse.Namespace) -> int:
    from tasks.reports.verify import verify

    found = verify(_located(chosen)[0])
    show(found, found.text, as_json=chosen.json)
    return 1 if found.problems else 0


def _gc(chosen: argparse.Namespace) -> int:
    from tasks.artifacts.layout import PARAMS
    from tasks.artifacts.run_dir import RunDir
    from tasks.params.run_params import load_params
    from tasks.runs.overrides import refuse_others
    from tasks.runs.retention import clean_up

    folder, _ = _located(chosen)
    refuse_others(chosen.settings, "retention")
    params = load_params(folder / PARAMS, chosen.settings)
    run_dir = RunDir(folder)
    with nullcontext() if chosen.dry_run else run_dir.lock():
        found = clean_up(run_dir, params.retention, dry_run=chosen.dry_run)

    def text() -> str:
        verb = "would be freed" if chosen.dry_run else "were freed"
        freed = sum(garbage.freed for garbage in found)
        lines = [f"{garbage.freed:>12}  {garbage.why:<20}  {garbage.path}" for garbage in found]
        return "\n".join([*lines, f"{freed} bytes in {len(found)} files {verb}."])

    show(found, text, as_json=chosen.json)
    return 0


def _rerun(chosen: argparse.Namespace) -> int:
    from flows.rerun import rerun

    stage, overrides = _split(chosen.settings)
    found = rerun(chosen.run, stage, overrides, chosen.fork, chosen.downstream, chosen.runs_dir)
    print(json.dumps(found, indent=1))
    return 0


def _replay(chosen: argparse.Namespace) -> int:
    from flows.rerun import replay

    found = replay(chosen.run, _split(chosen.settings)[1], chosen.fork, chosen.runs_dir)
    print(json.dumps(found, indent=1))
    return 0
