"""What lies on the GPU in each stage, byte by byte, from params and configs alone.

Counted as the stages hold it (`load_model`, `Policy.to_storage`, `Resources.weights`,
`TrainState`): trained weights and gradients in float32, frozen ones in `mixed_precision`'s type,
`old` and `reference` as copies of the trained weights and of nothing else. EMA and, when it is
offloaded, T5 lie in the CPU's memory.

On several ranks it is what rank 0 holds, which is the most. With ddp every rank holds all of it;
with fsdp2 (`sharding.shard`) the encoders, the rows and the activations are whole on each, and all
weights of the transformer and the adapter, and what is made from them, are cut up.
"""

import functools
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from calligrapher.model.loading import DTYPES
from calligrapher.ranks import BUCKET_BYTES
from calligrapher.sampling.exploration import window_length
from calligrapher.sizing.activations import (
    Batch,
    decode_peak,
    forward_peak,
    number_bytes,
    training_peak,
)
from calligrapher.sizing.meta_model import MetaModel, build, config_folders, count
from tasks.params.checks import algorithms
from tasks.params.run_params import ModelParams, RunParams, check_multiple
from tasks.planning.batches import largest_forward
from tasks.planning.shapes import shapes
from tasks.planning.shares import WHOLE, Shares, gathered_bytes, shares_of
from tasks.weights.model_files import model_files

# bitsandbytes: smaller tensors keep float32 moments; each block of numbers has a scale.
MIN_8BIT, BLOCK_8BIT = 4096, 256


@dataclass(frozen=True)
class Memory:
    """The bytes of one stage's parts on the GPU."""

    stage: str
    parts: dict[str, int]

    @property
    def total(self) -> int:
        return sum(self.parts.values())


def folders(params: RunParams) -> tuple[Path, Path, Path | None]:
    """Where the configs are read: base, SigLIP, adapter."""
    files = model_files(params.model, Path("runs"))
    return *config_folders(files.base, files.siglip), files.adapter


def meta_model(params: RunParams) -> MetaModel:
    """The run's model without memory. Raises ParamsError when the canvas does not fit it."""
    model = _meta_model(params.model.model_dump_json(), *folders(params))
    for side in ("width", "height"):
        check_multiple(f"model.{side}", getattr(params.model, side), model.multiple)
    return model


@functools.lru_cache
def _meta_model(model_json: str, base: Path, siglip: Path, adapter: Path | None) -> MetaModel:
    m = ModelParams.model_validate_json(model_json)
    lora = m.lora.model_dump() if m.lora else None
    autocast = DTYPES[m.mixed_precision]
    return build(base, siglip, adapter, train_adapter=m.train_adapter, lora=lora, autocast=autocast)


