"""The evaluation of one run's checkpoints, apart from its training: more is measured, and compared.

```
runs/evaluations/NAME/KEY/base/          the model that the run started from: artifacts as in a run
runs/evaluations/NAME/KEY/warmup/        after the warm-up, where there was one
runs/evaluations/NAME/KEY/round-0003/    images, measures, cases (Parquet), metrics.json
runs/evaluations/NAME/KEY/verdicts/round-0003.json      comparisons, champion, alarm
```

KEY stands for everything that must be equal for results to compare: settings, cases, engines.
"""

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from calligrapher.errors import ArtifactError, DataError, ParamsError
from calligrapher.model.policy import Weights
from reward_server.style_scale import StyleScale
from tasks import pipeline
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import RunsDir, newest_update, round_number
from tasks.artifacts.provenance import Provenance, fingerprint
from tasks.artifacts.run_dir import RunDir
from tasks.evaluation import measures, second_ocr, verdict
from tasks.params.errors import describe
from tasks.params.files import read_yaml
from tasks.params.run_params import RunParams
from tasks.params.sections import Count, EvaluateParams, Positive, Section
from tasks.resources.resources import Resources
from tasks.stages import evaluate as evaluate_stage
from tasks.tracking.journal import METRICS_FILE
from tasks.weights.checkpoints import siglip_folder

logger = logging.getLogger(__name__)

VERSION = 2
BASE, WARMUP = "base", "warmup"


class EvaluationParams(Section):
    """How a checkpoint is looked at; `params/evaluate.yaml`."""

    num_cases: Positive = Field(64, description="Held-out cases, the first ones of the run's.")
    num_images_per_case: Positive = Field(
        4, description="Images per case; 1 leaves the spread unmeasured."
    )
    seed: Count = Field(1000, description="Seed of the noise.")
    num_inference_steps: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Sampling steps; null = as the run's own evaluations."
    )
    noise_level: Annotated[float, Field(ge=0, le=1)] | None = Field(
        None, description="Fresh noise of each step but the last; null = as the run's own."
    )
    second_ocr: Literal["auto", "tesseract", "none"] = Field(
        "auto",
        description="A recogniser that no reward uses; auto takes Tesseract where it is installed.",
    )


def load_evaluation_params(path: Path) -> EvaluationParams:
    """Read the YAML file. Raises ParamsError that names every problem."""
    try:
        return EvaluationParams.model_validate(read_yaml(path, EvaluationParams))
    except ValidationError as error:
        raise ParamsError(f"{path}: " + "; ".join(describe(error, EvaluationParams))) from None


def params_of(run: Path, settings: EvaluationParams) -> RunParams:
    """The run's own params with this evaluation's cases and noise. Raises DataError when it is no
    run."""
    path = run / "params.json"
    if not path.is_file():
        raise DataError(f"{run} must be the folder of a run. It holds no params.json.")
    params = RunParams.model_validate_json(path.read_bytes())
    if params.data.evaluation is None:
        raise DataError(f"{run} must have held-out cases (data.evaluation). Its params name none.")
    chosen = settings.model_dump(exclude={"second_ocr"})
    chosen["num_inference_steps"] = settings.num_inference_steps or params.evaluation_steps
    if chosen["num_inference_steps"] == params.rollout.num_inference_steps:
        chosen["num_inference_steps"] = None  # as evaluations were keyed when there was one number
    if chosen["noise_level"] is None:
        chosen["noise_level"] = params.evaluate.noise_level
    evaluate = EvaluateParams(every=1, grid_cases=min(8, settings.num_cases), **chosen)
    return params.model_copy(update={"evaluate": evaluate})


def newest_checkpoint(run: Path) -> str | None:
    """Return the round of the run's newest update, as `round-0003`; None before the first."""
    update = newest_update(run)
    return update and update.partition("/")[0]


