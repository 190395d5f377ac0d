"""What a report tells of one run: its origin, curves, pictures, and what each stage took."""

import json
from collections import defaultdict
from itertools import count
from typing import Any

from tasks.artifacts.artifact import Artifact
from tasks.params.listing import changed
from tasks.pipeline import ROUND, STAGES, stage_of
from tasks.reports.page.alarms import alarms
from tasks.reports.page.charts import Curve, line_chart
from tasks.reports.page.elements import Html, el, joined, number, table
from tasks.reports.page.facts import RunFacts
from tasks.reports.page.letters import letters
from tasks.reports.page.samples import (
    before_and_after,
    best_and_worst,
    grids,
    groups_without_spread,
    histograms,
)
from tasks.reports.words import duration, size

ACCURACY = "evaluate/ocr_accuracy"
_OF_STEPS = (
    "loss",
    "kl",
    "grad_norm",
    "old_distance",
    "approx_kl",
    "clip_fraction",
    "learning_rate",
)


def run_section(facts: RunFacts, anchor: str) -> Html:
    """Return all that the report tells of one run."""
    told = alarms(facts)
    parts = {
        "Alarms": el("ul", *(el("li", text) for text in told), class_="alarms") if told else None,
        "Before and after": before_and_after(facts),
        "Curves": curves(facts),
        "The same cases over the rounds": grids(facts),
        "Best and worst samples": best_and_worst(facts),
        "Rewards by round": histograms(facts),
        "Groups without spread": groups_without_spread(facts),
        "Letters": letters(facts),
        "Time and memory": stages(facts),
        "Made from": origin(facts),
        "Params that differ from the defaults": params(facts),
    }
    return el(
        "article",
        el("h2", facts.name),
        headline(facts),
        *(joined([el("h3", title), part]) for title, part in parts.items() if part),
        id=anchor,
    )


def headline(facts: RunFacts) -> Html:
    """Return what the run is and what it reached, in a few sentences."""
    now = facts.status
    seconds = sum(s.seconds or 0 for s in now.stages if stage_of(s.name) != "evaluate")
    images = sum(map(len, facts.scored.values()))
    measures = {"Held-out OCR accuracy": "ocr_accuracy", "Held-out style": "style_score"}
    reached = {
        name: " → ".join(text for text in first_and_last(facts, key) if text)
        for name, key in measures.items()
    }
    done = f"{now.rounds_done} of {now.rounds} rounds, {now.state}"
    spent = f"{duration(seconds)} of training, {size(now.bytes)}"
    said = el("p", f"{now.algorithm}, {done}; {images:,} images, {spent}")
    return joined(
        [
            *(
                el("p", f"{name} ", el("b", figures), class_="reached")
                for name, figures in reached.items()
                if figures
            ),
            said,
        ]
    )


def first_and_last(facts: RunFacts, key: str) -> tuple[str | None, str | None]:
    """Return the first and the last held-out `key` with 95 % intervals; None: not measured."""
    measured = [a.meta for _, a in sorted(facts.evaluations.items()) if key in a.meta]
    told = [f"{m[key]:.3f} [{m[f'{key}_low']:.3f}, {m[f'{key}_high']:.3f}]" for m in measured]
    return (told[0] if told else None, told[-1] if len(told) > 1 else None)


def curves(facts: RunFacts) -> Html:
    """Return a chart for each thing that was measured over the rounds or optimizer steps."""

    def lines(title: str, keys: dict[str, str], xlabel: str = "rounds done") -> Html | None:
        colours = count()
        found = [
            Curve(name, facts.history(key), facts.intervals(key), next(colours))
            for name, key in keys.items()
            if facts.history(key)
        ]
        return line_chart(title, found, xlabel)

    held_out = [k for k in facts.keys("evaluate/") if f"{k}_low" in facts.keys("evaluate/")]
    others = {k.partition("/")[2]: k for k in held_out if k not in (ACCURACY, "evaluate/reward")}
    components = {
        key.partition("/")[2].removesuffix("_mean"): key
        for key in facts.keys("score/")
        if key.endswith("_mean") and key != "score/reward_mean"
    }
    reward = Curve(
        "mean reward",
        facts.history("score/reward_mean"),
        _band(facts, "score/reward_p10", "score/reward_p90"),
    )
    shown = [
        lines("Held-out OCR accuracy, 95 % interval", {"accuracy": ACCURACY}),
        line_chart(
            f"Training reward (highest: {facts.highest_reward:g}), 10th to 90th percentile",
            [reward],
            "round",
        ),
        lines("Held-out: the other measures", others),
        lines("Held-out reward", {"reward": "evaluate/reward"}),
        lines("Components of the training reward", components, "round"),
        lines("Share of groups without spread", {"share": "advantage/zero_spread_share"}, "round"),
        lines("warm-up: loss", {"loss": "warmup/loss"}, "optimizer step"),
        *(
            lines(f"update: {name}", {name: f"update/{name}"}, "optimizer step")
            for name in _OF_STEPS
        ),
    ]
    if not any(shown):
        return el("p", "Nothing was measured yet.", class_="quiet")
    return el("div", *shown, class_="charts")


