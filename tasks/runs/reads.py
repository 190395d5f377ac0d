"""What each artifact of a run is made from, as its fingerprint covers it."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from tasks.artifacts.run_dir import Artifact
from tasks.pipeline import PREVIEW, round_of, stage_of
from tasks.resources.resources import Bench
from tasks.stages import advantage, evaluate, refresh, rollout, score, update, warmup

VERSIONS: dict[str, int] = {
    module.__name__.rpartition(".")[2]: module.VERSION
    for module in (warmup, rollout, score, advantage, update, refresh, evaluate)
}
# What a stage reads besides artifacts of the run.
_SOURCES: dict[str, tuple[str, ...]] = {
    "warmup": ("model", "train_data"),
    "rollout": ("model", "train_data"),
    "score": ("train_data",),
    "update": ("model", "train_data"),
    "evaluate": ("model", "evaluation_data"),
}
_EXTRAS: dict[str, tuple[str, ...]] = {
    "rollout": ("round",),
    "score": ("scored_by",),
    "advantage": ("group_size",),
    "update": ("round",),
    "evaluate": ("scored_by", "cases"),
}


@dataclass(frozen=True)
class Asked:
    """All that a fingerprint covers; the fields are the manifest's."""

    stage: str
    stage_version: int
    params: dict[str, Any]
    inputs: dict[str, Any]  # name -> Artifact or digest
    extra: dict[str, Any]


class Reads:
    """What one set of params asks for. Digests of models and data are taken once, when first
    needed."""

    def __init__(self, bench: Bench) -> None:
        self.bench = bench

    @cached_property
    def model(self) -> str:
        return self.bench.model_digest

    @cached_property
    def train_data(self) -> str:
        return self.bench.train_digest

    @cached_property
    def evaluation_data(self) -> str:
        return self.bench.evaluation_digest

    @cached_property
    def scored_by(self) -> dict[str, Any]:
        return self.bench.scorer.identity()

    def of(self, name: str, made_from: Mapping[str, "Artifact | str"]) -> Asked:
        """What the artifact `name` is asked to be made from; `made_from`: the run's own
        artifacts."""
        stage = stage_of(name)
        sources = {source: getattr(self, source) for source in _SOURCES.get(stage, ())}
        return Asked(
            stage,
            VERSIONS[stage],
            self.bench.params.reads(stage),
            sources | dict(made_from),
            {key: self._extra(key, name) for key in _EXTRAS.get(stage, ())},
        )

    def _extra(self, key: str, name: str) -> Any:
        params = self.bench.params
        match key:
            case "round":
                return round_of(name)
            case "group_size":
                return params.rollout.num_images_per_prompt
            case "cases":
                settings = params.evaluate
                return settings.grid_cases if name.endswith(PREVIEW) else settings.num_cases
            case _:
                return self.scored_by