class Evaluation:
    """The evaluations of one run, with this process as the only one at work on them."""

    def __init__(self, run: Path, resources: Resources, folder: RunDir, *, second: bool):
        self.run, self.resources, self.folder, self.second = run, resources, folder, second

    def earlier(self, checkpoint: str) -> list[str]:
        """What `checkpoint` is compared with: the base, the warm-up, the best so far."""
        names = [BASE]
        if self.resources.params.warmup.steps > 0:
            names.append(WARMUP)
        best = verdict.champion(self.folder.path)
        if best is not None and best != checkpoint:
            names.append(best)
        return names

    def measure(self, name: str) -> Artifact:
        """Sample, score and measure under the weights `name`; found again when it was done
        before."""
        path, sha256 = self._weights(name)

        def build(out: Path) -> dict[str, Any]:
            resources = self.resources
            weights: Weights = (
                resources.weights(path)
                if path
                else resources.initial_model().policy.snapshot(whole=False)
            )
            counts = evaluate_stage.evaluate_weights(
                resources,
                weights,
                out,
                policy_digest=sha256,
                round_index=0,
                num_cases=resources.params.evaluate.num_cases,
                images_per_case=resources.params.evaluate.num_images_per_case,
            )
            found = measures.measure(resources, out, second=self.second)
            found |= {"images": counts["images"], "unscored": counts["unscored"]}
            (out / evaluate_stage.EVALUATION_FILE).write_text(json.dumps(found, indent=1) + "\n")
            return found

        inputs = {"model": self.resources.files.digest, "weights": sha256}
        # The params are in the folder's name.
        asked = Provenance("evaluation", VERSION, params={}, inputs=inputs)
        return self.folder.ensure(name, asked, build)

    def compare(
        self, checkpoint: str, measured: Artifact, others: dict[str, Artifact]
    ) -> verdict.Verdict:
        """Return the verdict, also written to `verdicts/CHECKPOINT.json`; note a new champion."""
        compared = {
            name: measures.differences(measured.path, other.path) for name, other in others.items()
        }
        alarm = verdict.reward_hacking(compared, self._training_rewards(checkpoint))
        result = verdict.Verdict(
            run=self.run.name,
            checkpoint=checkpoint,
            digest=self.checkpoint(checkpoint).digest,
            champion=verdict.mark_champion(self.folder.path, checkpoint, measured.meta, alarm),
            reward_hacking=alarm,
            metrics=measured.meta,
            minus=compared,
        )
        result.write(self.folder.path / "verdicts")
        return result

    def checkpoint(self, name: str) -> Artifact:
        """The training's artifact of `warmup` or `round-0003`. Raises ArtifactError when there is
        none."""
        path = self.run / name / ("" if name == WARMUP else "update")
        if not path.is_dir():
            raise ArtifactError(f"{self.run} must hold the checkpoint {name!r}. It has no {path}.")
        return Artifact.load(path)

    def _weights(self, name: str) -> tuple[Path | None, str]:
        if name == BASE:
            return None, BASE
        made = self.checkpoint(name)
        file = evaluate_stage.evaluated_file(made)
        done = self.folder.stage_path(name)
        path = (
            made.path / file if done.exists() else made.file(file)
        )  # retention may have deleted it since
        return path, made.files[file].sha256

    def _training_rewards(self, checkpoint: str) -> list[float]:
        """Mean reward of each round up to the checkpoint's, from `metrics.jsonl`."""
        lines = (self.run / METRICS_FILE).read_text().splitlines()
        records = [json.loads(line) for line in lines]
        rewards = {
            r["step"]: r["metrics"].get("score/reward_mean")
            for r in records
            if r["stage"].endswith("/score")
        }
        last = round_number(checkpoint)
        return [
            reward
            for step, reward in sorted(rewards.items())
            if step <= last and reward is not None
        ]


@contextmanager
def open_evaluation(
    run: Path, settings: EvaluationParams, resources: Resources
) -> Iterator[Evaluation]:
    """Take the lock of this run's evaluations of this kind. Raises ParamsError, RunLockedError."""
    _ = resources.cases.evaluation  # Too few of them, or none, are told before anything is started.
    version = second_ocr.version() if settings.second_ocr != "none" else None
    if version is None and settings.second_ocr == "tesseract":
        raise ParamsError(
            "second_ocr must be auto or none where Tesseract is not installed. Got 'tesseract'."
            " Install it (`apt-get install tesseract-ocr`)."
        )
    key = fingerprint(
        "evaluation",
        VERSION,
        pipeline.reads(resources.params, "evaluate"),
        {"evaluation_data": resources.cases.evaluation_digest},
        scored_by=resources.scorer.identity(),
        second_ocr=version,
        style_scale=asdict(StyleScale.read(siglip_folder(resources.params.model.siglip))),
    )
    folder = RunDir(RunsDir(run.parent).evaluations(run.name) / key[:8])
    folder.path.mkdir(parents=True, exist_ok=True)
    with folder.lock():
        yield Evaluation(run, resources, folder, second=version is not None)
