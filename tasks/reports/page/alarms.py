"""What is wrong with a run, or looks like it: one sentence each."""

from collections import Counter
from collections.abc import Iterator

from tasks.reports.page.facts import RunFacts

_NEWEST = 5  # rounds
_COUNTS = {
    "update/untaken_steps": "optimizer steps were not taken: no advantage differed from 0",
    "update/skipped_steps": "optimizer steps were skipped: their scaled gradients overflowed",
    "update/not_finite": "values of the update were NaN or infinite and left out",
    "warmup/not_finite": "values of the warm-up were NaN or infinite and left out",
}


def alarms(facts: RunFacts) -> list[str]:
    """Return all that a reader must know before believing the run; [] when all is well."""
    return list(_alarms(facts))


def _alarms(facts: RunFacts) -> Iterator[str]:
    now = facts.status
    if now.ended_by:
        done = f"{now.rounds_done} of {now.rounds} rounds"
        yield f"evaluate.stop_on_alarm ended the run after {done}: {now.ended_by} fell as it rose."
    elif now.state == "stopped":
        done = f"{now.rounds_done} of {now.rounds} rounds"
        yield f"The run is not finished: {done}, nobody works on it."
    for stage in now.stages:
        if stage.state == "damaged":
            yield f"{stage.name} is damaged: {stage.problem}"
    errors = facts.folder / "errors.log"
    lines = errors.read_text(errors="replace").split("\n") if errors.is_file() else []
    if told := [line for line in lines if line and not line.startswith((" ", "Traceback"))]:
        yield f"A start of the run ended with an error, the newest: {told[-1]}"
    for verdict in facts.verdicts:
        if verdict["reward_hacking"]:
            what = ", ".join(verdict["reward_hacking"])
            yield f"The reward may be gamed at {verdict['checkpoint']}: {what} falls as it rises."
    reasons = Counter(
        row["reason"] for rows in facts.scored.values() for row in rows if row["reward"] is None
    )
    if reasons:
        images = sum(map(len, facts.scored.values()))
        reason, count = reasons.most_common(1)[0]
        yield f"{reasons.total()} of {images} images have no reward; {count} of them: {reason}"
    newest = [value for _, value in facts.history("advantage/zero_spread_share")[-_NEWEST:]]
    if newest and (share := sum(newest) / len(newest)) > 0.5:
        yield (
            f"In the newest {len(newest)} rounds {share:.0%} of the groups have equal rewards and"
            " teach nothing."
        )
    for key, what in _COUNTS.items():
        if count := sum(value for _, value in facts.history(key)):
            yield f"{count:g} {what}."
