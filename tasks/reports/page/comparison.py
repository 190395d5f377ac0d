"""Several runs in one report: what they were told, how they learned, how they end."""

from itertools import pairwise

from tasks.pipeline import stage_of
from tasks.reports.compare import Comparison, compare
from tasks.reports.page.charts import Curve, line_chart
from tasks.reports.page.elements import MISSING, Html, el, table
from tasks.reports.page.facts import RunFacts
from tasks.reports.page.samples import case_samples, held_out_cases, side_by_side
from tasks.reports.page.sections import ACCURACY, first_and_last, written
from tasks.reports.words import duration


def comparison(runs: list[RunFacts]) -> Html:
    """Return a table of the runs, the params that differ, curves on one chart, and the same cases
    at each run's end. Differences are those to the first run."""
    found = {facts.name: compare(runs[0].folder, facts.folder) for facts in runs[1:]}
    return el(
        "article",
        el("h2", "Comparison"),
        _overview(runs, found),
        el("h3", "Params that differ"),
        _params(runs, found),
        el("h3", "Curves"),
        _curves(runs),
        el("h3", "The same cases, at the end of each run"),
        _cases(runs),
        id="comparison",
    )


def _overview(runs: list[RunFacts], found: dict[str, Comparison]) -> Html:
    rows = []
    for i, facts in enumerate(runs):
        first, last = first_and_last(facts, "ocr_accuracy")
        style = next(filter(None, reversed(first_and_last(facts, "style_score"))), MISSING)
        seconds = sum(s.seconds or 0 for s in facts.status.stages if stage_of(s.name) != "evaluate")
        name = el("a", facts.name, href=f"#run-{i}", class_=f"key c{i}")
        done = f"{facts.status.rounds_done} of {facts.status.rounds}"
        minus = _difference(found[facts.name]) if i else MISSING
        cells = (name, facts.params.algorithm, done, first or MISSING, last or MISSING, minus)
        rows.append((*cells, style, duration(seconds)))
    accuracy = ("held-out before", "after", "minus the first")
    return table(("run", "algorithm", "rounds", *accuracy, "style after", "training"), rows)


def _difference(found: Comparison) -> str:
    if "ocr_accuracy" not in found.difference:
        return found.reason or "not measured"
    mean, low, high = found.difference["ocr_accuracy"]
    return f"{mean:+.3f} [{low:+.3f}, {high:+.3f}]"


def _params(runs: list[RunFacts], found: dict[str, Comparison]) -> Html:
    keys = sorted({key for each in found.values() for key in each.params})
    if not keys:
        return el("p", "None.", class_="quiet")
    rows = []
    for key in keys:
        told = next(each.params[key] for each in found.values() if key in each.params)
        others = [each.params[key][1] if key in each.params else told[0] for each in found.values()]
        rows.append((el("code", key), *map(written, (told[0], *others))))
    return table(("key", *(facts.name for facts in runs)), rows)


def _curves(runs: list[RunFacts]) -> Html:
    def overlaid(title: str, key: str, xlabel: str) -> Html | None:
        lines = [
            Curve(facts.name, facts.history(key), facts.intervals(key), i)
            for i, facts in enumerate(runs)
        ]
        return line_chart(title, lines, xlabel)

    shown = [
        overlaid("Held-out OCR accuracy, 95 % intervals", ACCURACY, "rounds done"),
        overlaid("Held-out reward, 95 % intervals", "evaluate/reward", "rounds done"),
        overlaid("Mean training reward", "score/reward_mean", "round"),
        overlaid("Share of groups without spread", "advantage/zero_spread_share", "round"),
    ]
    return el("div", *shown, class_="charts")


def _cases(runs: list[RunFacts]) -> Html:
    shown = [facts for facts in runs if facts.shown_cases]
    columns = {
        facts.name: case_samples(facts, facts.shown_cases[max(facts.shown_cases)])
        for facts in shown
    }
    alike = all(a.keys() & b.keys() for a, b in pairwise(columns.values()))
    if len(columns) < 2 or not alike:
        return el("p", "The runs show no cases in common.", class_="quiet")
    return side_by_side(held_out_cases(shown[0]), columns)
