"""A model opened for painting: the weights it starts from and, of a run, those of its training.

```
painter = open_painter("runs/first")
images = painter.paint("trained", case, seeds=[0, 1])
```
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file

from calligrapher.data.canvas import Canvas
from calligrapher.data.case import Case
from calligrapher.errors import ParamsError
from calligrapher.model.loading import Model
from calligrapher.model.policy import Weights
from calligrapher.rl.train_state import TRAINED as TRAINED_FILE
from calligrapher.sampling.generate import (
    BATCH_SIZE,
    FEATHER,
    GROW,
    EncodedCase,
    look,
    paint,
)
from calligrapher.tiny.pack import TINY
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import PARAMS
from tasks.artifacts.run_dir import RunDir
from tasks.params.errors import checked
from tasks.params.run_params import RunParams, load_params
from tasks.pipeline import WARMUP
from tasks.resources.resources import open_model
from tasks.weights.checkpoints import Checkpoint, find_checkpoint
from tasks.weights.model_files import ModelFiles, has_transformer_lora, model_files

BASE, TRAINED = "base", "trained"  # two variants; the third is WARMUP

# What the embedded model was pretrained with.
TINY_MODEL = {
    "initial_adapter": TINY,
    "width": 96,
    "height": 32,
    "guidance_scale": 3.5,
    "max_sequence_length": 24,
}
TINY_STEPS = 8


@dataclass
class Painter:
    """A model, its canvas, and the sets of weights that it can paint under."""

    model: Model
    canvas: Canvas
    num_steps: int
    noise_level: float
    variants: dict[str, Weights]  # `base` and, of a run, `warmup` and `trained`
    digests: dict[str, str]  # variant -> sha256 of all weights, the frozen ones too
    _seen: dict[tuple[Any, ...], EncodedCase] = field(default_factory=dict, repr=False)

    def weights(self, variant: str) -> Weights:
        """Return the weights of `variant`. Raises ParamsError when there are none."""
        if variant not in self.variants:
            raise ParamsError(
                f"The weights must be {' or '.join(self.variants)} here. Got {variant!r}."
            )
        return self.variants[variant]

    def paint(
        self,
        variant: str,
        case: Case,
        *,
        seeds: Sequence[int],
        scale: float = 1.0,
        num_steps: int | None = None,
        crop: bool = True,
        grow: float = GROW,
        feather: int = FEATHER,
        batch_size: int = BATCH_SIZE,
    ) -> list[Image.Image]:
        """`calligrapher.sampling.generate.generate` under the weights of `variant`.

        The case painted last is not encoded again, so that variants and scales compare at the cost
        of sampling.
        """
        weights = self.weights(variant)
        key = (case.digest, crop, grow)
        if key not in self._seen:
            self._seen = {key: look(self.model, case, self.canvas, crop=crop, grow=grow)}
        with self.model.policy.use(weights):
            return paint(
                self.model,
                self._seen[key],
                seeds,
                num_steps=num_steps or self.num_steps,
                noise_level=self.noise_level,
                scale=scale,
                feather=feather,
                batch_size=batch_size,
            )


def open_painter(
    run: str | None = None,
    *,
    runs_dir: Path = Path("runs"),
    base: str = TINY,
    siglip: str | None = None,
    adapter: str | None = None,
    num_steps: int | None = None,
    noise_level: float | None = None,
    **model: Any,
) -> Painter:
    """Load a model to paint with: that of `run`, or else that in `base`, `siglip`, `adapter`.

    A run (its folder, name or URI, or an update of it) brings its params, its weights after the
    warm-up and, as `trained`, the average of its newest or the named checkpoint; the trained
    weights where it keeps no average. `base` may be `tiny`, the embedded model. `model` are keys of
    the params' section `model`, `num_steps` the sampling steps and `noise_level` their fresh noise:
    instead of what the run or the model has. Raises ParamsError, CheckpointError or ArtifactError.
    """

    def params_from(values: dict[str, Any]) -> RunParams:
        changed = {"model": values["model"] | model}
        if noise_level is not None:
            changed["evaluate"] = values["evaluate"] | {"noise_level": noise_level}
        return checked(RunParams, values | changed)

    if num_steps is not None and num_steps < 1:
        raise ParamsError(f"The sampling steps must be at least 1. Got {num_steps}.")
    if run is None:
        _check_is_adapter(adapter, runs_dir)
        params = params_from(_untrained(base, siglip, adapter))
        return _painter(params, model_files(params.model, runs_dir), num_steps, {})
    found = find_checkpoint(run, runs_dir)
    if isinstance(found, Path):
        raise ParamsError(
            f"A run must be named, or weights in one. Got {run}; name it as the adapter."
        )
    params = params_from(load_params(found.run / PARAMS).resolved())
    files = model_files(params.model, found.run.parent)
    start = RunDir(found.run).load(WARMUP)
    if start.inputs["model"] != files.digest:
        raise ParamsError(
            f"The weights in {', '.join(str(p) for p in files.paths)} must be those that"
            f" {found.run} started from. They have changed since."
        )
    trained = (
        {} if found.artifact.stage == start.stage else {TRAINED: (found.artifact, found.path.name)}
    )
    return _painter(params, files, num_steps, {WARMUP: (start, TRAINED_FILE)} | trained)


def _check_is_adapter(adapter: str | None, runs_dir: Path) -> None:
    """Raise ParamsError when the run that `adapter` names learned more than an adapter holds."""
    if adapter in (None, TINY):
        return
    checkpoint = find_checkpoint(adapter, runs_dir)
    if isinstance(checkpoint, Checkpoint) and has_transformer_lora(checkpoint):
        raise ParamsError(
            f"The adapter must be all that was learned. {adapter} also trained LoRA on the"
            f" transformer. Name it as the run: --run {adapter}."
        )


def _untrained(base: str, siglip: str | None, adapter: str | None) -> dict[str, Any]:
    """Params for a model alone; the sections beside `model` are those that have no default."""
    model: dict[str, Any] = {"base": base, "siglip": siglip, "initial_adapter": adapter}
    if base == TINY:
        model |= TINY_MODEL | ({"initial_adapter": adapter} if adapter else {})
    elif adapter is None:
        raise ParamsError(f"An adapter must be named for the model in {base}. Got none.")
    return {
        "rounds": 1,
        "model": model,
        "data": {"train": TINY},
        "rollout": {"num_cases": 2} | ({"num_inference_steps": TINY_STEPS} if base == TINY else {}),
        "reward": {"vlm_weight": 0.0},
        "advantage": {"baseline": "round"},
        "evaluate": {"every": 0},
        "nft": {},
    }


def _painter(
    params: RunParams,
    files: ModelFiles,
    num_steps: int | None,
    made: dict[str, tuple[Artifact, str]],
) -> Painter:
    """`made`: further variants, each a file of an artifact."""
    m, model = params.model, open_model(params, files)
    # Not copies: `use` swaps pointers, and nothing trains here.
    parameters = model.policy.parameters.items()
    variants = {BASE: {name: parameter.data for name, parameter in parameters}}
    variants |= {name: load_file(artifact.file(file)) for name, (artifact, file) in made.items()}
    sources = {BASE: f"initial/{params.seed}"}
    sources |= {name: artifact.files[file].sha256 for name, (artifact, file) in made.items()}
    return Painter(
        model=model,
        canvas=Canvas(m.width, m.height, m.reference_context),
        num_steps=num_steps or params.evaluation_steps,
        noise_level=params.evaluate.noise_level,
        variants=variants,
        digests={
            name: hashlib.sha256(f"{files.digest}/{source}".encode()).hexdigest()
            for name, source in sources.items()
        },
    )