def batch_of(params: RunParams, model: MetaModel, rows: int) -> Batch:
    """Token counts of `rows` images, each as large as the largest; see `shapes`."""
    m, side = params.model, model.multiple
    tallest = shapes(params).largest
    return Batch(rows, (m.width // side) * (tallest // side), m.max_sequence_length)


def memory(params: RunParams) -> list[Memory]:
    """What lies on the GPU in warm-up (where there is one), rollout and update."""
    model = meta_model(params)
    settings = params.warmup
    stages = [_rollout(params, model), _update(params, model)]
    if settings.steps:
        training = _training(params, model, settings.batch_size, settings.use_8bit_adam)
        peak = {"activations": max(training.pop("activations"), t5_moved(params, model))}
        # A warm-up runs no policy but the trained one.
        shared = _shared_work(params, model, trains=True) | {"set aside by use": 0}
        shared = shared if shares_of(params).ranks > 1 else {}
        stages.insert(0, Memory("warm-up", _fixed(params, model) | shared | training | peak))
    return stages


def other_algorithm(params: RunParams) -> RunParams:
    """The same run with the other algorithm, at the same weight of the KL term."""
    others = {n: c for n, c in algorithms(type(params)).items() if n != params.algorithm}
    name, section = next(iter(others.items()))
    other = section(kl_coef=params.rl.kl_coef, **section.usual)
    return params.model_copy(update={params.algorithm: None, name: other})


def copies(params: RunParams) -> dict[str, bool]:
    """Return which copies of the trained weights an update needs from round 1 on.

    A fixed `old` is the reference.
    """
    rl = params.rl
    # One set of weights serves as both where the policy that samples stays the reference.
    old = rl.needs_old and not (rl.old_is_start and rl.needs_reference)
    return {"old": old, "reference": rl.needs_reference}


def held_bytes(model: MetaModel, shares: Shares = WHOLE) -> int:
    """Bytes of one policy beside the trained one."""
    policy = model.policy
    return sum(
        shares.of(p) * policy.storage_dtype(n).itemsize for n, p in policy.parameters.items()
    )


def optimizer_bytes(weights: Iterable[Tensor], eight_bit: bool, shares: Shares = WHOLE) -> int:
    """AdamW's two moments and, in torch's, a step count per tensor."""
    if not eight_bit:
        return sum(8 * shares.of(w) + 4 for w in weights)
    return sum(
        2 * (w.numel() + 4 * -(-w.numel() // BLOCK_8BIT))
        if w.numel() >= MIN_8BIT
        else 8 * w.numel()
        for w in weights
    )


def row_bytes(params: RunParams, model: MetaModel) -> dict[str, int]:
    """Return the bytes of one image's tensors, of one case's conditioning, and of what an update
    compares of an image.

    All in float32, the first two as rollouts store them.
    """
    batch = batch_of(params, model, 1)
    latent = 4 * batch.image * model.transformer.out_channels
    config = model.transformer.config
    # Masked image, mask and token coordinates.
    row = config.in_channels - model.transformer.out_channels + 3
    conditioning = (
        batch.text * config.joint_attention_dim
        + config.pooled_projection_dim
        + model.siglip.config.hidden_size
        + batch.image * row
    )
    sampled = latent
    g = params.rl.exploration
    if g is not None:
        steps = window_length(
            params.rollout.num_inference_steps, g.window_size, g.timestep_fraction
        )
        sampled += latent * (steps + 1 + steps * g.keeps_means) + 4 * (2 * steps + 1)
    compared = latent * params.rl.compares_images
    return {"sampled": sampled, "conditioning": 4 * conditioning, "compared": compared}


def t5_moved(params: RunParams, model: MetaModel) -> int:
    """Bytes of an offloaded T5: on the GPU while a prompt is encoded, else in the CPU's memory."""
    return number_bytes(model) * count(model.text_encoder_2) * params.model.offload_text_encoder_two


def _fixed(params: RunParams, model: MetaModel) -> dict[str, int]:
    """The weights that lie there in every stage."""
    size, trained = number_bytes(model), model.policy.parameters
    shares = shares_of(params)
    # The base is loaded in the type of the forwards. The adapter is loaded in float32 and only its
    # matrices are held in that type where they are frozen, as autocast would cast them anyway.
    base = sum(shares.of(p) for p in model.transformer.parameters() if not p.requires_grad)
    frozen = sum(
        shares.of(p) * model.policy.storage_dtype(f"adapter.{n}").itemsize
        for n, p in model.adapter.named_parameters()
        if not p.requires_grad
    )
    return {
        "transformer": base * size,
        "VAE, CLIP, SigLIP": size * sum(map(count, (model.vae, model.text_encoder, model.siglip))),
        "T5": 0 if params.model.offload_text_encoder_two else size * count(model.text_encoder_2),
        "adapter, frozen": frozen,
        # In float32: a step of the optimizer is below what 16 bits can add to a weight.
        "trained weights": 4 * sum(shares.of(p) for p in trained.values()),
    }


def _shared_work(params: RunParams, model: MetaModel, *, trains: bool) -> dict[str, int]:
    """Return what only ranks that share the weights out need: nothing on others.

    The groups that are gathered while they run, and the trained shards that `Policy.use` sets
    aside while it runs another policy in their place.
    """
    shares = shares_of(params)
    if shares.ranks == 1:
        return {}
    own = 4 * sum(shares.of(p) for p in model.policy.parameters.values())
    uses = not trains or any(copies(params).values())
    return {"gathered": gathered_bytes(model, trains=trains), "set aside by use": own * uses}


def _training(params: RunParams, model: MetaModel, rows: int, eight_bit: bool) -> dict[str, int]:
    """Return the bytes of gradients, optimizer and activations.

    The last are the higher of two peaks: forward and backward, or torch's AdamW stepping.
    """
    shares = shares_of(params)
    weights = list(model.policy.parameters.values())
    gradients = 4 * sum(map(shares.of, weights))
    # Ranks that hold all weights copy their gradients into a bucket to add them up.
    bucket = min(gradients, max(BUCKET_BYTES, 4 * max((w.numel() for w in weights), default=0)))
    bucket *= params.launch.size > 1 and shares.ranks == 1
    batch = batch_of(params, model, rows)
    peak = training_peak(model, batch, checkpointing=params.model.gradient_checkpointing)
    return {
        "gradients": gradients,
        "optimizer": optimizer_bytes(weights, eight_bit, shares),
        # No activation is left when the optimizer steps, so the two peaks do not add up. Torch's
        # AdamW needs a temporary copy of all weights then, the 8-bit one goes tensor by tensor.
        "activations": max(peak, 0 if eight_bit else gradients, bucket),
    }


def _update(params: RunParams, model: MetaModel) -> Memory:
    settings, held = params.update, held_bytes(model, shares_of(params))
    rows = params.images_per_round * sum(row_bytes(params, model).values())
    others = {name: held * needed for name, needed in copies(params).items()}
    training = _training(params, model, largest_forward(params), settings.use_8bit_adam)
    shared = _shared_work(params, model, trains=True)
    parts = others | {"rows of the round": rows} | shared | training
    return Memory("update", _fixed(params, model) | parts)


def _rollout(params: RunParams, model: MetaModel) -> Memory:
    """Return what lies there in a rollout, beside the weights of every stage.

    `old`, and the one other set of weights that is kept; the last update's gradients are still
    there.
    """
    shares = shares_of(params)
    rollout, held = params.rollout, held_bytes(model, shares)
    batch = batch_of(params, model, rollout.batch_size)
    pixels = batch.image * model.multiple**2
    sizes = row_bytes(params, model)
    # What is sampled stays until its shard is written, conditioning for its batch alone.
    rows = rollout.shard_size * sizes["sampled"] + rollout.batch_size * sizes["conditioning"]
    peak = max(
        forward_peak(model, batch),
        decode_peak(model, rollout.batch_size, pixels),
        t5_moved(params, model),
    )
    parts = {"old": held, "reference": held, "rows of the round": rows}
    parts |= _shared_work(params, model, trains=False)
    # The optimizer goes with its update; gradients stay in `.grad` until the next one's first step.
    gradients = 4 * sum(shares.of(p) for p in model.policy.parameters.values())
    return Memory(
        "rollout", _fixed(params, model) | parts | {"gradients": gradients, "activations": peak}
    )
