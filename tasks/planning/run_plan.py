"""The whole plan of a run, for people and programs: parameters, memory, work, files, verdict.

Memory is told by stage.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from calligrapher.sizing import configs as full
from calligrapher.sizing.meta_model import MetaModel, count
from tasks.params.run_params import RunParams, load_params
from tasks.planning.gpu_fit import GIB, RESERVE, changes_to_fit, largest_batches, needed
from tasks.planning.memory import Memory, batch_of, folders, memory, meta_model, other_algorithm
from tasks.planning.shapes import shapes
from tasks.planning.work import Files, Forwards, files, forwards


@dataclass(frozen=True)
class RunPlan:
    """What `calligrapher plan` tells."""

    title: str
    configs: dict[str, str]
    parameters: dict[str, int]
    stages: list[Memory]
    other: Memory  # the update with the other algorithm
    algorithms: tuple[str, str]
    forwards: Forwards
    images: int
    most_images: int  # sampled in a round that `rollout.refill` fills up as far as it may
    files: Files
    gpu: str
    gpu_gib: float
    needed_gib: float
    changes: list[str]
    needed_after_gib: float
    ranks: int
    strategy: str
    largest_batches: dict[str, int]

    @property
    def fits(self) -> bool:
        return self.needed_gib <= self.gpu_gib

    def as_json(self) -> dict[str, Any]:
        """Plain values; bytes unless a name says GiB."""
        return asdict(self) | {"fits": self.fits}

    def text(self) -> str:
        """Aligned tables."""
        parts = [self.title, *(f"{name}: {where}" for name, where in self.configs.items()), ""]
        parts += [*self._parameters(), "", *self._memory(), "", *self._work(), ""]
        parts += [*self._ranks(), *self._verdict()]
        return "\n".join(parts)

    def _parameters(self) -> list[str]:
        held = sum(self.parameters[name] for name in ("transformer", "adapter", "LoRA")) / 1e6
        trained = self.parameters["trained"] / 1e6
        kept = sum(bool(self.stages[-1].parts[name]) for name in ("old", "reference"))
        return [
            "parameters",
            *(f"  {name:<22}{number:>16,}" for name, number in self.parameters.items()),
            (
                f"  old and reference are copies of the trained ones: {held:,.0f} M + {kept} x"
                f" {trained:,.0f} M = {held + kept * trained:,.0f} M;"
            ),
            (
                f"  as copies of the whole model they would be {1 + kept} x {held:,.0f} M = "
                f"{(1 + kept) * held:,.0f} M."
            ),
        ]

    def _memory(self) -> list[str]:
        columns = [(stage.stage, stage) for stage in self.stages]
        columns[-1] = (f"update {self.algorithms[0]}", self.stages[-1])
        columns.append((f"update {self.algorithms[1]}", self.other))
        names = [
            name for name in self.stages[-1].parts if any(c.parts.get(name) for _, c in columns)
        ]

        def line(name: str, values: Sequence[int]) -> str:
            return f"  {name:<22}" + "".join(
                f"{v / GIB:>14.2f}" if v else f"{'-':>14}" for v in values
            )

        return [
            f"{'GPU memory, GiB':<24}" + "".join(f"{name:>14}" for name, _ in columns),
            *(line(name, [c.parts.get(name, 0) for _, c in columns]) for name in names),
            line("sum", [c.total for _, c in columns]),
        ]

    def _work(self) -> list[str]:
        f, disk = self.forwards, self.files
        sampled = f", up to {self.most_images} with its refills" * (self.most_images > self.images)
        return [
            f"transformer calls per image: {f.rollout:g} in the rollout; in each pass of the"
            " update",
            (
                f"  {f.trained:g} with a backward, {f.old:g} of old and {f.reference:g} of the"
                f" reference without. {self.images} images a round{sampled}."
            ),
            (
                f"disk: at most {disk.rollout / 1e6:,.1f} MB of Parquet a round, "
                f"{disk.conditioning / 1e6:.2f} MB of encodings a case,"
            ),
            (
                f"  {disk.checkpoint / GIB:,.2f} GiB of weights and optimizer in a round that keeps"
                " them."
            ),
            f"CPU memory: {disk.cpu_memory / GIB:,.0f} GiB of weights at the most.",
        ]

    def _ranks(self) -> list[str]:
        if self.ranks == 1:
            return []
        batches = ", ".join(f"{n} in the {stage}" for stage, n in self.largest_batches.items())
        return [
            f"{self.ranks} ranks, {self.strategy}: memory is that of the one that holds the most.",
            f"  Images of one forward that fit a rank: {batches}.",
            "",
        ]

    def _verdict(self) -> list[str]:
        verdict = "fits" if self.fits else "does not fit"
        lines = [
            f"{verdict}: {self.gpu} has {self.gpu_gib:.1f} GiB; {self.needed_gib:.1f} are needed, "
            f"{RESERVE:g} of them set aside for CUDA."
        ]
        if self.fits:
            return lines
        change = " ".join(f"'{c}'" if "{" in c else c for c in self.changes) or "none"
        after = f"{self.needed_after_gib:.1f} GiB"
        if self.needed_after_gib <= self.gpu_gib:
            return [*lines, f"It fits, with {after}, after: {change}"]
        return [
            *lines,
            f"No change that is known here makes it fit: {after} are the least, with: {change}",
        ]


def make_plan(path: Path, overrides: Sequence[str], gpu: str, gib: float) -> RunPlan:
    """The plan of the params file `path` with `overrides`. Raises ParamsError, CheckpointError."""

    def load(settings: Sequence[str]) -> RunParams:
        return load_params(path, settings)

    params = load(overrides)
    model = meta_model(params)
    other = other_algorithm(params)
    changes, after = changes_to_fit(load, overrides, gib)
    return RunPlan(
        title=_title(path, params),
        configs=_configs(params),
        parameters=_parameters(model),
        stages=memory(params),
        other=memory(other)[-1],
        algorithms=(params.algorithm, other.algorithm),
        forwards=forwards(params),
        images=params.images_per_round,
        most_images=params.most_images_per_round,
        files=files(params),
        gpu=gpu,
        gpu_gib=gib,
        needed_gib=needed(params),
        changes=changes,
        needed_after_gib=after,
        ranks=params.launch.size,
        strategy=params.launch.strategy,
        # Each size that is tried is a whole reckoning: only where it is told.
        largest_batches=largest_batches(params, gib) if params.launch.size > 1 else {},
    )


def _title(path: Path, params: RunParams) -> str:
    m = params.model
    tokens = batch_of(params, meta_model(params), 1)
    found = shapes(params)
    counted = f"{tokens.image} image"
    if found.mean < found.largest:
        mean = tokens.image * found.mean / found.largest
        counted += f" (the most, which is counted; {mean:.0f} in the mean)"
    return (
        f"{path}: {params.algorithm}, mixed_precision {m.mixed_precision}, {m.width} x"
        f" {m.height}{found.words}, {counted} and {tokens.text} text tokens"
    )


def _configs(params: RunParams) -> dict[str, str]:
    base, siglip, adapter = folders(params)
    packaged = "the packaged public configs; {} is not there"
    found = adapter is not None and adapter.is_file()
    missing = f"; {adapter} is not there" if adapter else ""
    return {
        "base": packaged.format(params.model.base) if base == full.BASE else str(base),
        "SigLIP": packaged.format(params.model.siglip) if siglip == full.SIGLIP else str(siglip),
        "adapter": str(adapter) if found else "the released sizes" + missing,
    }


def _parameters(model: MetaModel) -> dict[str, int]:
    lora = {
        part: sum(p.numel() for n, p in part.named_parameters() if "lora_" in n)
        for part in (model.transformer, model.adapter)
    }
    return {
        "transformer": count(model.transformer) - lora[model.transformer],
        "VAE": count(model.vae),
        "CLIP": count(model.text_encoder),
        "T5": count(model.text_encoder_2),
        "SigLIP": count(model.siglip),
        "adapter": count(model.adapter) - lora[model.adapter],
        "LoRA": sum(lora.values()),
        "trained": sum(p.numel() for p in model.policy.parameters.values()),
    }
