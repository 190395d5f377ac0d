"""Which GPU a run fits, and the least changes of its params that make it fit."""

import bisect
import math
from collections.abc import Callable, Sequence

from calligrapher.errors import ParamsError
from tasks.params.checks import algorithms
from tasks.params.run_params import RunParams
from tasks.planning.memory import memory

GIB = 2**30
# GiB, about what PyTorch reports (`total_memory`): boards of one name differ by a few tenths.
GPUS = {
    "4090": 23.5,
    "a100-40": 39.3,
    "l40s": 44.3,
    "a100-80": 79.1,
    "h100": 79.1,
    "h200": 139.7,
}
# GiB for CUDA's context, libraries' workspaces and gaps between blocks: assumed, not measured.
RESERVE = 2.0
SECTIONS = {"warm-up": "warmup", "rollout": "rollout", "update": "update"}  # stage -> its params


def capacity(name: str | None, gib: float | None) -> tuple[str, float]:
    """Return (name, GiB) of the GPU asked for; the H100 when none is.

    Raises ParamsError for an unknown one.
    """
    if gib is not None:
        if name is not None:
            raise ParamsError(
                f"--gpu-memory must not be given beside --gpu. Got {gib:g} and {name}: give one."
            )
        if not RESERVE < gib < math.inf:
            raise ParamsError(
                f"--gpu-memory must be a number of GiB above the {RESERVE:g} that are set aside."
                f" Got {gib}."
            )
        return f"a GPU of {gib:g} GiB", gib
    name = (name or "h100").lower()
    if name not in GPUS:
        raise ParamsError(
            f"--gpu must be one of {', '.join(GPUS)}. Got {name!r}. Or give --gpu-memory in GiB."
        )
    return name, GPUS[name]


def ladder(params: RunParams) -> list[list[str]]:
    """Return sets of overrides to try: what changes no result, rounding, then the method."""
    algorithm = params.algorithm
    lighter = [
        name for name, kind in algorithms(type(params)).items() if not kind(**kind.usual).needs_old
    ]
    single = ["rollout.batch_size=1", "update.batch_size=1"]  # of one size, as exploring asks for
    images = params.update.batch_size * params.update.gradient_accumulation_steps
    as_many = [f"update.gradient_accumulation_steps={images}"]
    without_old = [f"{algorithm}=null", f"{lighter[0]}={{}}", *single] if lighter else []
    sharded = params.launch.strategy == "fsdp2"  # which goes with moments in 32 bits alone
    in_8_bits = [n for n in ("warmup", "update") if getattr(params, n).use_8bit_adam]
    share = ["launch.strategy=fsdp2", *(f"{name}.use_8bit_adam=false" for name in in_8_bits)]
    adapter = ["model.train_adapter=false"] + ["model.lora={}"] * (params.model.lora is None)
    steps = [
        ["model.offload_text_encoder_two=true"],
        ["model.gradient_checkpointing=true"],
        share if params.launch.size > 1 and not sharded else [],
        single + as_many if params.rl.exploration else single[:1],
        ["model.mixed_precision=bf16"] * (params.model.mixed_precision == "no"),
        ["warmup.use_8bit_adam=true"] * (params.warmup.steps > 0 and not sharded),
        ["update.use_8bit_adam=true"] * (not sharded),
        ["warmup.batch_size=1", "update.batch_size=1"],
        [f"{algorithm}.kl_coef=0"] * params.rl.needs_reference,
        without_old if params.rl.needs_old else [],
        adapter * params.model.train_adapter,
    ]
    return [step for step in steps if step]


def needed(params: RunParams) -> float:
    """GiB that the most demanding stage needs, with what is set aside."""
    return max(stage.total for stage in memory(params)) / GIB + RESERVE


def largest_batches(params: RunParams, gib: float, most: int = 4096) -> dict[str, int]:
    """Return how many images a forward of each stage may have at most in `gib`; 0: not even one.

    Memory alone is asked: what else a batch must fit (as `rollout.shard_size`) is not.
    """

    def fits(stage: str, rows: int) -> bool:
        section = getattr(params, SECTIONS[stage]).model_copy(update={"batch_size": rows})
        changed = params.model_copy(update={SECTIONS[stage]: section})
        (found,) = (s for s in memory(changed) if s.stage == stage)
        return found.total / GIB + RESERVE <= gib

    return {
        stage.stage: bisect.bisect_left(
            range(1, most + 1), True, key=lambda n, name=stage.stage: not fits(name, n)
        )
        for stage in memory(params)
    }


def changes_to_fit(
    load: Callable[[Sequence[str]], RunParams], overrides: Sequence[str], gib: float
) -> tuple[list[str], float]:
    """The overrides beyond `overrides` that make the run fit `gib`, and the GiB that it then needs.

    Changes that save in any stage are added in the order of `ladder`; once it fits, each that it
    fits without is taken out again. When nothing suffices, all that saves is returned: the caller
    compares.
    """

    def with_changes(chosen: Sequence[Sequence[str]]) -> RunParams:
        return load([*overrides, *(c for change in chosen for c in change)])

    def everything(chosen: Sequence[Sequence[str]]) -> float:
        try:
            return sum(stage.total for stage in memory(with_changes(chosen)))
        except ParamsError:  # these changes do not go together
            return math.inf

    def fits(chosen: Sequence[Sequence[str]]) -> bool:
        try:
            return needed(with_changes(chosen)) <= gib
        except ParamsError:  # these changes go with one that was taken out
            return False

    chosen: list[list[str]] = []
    for change in ladder(with_changes([])):
        if fits(chosen):
            break
        if everything([*chosen, change]) < everything(chosen):
            chosen = [*chosen, change]
    if fits(chosen):
        for change in list(chosen):
            without = [c for c in chosen if c is not change]
            chosen = without if fits(without) else chosen
    return [c for change in chosen for c in change], needed(with_changes(chosen))
