"""DiffusionNFT: pull the velocity to images of high advantage, push it from those of low.

Legend: B rows, K noise levels drawn per row. `v_old` sampled the rollouts; the loss moves `v`
relative to it.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from calligrapher.errors import InputError
from calligrapher.model.policy import Policy, Weights
from calligrapher.rl.algorithm import Algorithm, Losses
from calligrapher.rl.ema import OldPolicy, old_policy_decay
from calligrapher.rl.rows import TrainRows, noised
from calligrapher.rl.seeds import seeded
from calligrapher.sampling.schedule import sigma_schedule, trained_steps

AdvMode = Literal["normal", "positive_only", "negative_only", "one_only", "binary"]
DECAY_TYPES: dict[int, OldPolicy] = {0: "fixed", 1: "slow", 2: "fast"}


class NFTParams(Algorithm):
    """The settings of DiffusionNFT.

    The learning rate, batch sizes and passes belong to the update stage.
    """

    nft_beta: float = Field(
        0.5,
        gt=0,
        le=1,
        description=(
            "Mixing of the trained and the old velocity in the positive and negative branch: "
            "0.3-0.5 leans on the old policy, 0.7-0.9 on the trained one."
        ),
    )
    kl_coef: float = Field(
        0.01,
        ge=0,
        description="Weight of mean((v - v_ref)^2). 0 saves the reference's forward.",
    )
    adv_clip_max: float = Field(
        5.0,
        gt=0,
        description=(
            "Advantages are clipped to +- this and mapped linearly onto r in [0, 1]; also scales"
            " the policy loss."
        ),
    )
    adv_mode: AdvMode = Field(
        "normal",
        description=(
            "normal: A; positive_only: clamp(A, 0, c); negative_only: clamp(A, -c, 0); one_only: 1 "
            "where A > 0, else 0; binary: sign(A). With c = adv_clip_max."
        ),
    )
    num_train_sigmas: int | None = Field(
        None,
        ge=1,
        description=(
            "Noise levels trained per image and update, drawn anew for each; null = all of"
            " timestep_fraction. The cost knob: each costs a forward+backward and the old and"
            " reference forwards."
        ),
    )
    timestep_fraction: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of the schedule, from its noisy end, that noise levels are drawn from.",
    )
    noise: Literal["row", "group"] = Field(
        "row",
        description=(
            "Noise and noise levels are drawn for every image, or once for all images of a group: "
            "what does not depend on the image then cancels, for a group's advantages add up to 0."
            " What is drawn does not depend on batches."
        ),
    )
    old_policy: OldPolicy = Field(
        "fixed",
        description=(
            "How the rollout policy follows the trained one after a round. fixed: never; slow:"
            " decay 0.001 t up to 0.5; fast: copies for 75 steps, then a decay of 0.0075 (t - 75)"
            " up to 0.999; copy: always. The numbers 0, 1, 2 (nft_decay_type) stand for fixed,"
            " slow, fast."
        ),
    )

    @field_validator("old_policy", mode="before")
    @classmethod
    def _decay_type(cls, value: Any) -> Any:
        if isinstance(value, int) and not isinstance(value, bool):
            return DECAY_TYPES.get(value, value)
        return value

    name: ClassVar[str] = "nft"
    default_ema_decay: ClassVar[float] = 0.999
    usual: ClassVar[dict[str, Any]] = {"old_policy": "slow"}
    needs_old: ClassVar[bool] = True
    update_version: ClassVar[int] = 2  # 1 drew noise batch by batch

    @property
    def exploration(self) -> None:
        return None

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def old_is_start(self) -> bool:
        return self.old_policy == "fixed"

    def losses(
        self,
        policy: Policy,
        rows: TrainRows,
        key: str,
        *,
        num_steps: int,
        old: Weights | None,
        reference: Weights | None,
    ) -> Losses:
        """Yield a loss for each of `num_train_sigmas` noise levels.

        Noise and levels are fresh in each pass, per row or group. With `reference` None the old
        policy's forward is the reference's as well; with `kl_coef` 0 the reference is not run.
        """
        schedule = sigma_schedule(num_steps, rows.x0.shape[1])
        # Rows of one name share what is drawn.
        names = [f"{key}/{group}/{member}" for group, member in rows.places.tolist()]
        if self.noise == "group":
            names = [f"{key}/{group}" for group, _ in rows.places.tolist()]
        sigmas_KB = _drawn(names, lambda name: train_sigmas(schedule, self, seeded(name, "sigmas")))
        sigmas_KB = sigmas_KB.T.to(rows.x0.device)
        for k, sigma in enumerate(sigmas_KB):
            noise = _drawn(names, partial(_noise, rows.x0.shape[1:], k)).to(rows.x0.device)
            x = noised(rows.x0, sigma, noise)
            with policy.use(old):
                velocity_old = velocity_ref = policy.velocity(x, sigma, rows.conditioning)
            if self.kl_coef == 0:
                velocity_ref = None
            elif reference is not None:
                with policy.use(reference):
                    velocity_ref = policy.velocity(x, sigma, rows.conditioning)
            velocity = policy.velocity(x, sigma, rows.conditioning)
            loss, metrics = nft_loss(
                velocity,
                rows.advantages,
                self,
                velocity_old=velocity_old,
                velocity_ref=velocity_ref,
                x0=rows.x0,
                x=x,
                sigma=sigma,
            )
            yield loss / len(sigmas_KB), metrics | {"loss": loss.detach()}

    @property
    def decides_old(self) -> dict[str, Any]:
        return {"old_policy": self.old_policy}

    def old_policy_decay(self, step: int) -> float:
        return old_policy_decay(self.old_policy, step)

    def forwards_per_image(self, num_steps: int) -> int:
        return self.num_train_sigmas or trained_steps(num_steps, self.timestep_fraction)

    def fits(self, num_steps: int) -> None:
        available = trained_steps(num_steps, self.timestep_fraction)
        if self.num_train_sigmas is not None and self.num_train_sigmas > available:
            raise ValueError(
                f"nft.num_train_sigmas must be at most {available} (nft.timestep_fraction of"
                f" {num_steps} rollout.num_inference_steps). Got {self.num_train_sigmas}."
            )


def nft_loss(
    velocity: Tensor,  # [B, ...] the trained policy's, with gradient
    advantages: Tensor,  # [B]
    params: NFTParams,
    *,
    velocity_old: Tensor,  # [B, ...]
    velocity_ref: Tensor | None,  # [B, ...], None only when kl_coef == 0
    x0: Tensor,  # [B, ...] the rollout's clean latent
    x: Tensor,  # [B, ...] = (1 - sigma) x0 + sigma noise
    sigma: Tensor,  # [B]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return `policy + kl_coef * kl`, a scalar, and detached 0-d metrics.

    The loss has the gradient of `velocity` alone.

    Metrics: policy_loss, kl (absent without velocity_ref), old_distance = mean((v - v_old)^2),
    r_mean, positive_share (rows with r > 0.5). At v == v_old a row with r = 0.5 has exactly zero
    policy gradient. Raises InputError when kl_coef > 0 comes without velocity_ref or when the rows
    of the inputs differ. Source: DiffusionNFT (arXiv 2509.16117), `train_nft_sd3.py`.
    """
    if velocity_ref is None and params.kl_coef > 0:
        raise InputError(
            f"kl_coef = {params.kl_coef} needs velocity_ref. Got None. Give it, or set kl_coef"
            " to 0."
        )
    rows = velocity.shape[0]
    if sigma.shape != (rows,) or advantages.shape != (rows,):
        raise InputError(
            f"sigma and advantages must be [{rows}]. Got {tuple(sigma.shape)} and"
            f" {tuple(advantages.shape)}."
        )
    velocity, x = velocity.float(), x.detach().float()
    velocity_old, x0 = velocity_old.detach().float(), x0.detach().float()
    sigma = sigma.detach().float().view(-1, *[1] * (velocity.ndim - 1))
    r = reward_weight(advantages.detach().double(), params)

    # Written as old +- beta * (v - old), so that both branches are bit-equal at v == old.
    offset = params.nft_beta * (velocity - velocity_old)
    positive = _normalised_error(x - sigma * (velocity_old + offset), x0)
    negative = _normalised_error(x - sigma * (velocity_old - offset), x0)
    per_row = (r * positive + (1.0 - r) * negative) / params.nft_beta * params.adv_clip_max
    policy = loss = per_row.mean()
    metrics = {
        "policy_loss": policy,
        "old_distance": ((velocity - velocity_old) ** 2).mean(),
        "r_mean": r.mean(),
        "positive_share": (r > 0.5).double().mean(),
    }
    if velocity_ref is not None:
        metrics["kl"] = ((velocity - velocity_ref.detach().float()) ** 2).mean()
        if params.kl_coef > 0:
            loss = policy + params.kl_coef * metrics["kl"]
    return loss, {name: value.detach() for name, value in metrics.items()}