def stages(facts: RunFacts) -> Html:
    """Return what each stage took: seconds, share, speed, GPU memory, disk."""
    made: dict[str, list[Any]] = defaultdict(list)
    for stage in facts.status.stages:
        if stage.seconds is not None:
            made[stage.name.rpartition("/")[2]].append(stage)
    total = sum(s.seconds for found in made.values() for s in found) or 1
    rows = []
    order = ("warmup", *ROUND, "evaluate", "preview")
    for name in (name for name in order if name in made):
        seconds = sum(stage.seconds for stage in made[name])
        speed = [value for _, value in facts.history(f"time/{name}_images_per_second")]
        memory = [value for _, value in facts.history(f"time/{name}_gpu_peak_gib")]
        share = seconds / total
        bar = el("div", el("i", style=f"width:{100 * share:.1f}%"), class_="share")
        rows.append(
            (
                name,
                bar,
                f"{share:.0%}",
                len(made[name]),
                duration(seconds),
                f"{seconds / len(made[name]):.1f} s",
                number(sum(speed) / len(speed) if speed else None),
                number(max(memory, default=None)),
                size(sum(stage.bytes for stage in made[name])),
            )
        )
    if not rows:
        return el("p", "No stage is finished yet.", class_="quiet")
    head = ("stage", "", "share", "made", "time", "each", "images/s", "GPU peak GiB", "disk")
    return table(head, rows, numbers=7)


def origin(facts: RunFacts) -> Html:
    """Return model, data, code, machine, scorers, and the runs before and after this one."""
    given, made = facts.params, facts.artifacts
    rows: list[tuple[str, Any]] = []
    digests: dict[str, str] = {}
    for artifact in made.values():
        digests |= {key: artifact.inputs[key] for key in _outside() if key in artifact.inputs}
    model = f"{given.model.base}, adapter {given.model.initial_adapter}"
    rows.append(("model", _with_digest(model, digests.get("model"))))
    rows.append(("training cases", _with_digest(given.data.train, digests.get("train_data"))))
    if given.data.evaluation is not None:
        held_out = _with_digest(given.data.evaluation, digests.get("evaluation_data"))
        rows.append(("held-out cases", held_out))
    rows += [("scored by", text) for text in _scorers(made)]
    rows += [("code and machine", text) for text in _code(made)]
    updates = [(name, a) for name, a in made.items() if a.stage == "update"]
    if updates:
        name, newest = updates[-1]
        rows.append(("newest checkpoint", _with_digest(name, newest.digest)))
    if facts.verdicts and (best := [v for v in facts.verdicts if v["champion"]]):
        rows.append(("champion", best[-1]["checkpoint"]))
    rows += [(f"{name} is a", fork.described()) for name, fork in facts.parents]
    rows += [("forked as", f"{name}: {fork.described()}") for name, fork in facts.forks]
    return table(("", ""), rows)


def params(facts: RunFacts) -> Html:
    """Return the keys whose values are not the defaults."""
    rows = [
        (el("code", key), written(value), "must be given" if default is None else default)
        for key, value, default in changed(facts.params)
    ]
    return table(("key", "value", "default"), rows)


def written(value: Any) -> str:
    """Return a value as a params file has it."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)


def _band(facts: RunFacts, low: str, high: str) -> list[tuple[int, float, float]]:
    lows, highs = dict(facts.history(low)), dict(facts.history(high))
    return [(step, lows[step], highs[step]) for step in sorted(lows.keys() & highs.keys())]


def _outside() -> set[str]:
    return {source for stage in STAGES.values() for source in stage.outside}


def _with_digest(what: str, digest: str | None) -> Html:
    return joined([what, el("small", f" {digest[:16]}", class_="quiet") if digest else None])


def _scorers(made: dict[str, Artifact]) -> list[str]:
    found = [
        a.manifest.extra["scored_by"] for a in made.values() if "scored_by" in a.manifest.extra
    ]
    return list(dict.fromkeys(json.dumps(scorer, ensure_ascii=False) for scorer in found))


def _code(made: dict[str, Artifact]) -> list[str]:
    codes = (a.manifest.code for a in made.values())
    return list(dict.fromkeys(", ".join(f"{k} {v}" for k, v in code.items()) for code in codes))
