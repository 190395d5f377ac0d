"""What a round costs on N ranks: transformer calls, bytes moved, bytes written, time and money.

The counts follow from params alone and are exact where every optimizer step has something to
teach, all images have one shape and no image is left out; with `rollout.shared_trunk` those of the
rollout are means over where windows may lie. Time is a lower bound made of them: every GPU at the
given speed, nothing overlapped but what ranks that are set apart sample, and no time for encoders,
VAE, rewards, optimizer and files (`docs/scale.md`). Refills are in `Price.at_most` alone: how many
a round needs is not known before.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from torch import nn

from calligrapher.sizing.meta_model import MetaModel
from tasks.params.run_params import RunParams
from tasks.planning.batches import rows_of_a_policy, update_batches
from tasks.planning.memory import batch_of, copies, meta_model, row_bytes
from tasks.planning.work import forwards, sampling


@dataclass(frozen=True)
class Cost:
    """One round on `ranks` ranks. Rows are images of a call: a call of B images counts B.

    samplers: so many of them sample the next round while the others update; 0: all do all.
    """

    ranks: int
    samplers: int
    calls: dict[str, float]  # calls of the transformer by stage, of all ranks
    rows: dict[str, float]  # the same, each with its images
    busiest: dict[str, float]  # the same of the rank that ends last: what the stage waits for
    steps: int  # of the optimizer
    reduced: int  # bytes of gradients that a rank gives into the sum of each step; 0 alone
    tensors: int  # bytes of sampled tensors written per round, before compression

    def at(self, stage: str) -> int:
        """Return how many ranks do the stage `rollout` or `update`."""
        if not self.samplers:
            return self.ranks
        return self.samplers if stage == "rollout" else self.ranks - self.samplers

    def efficiency(self, stage: str) -> float:
        """Return the share of its ranks' time that is not spent on waiting for the busiest."""
        return self.rows[stage] / (self.at(stage) * self.busiest[stage])


@dataclass(frozen=True)
class Price:
    """Seconds of a round by what they are spent on, GPU hours, and money.

    total: of the round; the sum, or the longer of what goes on side by side. at_most: the same of a
    round that `rollout.refill` fills up as often and as far as it may.
    """

    seconds: dict[str, float]
    total: float
    at_most: float
    gpu_hours: float
    money: float | None


def cost(params: RunParams, ranks: int | None = None, samplers: int | None = None) -> Cost:
    """Reckon a round, from round 1 on; ranks, samplers: those of the params where None."""
    ranks = ranks or params.launch.size
    samplers = params.launch.rollout_processes if samplers is None else samplers
    sampling_ranks, training_ranks = samplers or ranks, ranks - samplers
    model = meta_model(params)
    u = params.update
    shards = sampling(params)
    batches = update_batches(params)
    per_pass = [
        batches[at : at + u.gradient_accumulation_steps]
        for at in range(0, len(batches), u.gradient_accumulation_steps)
    ]
    policies = 1 + sum(copies(params).values())
    calls = policies * params.rl.forwards_per_image(params.rollout.num_inference_steps)

    def rows_of(batch: range) -> int:
        held = params.rl.background_rows_of(len(batch))
        return policies * rows_of_a_policy(params, batch) + held

    sampled_by = [
        sum(shard.rows for shard in shards[rank::sampling_ranks]) for rank in range(sampling_ranks)
    ]
    trained_by_busiest = sum(
        max(
            sum(map(rows_of, step[rank::training_ranks]))
            for rank in range(min(training_ranks, len(step)))
        )
        for step in per_pass
    )
    passes, images = u.num_inner_epochs, params.images_per_round
    whole = 4 * sum(p.numel() for p in model.policy.parameters.values())
    return Cost(
        ranks=ranks,
        samplers=samplers,
        calls={
            "rollout": sum(shard.calls for shard in shards),
            "update": passes * (calls + (params.rl.background_rows_of(1) > 0)) * len(batches),
        },
        rows={"rollout": sum(sampled_by), "update": passes * sum(map(rows_of, batches))},
        busiest={"rollout": max(sampled_by), "update": passes * trained_by_busiest},
        steps=passes * len(per_pass),
        reduced=whole * (training_ranks > 1),
        tensors=images * row_bytes(params, model)["sampled"],
    )


def price(
    params: RunParams,
    found: Cost,
    *,
    tflops: float,
    bandwidth: float | None = None,
    hourly: float | None = None,
) -> Price:
    """Seconds of `found` with GPUs that do `tflops` 10^12 operations a second.

    bandwidth: GB/s of a rank's links, for a ring's sum of whole gradients (ddp); None: no time for
    it. hourly: price of a GPU hour.
    """
    told = forwards(params)
    linear, attention = forward_operations(params)
    rate = tflops * 1e12
    # A backward: gradients of inputs alone where weights are frozen, two products in attention; and
    # the blocks once more where they are not kept.
    again = params.model.gradient_checkpointing
    backward = linear * (1 + again) + attention * (2 + again)
    every = told.trained + told.old + told.reference
    trained = found.busiest["update"] * told.trained / every
    seconds = {
        "rollout": found.busiest["rollout"] * (linear + attention) / rate,
        "update": (found.busiest["update"] * (linear + attention) + trained * backward) / rate,
    }
    if bandwidth is not None:
        summing = found.at("update")
        ring = 2 * (summing - 1) / summing
        seconds["all-reduce"] = found.steps * ring * found.reduced / (bandwidth * 1e9)
    updating = sum(seconds.values()) - seconds["rollout"]

    def total(rollout: float) -> float:
        return max(rollout, updating) if found.samplers else rollout + updating

    hours = found.ranks * total(seconds["rollout"]) / 3600
    return Price(
        seconds,
        total=total(seconds["rollout"]),
        at_most=total(seconds["rollout"] * (1 + params.rollout.refill)),
        gpu_hours=hours,
        money=None if hourly is None else hours * hourly,
    )


def forward_operations(params: RunParams) -> tuple[int, int]:
    """Operations of one image's forward in matrices and in attention; a product and a sum are two.

    Norms, rotations and activations are left out.
    """
    model = meta_model(params)
    batch = batch_of(params, model, 1)
    tokens = {"image": batch.image, "text": batch.text, "joint": batch.image + batch.text, "row": 1}
    matrices = sum(
        2 * layer.in_features * layer.out_features * tokens[kind] for layer, kind in _layers(model)
    )
    blocks = len(model.adapter.attn_adapter)
    style = model.adapter.image_proj_mlp.num_tokens
    keys = tokens["joint"] ** 2 + batch.image * style
    return matrices, 4 * blocks * model.transformer.inner_dim * keys


def _layers(model: MetaModel) -> Iterator[tuple[nn.Linear, str]]:
    """Yield the transformer's linear layers, and which tokens go through them."""
    of_text = ("add_", "to_add_out", "ff_context", "context_embedder")
    for name, layer in model.transformer.named_modules():
        if not isinstance(layer, nn.Linear):
            continue
        if "norm" in name or "time_text_embed" in name:
            yield layer, "row"
        elif any(part in name for part in of_text):
            yield layer, "text"
        elif name.startswith("single_transformer_blocks"):
            yield layer, "joint"
        else:
            yield layer, "image"