def reward_weight(advantages: Tensor, params: NFTParams) -> Tensor:
    """Return r in [0, 1], the weight of the positive branch, of each advantage; [B] -> [B].

    0.5 is indifferent.
    """
    c = params.adv_clip_max
    clipped = advantages.clamp(-c, c)
    match params.adv_mode:
        case "positive_only":
            clipped = clipped.clamp(min=0.0)
        case "negative_only":
            clipped = clipped.clamp(max=0.0)
        case "one_only":
            clipped = (clipped > 0).to(clipped.dtype)
        case "binary":
            clipped = clipped.sign()
    return (clipped / c / 2.0 + 0.5).clamp(0.0, 1.0)


def train_sigmas(sigmas: Tensor, params: NFTParams, generator: torch.Generator) -> Tensor:
    """Noise levels to train a row on, [K]: different ones, drawn without replacement.

    sigmas: the schedule [N + 1], ending in 0, which is never drawn. K = num_train_sigmas, or all
    that timestep_fraction leaves. Raises InputError when more are asked for than there are.
    """
    available = trained_steps(len(sigmas) - 1, params.timestep_fraction)
    count = available if params.num_train_sigmas is None else params.num_train_sigmas
    if count > available:
        raise InputError(
            f"num_train_sigmas must be at most {available} (timestep_fraction of {len(sigmas) - 1}"
            f" steps). Got {count}. Lower it, or raise the number of steps or timestep_fraction."
        )
    return sigmas[torch.randperm(available, generator=generator)[:count].to(sigmas.device)]


def _drawn(names: list[str], draw: Callable[[str], Tensor]) -> Tensor:
    """Return what `draw` gives for each name, [B, ...]; equal names share one draw."""
    drawn = {name: draw(name) for name in dict.fromkeys(names)}
    return torch.stack([drawn[name] for name in names])


def _noise(shape: torch.Size, k: int, name: str) -> Tensor:
    """Return the noise of a row's k-th noise level, drawn on the CPU."""
    return torch.randn(shape, generator=seeded(name, k))


def _normalised_error(x0_hat: Tensor, x0: Tensor) -> Tensor:
    """Return the squared error over the row's detached mean absolute error, [B, ...] -> [B].

    Computed in float64.
    """
    error = (x0_hat - x0).flatten(1).double()
    weight = error.detach().abs().mean(1).clamp(min=1e-5)
    return (error**2).mean(1) / weight
