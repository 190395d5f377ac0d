"""The pipeline, once: its stages in order, what each is made from and reads, and who does it.

```
round_of("round-0003/update"), stage_of("round-0003/update")    # 3, "update"
parents("round-0003/score", staleness=0)                        # {"rollout": "round-0003/rollout"}
planned(params)                                                 # every artifact of a run, in order
```

Fingerprints, `rerun`, `why`, `gc` and the flow follow from the table `STAGES`; no other file lists
the stages. The version of a stage stands here: raise it when the same inputs give another result.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from calligrapher.errors import ParamsError
from calligrapher.sampling.exploration import Exploration
from tasks.artifacts.layout import (
    EVALUATE,
    PREVIEW,
    WARMUP,
    evaluation_name,
    round_name,
    round_number,
)
from tasks.artifacts.provenance import Provenance
from tasks.params.run_params import RunParams

Sources = Mapping[str, Callable[[], Any]]
"""What lies outside of a run, reckoned when asked for: the digest of `model`, `train_data`,
`evaluation_data`, and who scores (`scored_by`)."""


@dataclass(frozen=True)
class Input:
    """One artifact that a stage is made from: that of `stage`, some rounds ago.

    Before round 0 that is the warm-up's. samples: `rollout.staleness` rounds before that.
    """

    stage: str
    rounds_ago: int = 0
    samples: bool = False


@dataclass(frozen=True)
class Stage:
    """A row of the table.

    inputs: argument of the stage function -> the artifact that it is. outside: which `Sources` the
    result depends on, as inputs. reads: what of the params it depends on. decides: what else does.
    done_by: `ranks` have the model and get `Resources`; the `driver` gets the params alone.
    """

    name: str
    version: int
    inputs: Mapping[str, Input] = field(default_factory=dict)
    outside: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    decides: tuple[str, ...] = ()
    done_by: Literal["ranks", "driver"] = "ranks"


_OLD = Input("refresh", rounds_ago=1)
_SAMPLER = Input("refresh", rounds_ago=1, samples=True)

STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "warmup",
            version=1,
            outside=("model", "train_data"),
            reads=("seed", "model", "warmup", "reconstruct"),
        ),
        Stage(
            "rollout",
            version=1,
            inputs={"old": _SAMPLER},
            outside=("model", "train_data"),
            reads=("seed", "model", "rollout", "algorithm", "exploration", "refill_by"),
            decides=("round", "refilled_by"),
        ),
        Stage(
            "score",
            version=1,
            inputs={"rollout": Input("rollout")},
            outside=("train_data",),
            reads=("reward", "letters"),
            decides=("scored_by",),
        ),
        Stage(
            "advantage",
            version=1,
            inputs={"scores": Input("score")},
            reads=("advantage", "component_weights"),
            decides=("group_size",),
            done_by="driver",
        ),
        Stage(
            "update",
            version=1,
            inputs={
                "previous": Input("update", rounds_ago=1),
                "start": Input(WARMUP),
                "old": _SAMPLER,
                "rollout": Input("rollout"),
                "advantages": Input("advantage"),
            },
            outside=("model", "train_data"),
            reads=(
                "seed",
                "model",
                "update",
                "ema",
                "algorithm",
                "algorithm_section",
                "num_inference_steps",
                "horizon",
                "teaching_only",
                "update_version",
            ),
            decides=("round",),
        ),
        Stage(
            "refresh",
            version=1,
            inputs={"old": _OLD, "updated": Input("update")},
            reads=("algorithm", "old_policy"),
            done_by="driver",
        ),
        Stage(
            "evaluate",
            version=1,
            inputs={"checkpoint": Input("update")},
            outside=("model", "evaluation_data"),
            reads=("model", "evaluate", "reward", "num_inference_steps", "sampling_batch"),
            decides=("scored_by", "cases"),
        ),
    )
}
ROUND = tuple(name for name in STAGES if name not in (WARMUP, EVALUATE))
"""The stages of every round, in order; the warm-up comes before them, evaluations between."""
SAMPLED = ("rollout", "score")
"""Those that ranks can do by themselves which are set apart for it (`launch.rollout_processes`)."""


# What a stage reads --------------------------------------------------------------------------

# They say where and how fast, or name what an input digest stands for; no result depends on them.
_NO_RESULT: dict[str, set[str]] = {
    "model": {
        "base",
        "siglip",
        "initial_adapter",
        "device",
        "gradient_checkpointing",
        "offload_text_encoder_two",
        "attention_backend",
        "compile",
    },
    "warmup": {"checkpointing_steps"},
    "reward": {
        "server_urls",
        "server_host",
        "server_port",
        "vlm",
        "ocr_mode",  # who scores says how it reads
        "scorers",
        "token_file",
        "timeout_s",
        "max_unscored_share",
    },
    "update": {"checkpointing_steps"},
    "evaluate": {"every", "stop_on_alarm"},
}


def _horizon(params: RunParams) -> dict[str, Any]:
    """Return where a falling learning rate reaches 0.

    Nothing is read while it is constant: a run can then be prolonged.
    """
    if params.update.lr_scheduler.startswith("constant"):
        return {}
    return {"steps": params.total_updates}


def _exploration(params: RunParams) -> dict[str, Any]:
    # The key is the name of the first algorithm that explored, also where another one trains.
    explores, keys = params.rl.exploration, set(Exploration.model_fields)
    if explores is None:
        return {"grpo": {}}
    found = explores.model_dump(mode="json", include=keys)
    later = _LATER["grpo"]
    found = {key: value for key, value in found.items() if later.get(key, ...) != value}
    # Only where `guard` does not say it: what was made before others kept them is not stale.
    if explores.keeps_means and not explores.guard:
        found["keeps_means"] = True
    return {"grpo": found}


# Keys that came later, with the value that leaves results as they were: only another is read, so
# that what was made before there was such a key is not stale.
_LATER: dict[str, dict[str, Any]] = {
    "advantage": {"combine": "sum", "drop_solved": False, "per_letter": False},
    "nft": {
        "sigmas": "schedule",
        "old_policy_interval": 1,
        "kl_target": None,
        "background_coef": 0.0,
        "background_rows": 0,
    },
    "grpo": {
        "background_coef": 0.0,
        "background_rows": 0,
        "direction": "noise",
        "importance_cap": None,
        "recompute_log_prob": False,
        "kl_space": "mean",
        "kl_target": None,
        "trust_region": "clip",
        "window": "random",
        "window_interval": 25,
        "window_stride": 1,
    },
    "awm": {
        "sigmas": "schedule",
        "old_policy_interval": 1,
        "kl_target": None,
        "background_coef": 0.0,
        "background_rows": 0,
    },
    "evaluate": {"num_inference_steps": None, "noise_level": 0.0},
    "reward": {"weights": {}, "factors": [], "style_factors": [], "ocr_match": None},
    "update": {"adapter_learning_rate": None},
    "rollout": {
        "letter_weights": {},
        "solver": "euler",
        "refill": 0,
        "shared_trunk": False,
        "staleness": 0,
    },
}


def _component_weights(params: RunParams) -> dict[str, Any]:
    settings = params.advantage
    weighed = settings.combine == "standardized" or settings.drop_solved
    weights = {"weights": params.reward.component_weights} if weighed else {}
    if settings.combine == "standardized":
        # Only where they are set: advantages made before factors counted there are not stale.
        factors = {name: getattr(params.reward, name) for name in ("factors", "style_factors")}
        weights |= {name: named for name, named in factors.items() if named}
    return weights


# What `reads` names beside sections and single keys of the params.
_DERIVED: dict[str, Callable[[RunParams], dict[str, Any]]] = {
    "algorithm": lambda params: {"algorithm": params.algorithm},
    "component_weights": _component_weights,
    "algorithm_section": lambda params: _section(params, params.algorithm),
    "exploration": _exploration,
    "horizon": _horizon,
    # Only where it is set: what was made before there was such a key is not stale.
    "letters": lambda params: {"letters": True} if params.compares_letters else {},
    "num_inference_steps": lambda params: {
        "num_inference_steps": params.rollout.num_inference_steps
    },
    "old_policy": lambda params: params.rl.decides_old,
    # A round that is refilled depends on what its images were worth.
    "refill_by": lambda params: (
        {"refill_by": _section(params, "reward") | _section(params, "advantage")}
        if params.rollout.refill
        else {}
    ),
    "teaching_only": lambda params: {"teaching_only": True} if params.rollout.refill else {},
    # Only where it is set: what was made before there was such a key is not stale.
    "reconstruct": lambda params: (
        {"data": {"reconstruct": True}} if params.data.reconstruct else {}
    ),
    # Only where an algorithm has had another: updates of the others are not stale.
    "update_version": lambda params: (
        {"update_version": params.rl.update_version} if params.rl.update_version > 1 else {}
    ),
    "sampling_batch": lambda params: {"batch_size": params.rollout.batch_size},
}


def reads(params: RunParams, stage: str) -> dict[str, Any]:
    """Return what `stage` depends on besides its inputs, as plain JSON.

    Left out: devices, addresses, time-outs, memory savers, and the paths of data and weights, for
    which the inputs carry digests. `rounds` is left out too, so that a run can be prolonged.
    """
    values: dict[str, Any] = {}
    for name in STAGES[stage].reads:
        values |= _DERIVED[name](params) if name in _DERIVED else _section(params, name)
    return values


def _section(params: RunParams, name: str) -> dict[str, Any]:
    """Return the section (or single key) `name` without what decides no result."""
    value = params.model_dump(mode="json", include={name})[name]
    if isinstance(value, dict):
        later = _LATER.get(name, {})
        value = {
            k: v
            for k, v in value.items()
            if k not in _NO_RESULT.get(name, ()) and (k not in later or v != later[k])
        }
    if name == "ema":
        value["decay"] = params.ema_decay
    return {name: value}


def provenance(
    name: str, params: RunParams, sources: Sources, inputs: Mapping[str, str]
) -> Provenance:
    """Return what the artifact `name` is asked to be made from; inputs: name -> digest."""
    stage = STAGES[stage_of(name)]
    extra: dict[str, Callable[[], Any]] = {
        "round": lambda: round_of(name),
        "refilled_by": lambda: sources["scored_by"]() if params.rollout.refill else None,
        "group_size": lambda: params.rollout.num_images_per_prompt,
        "cases": lambda: evaluated(name, params)[0],
        "scored_by": sources["scored_by"],
    }
    return Provenance(
        stage.name,
        stage.version,
        reads(params, stage.name),
        {source: sources[source]() for source in stage.outside} | dict(inputs),
        {key: value for key in stage.decides if (value := extra[key]()) is not None},
    )


# Names of artifacts --------------------------------------------------------------------------


def planned(params: RunParams, rounds: int | None = None) -> list[str]:
    """Return the names of all artifacts of a run in the order in which they are made.

    rounds: instead of the params'.
    """
    rounds = params.rounds if rounds is None else rounds
    names = [WARMUP, *_evaluation(params, 0, rounds)]
    for round_index in range(rounds):
        names += [name_of(stage, round_index) for stage in ROUND]
        names += _evaluation(params, round_index + 1, rounds)
    return names


def _evaluation(params: RunParams, rounds_done: int, rounds: int) -> Iterator[str]:
    name = due_evaluation(params, rounds_done, last=rounds_done == rounds)
    if name is not None:
        yield name


def due_evaluation(params: RunParams, rounds_done: int, *, last: bool) -> str | None:
    """Return the name of the evaluation after so many rounds; None where the run has none.

    Where none is due it is a preview. last: it is the run's last one, which is always due.
    """
    every = params.evaluate.every
    if every == 0:
        return None
    return evaluation_name(rounds_done, preview=not last and rounds_done % every != 0)


def evaluated(name: str, params: RunParams) -> tuple[int, int]:
    """Return how many held-out cases the evaluation `name` shows, and how many images of each.

    A preview is there to be looked at: one image of each case of the grid.
    """
    settings = params.evaluate
    if name.endswith(PREVIEW):
        return settings.grid_cases, 1
    return settings.num_cases, settings.num_images_per_case


def name_of(stage: str, round_index: int) -> str:
    """Return the name of the artifact of `stage` in a round; before round 0 the warm-up's."""
    if round_index < 0 or stage == WARMUP:
        return WARMUP
    return f"{round_name(round_index)}/{stage}"


