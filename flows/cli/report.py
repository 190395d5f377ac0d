"""The command `report`: one HTML file that tells what a run did, to look at or send."""

import argparse
from pathlib import Path

from flows.cli.output import add_json, show


def add_report_commands(commands: argparse._SubParsersAction) -> None:
    """Add report."""
    report = commands.add_parser(
        "report", help="one HTML file that tells a run, or compares several; needs no server"
    )
    report.add_argument("runs", nargs="+", metavar="RUN", help="a run: its folder or its name")
    report.add_argument(
        "--out", type=Path, help="default: report.html in the folder of the (first) run"
    )
    report.add_argument(
        "--runs-dir", type=Path, default=Path("runs"), help="where names are looked up"
    )
    add_json(report)
    report.set_defaults(command=_report)


def _report(chosen: argparse.Namespace) -> int:
    from tasks.reports.page.document import REPORT_FILE, write_report
    from tasks.tracking.locate import locate

    folders = [locate(run, chosen.runs_dir)[0] for run in chosen.runs]
    out = chosen.out or folders[0] / REPORT_FILE
    write_report(folders, out)
    size = out.stat().st_size
    show(
        {"report": out, "bytes": size},
        lambda: f"The report is {out} ({size / 1e6:.1f} MB).",
        as_json=chosen.json,
    )
    return 0
