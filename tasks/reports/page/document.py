"""The file itself: `write_report([folder], Path("report.html"))`."""

import base64
import datetime
import hashlib
from collections.abc import Sequence
from pathlib import Path

from calligrapher.durable import atomic_write
from tasks.reports.page.comparison import comparison
from tasks.reports.page.elements import Html, el, joined
from tasks.reports.page.facts import RunFacts
from tasks.reports.page.sections import run_section

REPORT_FILE = "report.html"
_HERE = Path(__file__).parent


def write_report(runs: Sequence[Path], out: Path) -> None:
    """Write one HTML file that tells the runs in the folders `runs`; several are also compared.

    Raises ArtifactError where a folder is no run.
    """
    facts = [RunFacts(folder) for folder in runs]
    out.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(out, document(facts).encode())


def document(runs: Sequence[RunFacts]) -> Html:
    """Return the whole page. It forbids its browser to ask anybody for anything."""
    style = Html((_HERE / "report.css").read_text())
    script = Html((_HERE / "report.js").read_text())
    known = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{known}'"
    )
    title = ", ".join(facts.name for facts in runs)
    now = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    head = el(
        "head",
        el("meta", charset="utf-8"),
        el("meta", http_equiv="Content-Security-Policy", content=policy),
        el("meta", name="viewport", content="width=device-width, initial-scale=1"),
        el("title", f"Calligrapher: {title}"),
        el("style", style),
    )
    links = [el("a", facts.name, href=f"#run-{i}") for i, facts in enumerate(runs)]
    several = len(runs) > 1
    body = el(
        "body",
        el("header", el("h1", "Calligrapher RL"), el("p", f"{title}, as of {now}")),
        el("nav", el("a", "Comparison", href="#comparison"), *links) if several else None,
        el(
            "main",
            comparison(list(runs)) if several else None,
            *(run_section(facts, f"run-{i}") for i, facts in enumerate(runs)),
        ),
        el("script", script),
    )
    return joined([Html("<!doctype html>\n"), el("html", head, body, lang="en")])
