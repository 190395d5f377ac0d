"""A run's params: one YAML file is one experiment, checked as a whole before anything starts.

```
params = load_params("params/tiny-nft.yaml", ["rounds=5", "nft.nft_beta=0.1"])
pipeline.reads(params, "update")    # exactly what the stage `update` depends on
```
"""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator

from calligrapher.errors import ParamsError
from calligrapher.rl.advantage import AdvantageParams
from calligrapher.rl.algorithm import Algorithm
from calligrapher.rl.awm import AWMParams
from calligrapher.rl.grpo import GRPOParams
from calligrapher.rl.nft import NFTParams
from tasks.params.checks import algorithms, check_all
from tasks.params.errors import describe
from tasks.params.files import absolute_path, apply_override, read_yaml
from tasks.params.sections import (
    Count,
    DataParams,
    EmaParams,
    EvaluateParams,
    LaunchParams,
    LoraParams,
    ModelParams,
    OptimizerParams,
    Positive,
    RetentionParams,
    RewardParams,
    RolloutParams,
    Section,
    TrackingParams,
    UpdateParams,
    WarmupParams,
)

__all__ = [
    "DataParams",
    "EmaParams",
    "EvaluateParams",
    "LaunchParams",
    "LoraParams",
    "ModelParams",
    "OptimizerParams",
    "RetentionParams",
    "RewardParams",
    "RolloutParams",
    "RunParams",
    "TrackingParams",
    "UpdateParams",
    "WarmupParams",
    "check_multiple",
    "load_params",
]


# What may name a file or a folder, besides words, runs and names on the hub.
_PATHS = {
    "model": ("base", "siglip", "initial_adapter"),
    "data": ("train", "evaluation"),
    "reward": ("vlm", "token_file"),
}


class RunParams(Section):
    """Everything that a run is told. `seed` and `rounds` stand at the top, the rest in sections."""

    seed: Count = Field(0, description="Every random number of the run derives from it.")
    rounds: Positive = Field(description="Rounds of rollout, score, advantage, update, refresh.")
    model: ModelParams
    data: DataParams
    warmup: WarmupParams = WarmupParams()
    rollout: RolloutParams
    reward: RewardParams = Field(default_factory=RewardParams)
    advantage: AdvantageParams = AdvantageParams()
    nft: NFTParams | None = Field(
        None, description="Train with DiffusionNFT; exactly one algorithm."
    )
    grpo: GRPOParams | None = Field(
        None, description="Train with Flow-GRPO; exactly one algorithm."
    )
    awm: AWMParams | None = Field(
        None, description="Train with Advantage Weighted Matching; exactly one algorithm."
    )
    update: UpdateParams = UpdateParams()
    ema: EmaParams = EmaParams()
    evaluate: EvaluateParams = EvaluateParams()
    tracking: TrackingParams = TrackingParams()
    retention: RetentionParams = RetentionParams()
    launch: LaunchParams = LaunchParams()

    @property
    def algorithm(self) -> str:
        """Which algorithm trains: the one whose section is there."""
        return self.rl.name

    @property
    def rl(self) -> Algorithm:
        """The section of the algorithm that trains."""
        return next(s for n in algorithms(type(self)) if (s := getattr(self, n)) is not None)

    @property
    def cases_per_round(self) -> int:
        return self.rollout.num_cases * self.rollout.num_batches_per_epoch

    @property
    def images_per_round(self) -> int:
        return self.cases_per_round * self.rollout.num_images_per_prompt

    @property
    def most_images_per_round(self) -> int:
        """The images of a round that is refilled as often and as far as it may be."""
        return self.images_per_round * (1 + self.rollout.refill)

    @property
    def updates_per_round(self) -> int:
        """Optimizer steps of a round in which every image counts.

        A last, smaller batch is a step as well.
        """
        rows = self.update.batch_size * self.update.gradient_accumulation_steps
        return self.update.num_inner_epochs * math.ceil(self.images_per_round / rows)

    @property
    def total_updates(self) -> int:
        """Optimizer steps of the run: where a falling learning rate reaches 0."""
        planned = self.rounds * self.updates_per_round
        return min(planned, self.update.max_train_steps or planned)

    @property
    def ema_decay(self) -> float:
        """The decay given, or the documented default of the algorithm."""
        if self.ema.decay is not None:
            return self.ema.decay
        return self.rl.default_ema_decay

    @property
    def compares_letters(self) -> bool:
        """Whether letters are asked about and compared: rewards that are made up have none."""
        return self.advantage.per_letter and not self.reward.disable_reward_model

    @property
    def evaluation_steps(self) -> int:
        """Sampling steps of what is looked at rather than trained on."""
        return self.evaluate.num_inference_steps or self.rollout.num_inference_steps

    def resolved(self) -> dict[str, Any]:
        """All values, defaults included, as plain JSON: stored with the run."""
        return self.model_dump(mode="json")

    def anywhere(self) -> Self:
        """Return these params with absolute paths: a run can be looked at from any folder."""
        sections = {}
        for section, keys in _PATHS.items():
            texts = {key: getattr(getattr(self, section), key) for key in keys}
            paths = {k: absolute_path(t) for k, t in texts.items() if t not in (None, "tiny")}
            sections[section] = getattr(self, section).model_copy(update=paths)
        own = {n: file.text(absolute_path) for n, file in self.reward.scorer_files.items()}
        sections["reward"] = sections["reward"].model_copy(update={"scorers": own})
        return self.model_copy(update=sections)

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        check_all(self)
        return self


def check_multiple(name: str, value: int, multiple: int) -> None:
    """Raise a ParamsError that names the nearest multiples, unless `value` is one of `multiple`."""
    if value % multiple:
        below = value // multiple * multiple
        near = ", ".join(str(n) for n in (below, below + multiple) if n > 0)
        raise ParamsError(f"{name} must be a multiple of {multiple}. Got {value}. Nearest: {near}.")


def load_params(path: str | Path, overrides: Sequence[str] = ()) -> RunParams:
    """Return the params of the YAML file `path` with `overrides` (`a.b=value`, value in YAML).

    Raises one ParamsError that names every problem: unknown keys with the nearest valid one, values
    out of bounds, combinations that cannot work.
    """
    path = Path(path)
    source = str(path) + (f" with {' '.join(overrides)}" if overrides else "")
    values = read_yaml(path, RunParams)
    for override in overrides:
        apply_override(values, override, RunParams)
    try:
        return RunParams.model_validate(values).anywhere()
    except ValidationError as error:
        problems = describe(error, RunParams)
    if len(problems) == 1:
        raise ParamsError(f"{problems[0]} ({source})")
    raise ParamsError(f"{source}:" + "".join(f"\n  {problem}" for problem in problems))
