"""The commands that list and compare: all keys of the params, all runs, two runs; and evaluate."""

import argparse
from pathlib import Path

from flows.cli.data import positive
from flows.cli.output import add_json, show


def add_look_commands(commands: argparse._SubParsersAction) -> None:
    """Add params, runs, compare and evaluate."""
    params = commands.add_parser(
        "params", help="every key of a params file: default, bounds, meaning"
    )
    params.add_argument("key", nargs="?", default="", help="a key or a section; default: all")
    add_json(params)
    params.set_defaults(command=_params)

    runs = commands.add_parser("runs", help="all runs, one line each")
    runs.add_argument("--runs-dir", type=Path, default=Path("runs"))
    add_json(runs)
    runs.set_defaults(command=_runs)

    compare = commands.add_parser("compare", help="two runs: params, curves, last evaluations")
    for name in ("first", "second"):
        compare.add_argument(name, help="a run: its folder or its name")
    compare.add_argument("--runs-dir", type=Path, default=Path("runs"))
    add_json(compare)
    compare.set_defaults(command=_compare)

    best = commands.add_parser(
        "best", help="the images that a round rewarded most, with what each was paid for"
    )
    best.add_argument("run", help="a run: its folder or its name")
    best.add_argument("round", nargs="?", help="as round-0003; default: the newest with scores")
    best.add_argument("--num", type=positive, default=48, help="images; default 48")
    best.add_argument("--out", type=Path, help="a PNG file; default: RUN/report/best/ROUND.png")
    best.add_argument("--runs-dir", type=Path, default=Path("runs"))
    add_json(best)
    best.set_defaults(command=_best)

    evaluate = commands.add_parser(
        "evaluate", help="measure a checkpoint on the held-out cases, beside those before it"
    )
    evaluate.add_argument("run", help="a run: its folder or its name")
    evaluate.add_argument(
        "checkpoint", nargs="?", help="its round, as round-0003; default: the newest"
    )
    evaluate.add_argument("--runs-dir", type=Path, default=Path("runs"))
    evaluate.add_argument(
        "--params", default="evaluate", help="how: a YAML file, or the name of a shipped one"
    )
    add_json(evaluate)
    evaluate.set_defaults(command=_evaluate, resumes=True)


def _params(chosen: argparse.Namespace) -> int:
    from tasks.params.listing import find_keys

    keys = find_keys(chosen.key)
    show(keys, lambda: "\n".join(key.text() for key in keys), as_json=chosen.json)
    return 0


def _runs(chosen: argparse.Namespace) -> int:
    from tasks.reports.listing import as_table, list_runs

    lines = list_runs(chosen.runs_dir)
    show(lines, lambda: as_table(lines, chosen.runs_dir), as_json=chosen.json)
    return 0


def _compare(chosen: argparse.Namespace) -> int:
    from tasks.reports.compare import compare
    from tasks.tracking.locate import locate

    folders = [locate(run, chosen.runs_dir)[0] for run in (chosen.first, chosen.second)]
    found = compare(*folders)
    show(found, found.text, as_json=chosen.json)
    return 0


def _best(chosen: argparse.Namespace) -> int:
    from calligrapher.durable import atomic_path
    from tasks.reports.best_rewarded import best_of_round
    from tasks.tracking.locate import locate

    folder, artifact = locate(chosen.run, chosen.runs_dir)
    named = chosen.round or (artifact and artifact.partition("/")[0])
    sheet, shown = best_of_round(folder, named, num=chosen.num)
    out = chosen.out or folder / "report" / "best" / f"{shown}.png"
    out.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(out) as temporary:
        sheet.save(temporary, "PNG")
    show({"round": shown, "sheet": out}, lambda: str(out), as_json=chosen.json)
    return 0


def _evaluate(chosen: argparse.Namespace) -> int:
    from flows.contexts import our_logs
    from flows.evaluate import evaluate_here
    from tasks.tracking.locate import locate

    our_logs()
    folder, artifact = locate(chosen.run, chosen.runs_dir)
    verdict, report = evaluate_here(folder, chosen.checkpoint or artifact, chosen.params)
    show(verdict, lambda: report, as_json=chosen.json)
    return 0