def stage_of(name: str) -> str:
    """Return the stage that makes the artifact `name`."""
    last = name.rpartition("/")[2]
    return EVALUATE if last == PREVIEW else last


def round_of(name: str) -> int | None:
    """Return the round of the artifact `name`, from 0; None for what is made before the first."""
    folder = name.rpartition("/")[0]
    return round_number(folder) if folder else None


def rounds_done(name: str) -> int:
    """Return how many rounds are over when the evaluation `name` is made."""
    round_index = round_of(name)
    return 0 if round_index is None else round_index + 1


def parents(name: str, staleness: int) -> dict[str, str]:
    """Return input -> the artifact of the same run that it is; empty for the warm-up.

    staleness: the run's `rollout.staleness`.
    """
    round_index = -1 if round_of(name) is None else round_of(name)
    return {
        key: name_of(made.stage, round_index - made.rounds_ago - staleness * made.samples)
        for key, made in STAGES[stage_of(name)].inputs.items()
    }


def descendants(name: str, names: Iterable[str], staleness: int) -> list[str]:
    """Return `name` and all of `names` that are made from it, however indirectly.

    names: in the order of `planned`. staleness: the run's `rollout.staleness`.
    """
    below = [name]
    for other in names:
        if other != name and not set(parents(other, staleness).values()).isdisjoint(below):
            below.append(other)
    return below


def artifact_name(text: str, names: Iterable[str]) -> str:
    """Return the one of `names` that a person means: `round-0003/update`, `3/update`, ...

    Raises ParamsError with the nearest names.
    """
    names = list(names)
    match = re.fullmatch(r"(?:round-)?(\d+)/(\w+)", text.strip("/"))
    name = f"{round_name(int(match[1]))}/{match[2]}" if match else text.strip("/")
    if name not in names:
        last = name.rpartition("/")[2]
        near = [n for n in names if n.rpartition("/")[2] == last] or names
        listing = ", ".join(near if len(near) < 5 else [*near[:2], "...", near[-1]])
        raise ParamsError(f"the stage must be one of the run's. Got {text!r}. Nearest: {listing}.")
    return name
