"""The one model call (noisy tokens, sigma, conditioning -> velocity) and the policies behind it.

A policy is a set of values for the trained weights (style adapter, LoRA) on one frozen base.
Switching swaps pointers, or copies shards where the model is shared out among ranks; the base is
never copied. `trained` lives in the model; `old`, `reference` and `ema` are plain dicts, of whole
tensors or of this rank's shards.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from calligrapher.errors import CheckpointError
from calligrapher.model import sharding
from calligrapher.model.ip_adapter import StyleAdapter
from calligrapher.ranks import ALONE, Ranks

Weights = dict[str, Tensor]
ADAPTER = "adapter."  # how the names of the style adapter's weights begin
INITIAL = "initial"  # `Policy.loaded` of weights as the model was built


@dataclass(frozen=True)
class Conditioning:
    """What the frozen encoders say of B rows; made once per case and cached."""

    prompt: Tensor  # [B, T, D] T5
    pooled: Tensor  # [B, P] CLIP
    style: Tensor  # [B, E] SigLIP of the reference
    masked: Tensor  # [B, L, 64 + 256] masked image and mask, packed
    image_ids: Tensor  # [L, 3]; the same for all rows

    def rows(self, index: Tensor | list[int]) -> "Conditioning":
        """The rows `index`, in that order."""
        picked = {
            f.name: getattr(self, f.name)[index] for f in fields(self) if f.name != "image_ids"
        }
        return Conditioning(**picked, image_ids=self.image_ids)

    def to(self, device: torch.device) -> "Conditioning":
        return Conditioning(*(getattr(self, f.name).to(device) for f in fields(self)))


class StyledTransformer(nn.Module):
    """Flux transformer and style adapter as one module, so that DDP or FSDP can wrap the call."""

    def __init__(self, transformer, adapter: StyleAdapter, guidance_scale: float):
        super().__init__()
        adapter.install(transformer)
        self.transformer, self.adapter = transformer, adapter
        self.guidance_scale = guidance_scale

    def forward(
        self, x: Tensor, sigma: Tensor, conditioning: Conditioning, styled: Tensor | None = None
    ) -> Tensor:
        """Return the velocity [B, L, 64] of x [B, L, 64] at sigma [B].

        `styled` [B] = 0 drops a row's style tokens.
        """
        c = conditioning
        dtype = c.masked.dtype
        tokens = self.adapter.tokens(c.style)
        if styled is not None:
            tokens = tokens * styled[:, None, None]
        return self.transformer(
            hidden_states=torch.cat([x.to(dtype), c.masked], dim=-1),
            encoder_hidden_states=c.prompt,
            pooled_projections=c.pooled,
            timestep=sigma.to(x.device),
            guidance=torch.full((len(x),), self.guidance_scale, device=x.device),
            img_ids=c.image_ids,
            txt_ids=torch.zeros(c.prompt.shape[1], 3, device=x.device),
            joint_attention_kwargs={"style_tokens": tokens},
        ).sample


class Policy:
    """A `StyledTransformer`, the names of its trained weights, and a way to run it under others."""

    def __init__(
        self,
        model: StyledTransformer,
        *,
        train_adapter: bool = True,
        autocast: torch.dtype | None = None,
    ):
        self.model = model
        self.autocast = autocast
        model.requires_grad_(False)
        for name, parameter in model.named_parameters():
            # A layer with a LoRA pair is itself left as it is; its weight is called base_layer.
            whole = train_adapter and name.startswith(ADAPTER) and ".base_layer." not in name
            if whole or "lora_" in name:
                parameter.requires_grad_(True)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._linear = {f"{n}.weight" for n, m in model.named_modules() if isinstance(m, nn.Linear)}
        self._used = 0  # depth of `use`
        self._sharers: Ranks = ALONE
        self.loaded: str | None = INITIAL
        """Digest of the weights loaded last and not changed since; lets a stage skip a load."""

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    @property
    def sharded(self) -> bool:
        """Whether each forward and backward is the work of all ranks together."""
        return not self._sharers.alone

    @property
    def keeps_whole(self) -> bool:
        """Whether this process gets whole weights of `snapshot`: it alone writes them."""
        return self._sharers.is_first

    def shard(self, ranks: Ranks, device: torch.device) -> None:
        """Share the weights out among `ranks`, onto their devices (FSDP2); alone, move them there.

        To be called before anything holds the parameters: they are others afterwards.
        """
        if ranks.alone:
            self.model.to(device)
            return
        names = list(self.parameters)
        sharding.shard(self.model, ranks, device)
        found = dict(self.model.named_parameters())
        self.parameters = {name: found[name] for name in names}
        self._sharers = ranks

    def storage_dtype(self, name: str) -> torch.dtype:
        """Return the smallest type for weights without gradient that changes no result.

        Autocast casts the matrix of a linear layer to its own type at every use, so it may as well
        be held in that; everything else is used in float32.
        """
        return self.autocast if self.autocast and name in self._linear else torch.float32

    def to_storage(self, weights: Mapping[str, Tensor]) -> Weights:
        """Return `weights` on the model's device in their `storage_dtype`, this rank's part alone.

        For policies that `use` runs often.
        """
        return {
            n: self.part(n, w).to(self.device, self.storage_dtype(n)) for n, w in weights.items()
        }

    def part(self, name: str, tensor: Tensor) -> Tensor:
        """Return what this rank holds of `tensor`, whole or a part already, as it holds the weight
        `name`."""
        like = self.parameters.get(name)
        return tensor if like is None else sharding.part_of(tensor, like)

    def whole(self, name: str, part: Tensor) -> Tensor:
        """Return the tensor that the ranks hold as they hold the weight `name`; all must ask."""
        return sharding.whole(sharding.as_shard(part, self.parameters[name]))

    def velocity(
        self, x: Tensor, sigma: Tensor, conditioning: Conditioning, styled: Tensor | None = None
    ) -> Tensor:
        """Predicted `noise - x0`: x [B, L, D], sigma [B] -> [B, L, D] in float32."""
        context = torch.autocast(x.device.type, self.autocast) if self.autocast else nullcontext()
        with context:
            return self.model(x, sigma, conditioning, styled).float()

    def snapshot(self, *, whole: bool = True) -> Weights:
        """Real copies of the trained weights, in float32, on the CPU; never an alias.

        Where they are sharded, all ranks must ask. They are gathered one by one, and the first rank
        alone gets them; the others get nothing. With `whole` False each gets what it holds.
        """
        kept: Weights = {}
        for name, parameter in self.parameters.items():
            tensor = sharding.whole(parameter) if whole else sharding.held(parameter)
            if self.keeps_whole or not whole:
                kept[name] = tensor.to("cpu", torch.float32, copy=True)
        return kept

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Make `weights` the trained ones. Raises CheckpointError unless names and shapes match."""
        assert not self._used, "load() inside use() would overwrite the weights in use."
        self._check(weights)
        self._put(weights)
        self.loaded = None

    @contextmanager
    def use(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        """Run a block under other weights, without gradient.

        The trained ones are put back whatever happens.
        """
        self._check(weights)  # before the first swap: a refused policy leaves the model alone
        self._used += 1
        try:
            swap = self._shards_of if self.sharded else self._swapped
            with swap(weights), torch.no_grad():
                yield
        finally:
            self._used -= 1

    @contextmanager
    def _swapped(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        own = {name: parameter.data for name, parameter in self.parameters.items()}
        try:
            # `.data` is swapped, not the Parameter: optimizer and peft hold that object. `.to`
            # copies nothing where the weights come from `to_storage`. Copying them into place would
            # need room for the trained ones meanwhile, and a second copy to bring those back.
            for name, parameter in self.parameters.items():
                parameter.data = weights[name].to(parameter.device, self.storage_dtype(name))
            yield
        finally:
            for name, parameter in self.parameters.items():
                parameter.data = own[name]

    @contextmanager
    def _shards_of(self, weights: Mapping[str, Tensor]) -> Iterator[None]:
        # FSDP gathers from storage of its own, which `.data` does not reach: shards are copied.
        own = {n: sharding.held(p).clone() for n, p in self.parameters.items()}
        try:
            self._put(weights, stored=True)
            yield
        finally:
            self._put(own)

    @torch.no_grad()
    def _put(self, weights: Mapping[str, Tensor], *, stored: bool = False) -> None:
        """Copy `weights` into the parameters; rounded to the type in which policies are stored."""
        for name, parameter in self.parameters.items():
            tensor = self.part(name, weights[name])
            if stored:
                tensor = tensor.to(self.storage_dtype(name))
            sharding.held(parameter).copy_(tensor)
        if self.sharded:
            sharding.reshard(self.model)

    def _check(self, weights: Mapping[str, Tensor]) -> None:
        differ = sorted(set(weights) ^ set(self.parameters))
        differ += [
            n
            for n, p in self.parameters.items()
            if n in weights and weights[n].shape not in (p.shape, sharding.held(p).shape)
        ]
        if differ:
            raise CheckpointError(
                f"The weights must be those of this model ({len(self.parameters)} tensors). "
                f"{len(differ)} are missing, unknown or of another shape, the first: {differ[:3]}. "
                "Were `model.lora` or `model.train_adapter` changed?"
            )


def velocity_once(
    policy: Policy, x: Tensor, sigma: Tensor, conditioning: Conditioning, alike: Tensor | None
) -> Tensor:
    """Return `policy.velocity`; rows of one number in `alike` [B] are equal, but for rounding, and
    the first of them is run for all.

    None: each row is run. A gradient is that of all rows, but for last bits.
    """
    if alike is None:
        return policy.velocity(x, sigma, conditioning)
    numbers = alike.tolist()
    distinct = list(dict.fromkeys(numbers))
    first = [numbers.index(number) for number in distinct]
    once = policy.velocity(x[first], sigma[first], conditioning.rows(first))
    return once[[distinct.index(number) for number in numbers]]
