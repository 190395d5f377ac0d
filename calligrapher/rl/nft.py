"""DiffusionNFT: pull the velocity to images of high advantage, push it from those of low.

Legend: B rows, K noise levels drawn per row. `v_old` sampled the rollouts; the loss moves `v`
relative to it.
"""

from typing import Any, ClassVar, Literal

from pydantic import Field
from torch import Tensor

from calligrapher.errors import InputError
from calligrapher.model.policy import Policy, Weights
from calligrapher.rl.algorithm import Losses
from calligrapher.rl.forward_process import ForwardProcess
from calligrapher.rl.rows import TrainRows

AdvMode = Literal["normal", "positive_only", "negative_only", "one_only", "binary"]


class NFTParams(ForwardProcess):
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

    name: ClassVar[str] = "nft"
    default_ema_decay: ClassVar[float] = 0.999
    usual: ClassVar[dict[str, Any]] = {"old_policy": "slow"}
    update_version: ClassVar[int] = 2  # 1 drew noise batch by batch

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
        """Yield a loss for each of `num_train_sigmas` noise levels, and the background's.

        Noise and levels are fresh in each pass, per row or group. With `reference` None the old
        policy's forward is the reference's as well; with `kl_coef` 0 the reference is not run.
        """
        count = self.forwards_per_image(num_steps)
        for at in self.noised_rows(rows, key, num_steps):
            with policy.use(old):
                velocity_old = velocity_ref = policy.velocity(at.x, at.sigma, rows.conditioning)
            if self.kl_coef == 0:
                velocity_ref = None
            elif reference is not None:
                with policy.use(reference):
                    velocity_ref = policy.velocity(at.x, at.sigma, rows.conditioning)
            velocity, outside = self.trained_velocity(
                policy, at.x, at.sigma, rows.conditioning, rows.background
            )
            loss, metrics = nft_loss(
                velocity,
                rows.advantages if rows.credit is None else rows.credit,
                self,
                velocity_old=velocity_old,
                velocity_ref=velocity_ref,
                x0=rows.x0,
                x=at.x,
                sigma=at.sigma,
            )
            loss, metrics = self.whole_loss(loss, metrics, outside)
            yield loss / count, metrics
        yield from self.untrained_steps(policy, rows, key, num_steps)


def nft_loss(
    velocity: Tensor,  # [B, ...] the trained policy's, with gradient
    advantages: Tensor,  # [B], or [B, ...] by place
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
    if sigma.shape != (rows,) or advantages.shape not in ((rows,), velocity.shape):
        raise InputError(
            f"sigma must be [{rows}], and advantages the same or {list(velocity.shape)}. Got"
            f" {list(sigma.shape)} and {list(advantages.shape)}."
        )
    velocity, x = velocity.float(), x.detach().float()
    velocity_old, x0 = velocity_old.detach().float(), x0.detach().float()
    sigma = sigma.detach().float().view(-1, *[1] * (velocity.ndim - 1))
    r = reward_weight(advantages.detach().double(), params)

    # Written as old +- beta * (v - old), so that both branches are bit-equal at v == old.
    offset = params.nft_beta * (velocity - velocity_old)
    positive = _weighed_error(x - sigma * (velocity_old + offset), x0, r)
    negative = _weighed_error(x - sigma * (velocity_old - offset), x0, 1.0 - r)
    per_row = (positive + negative) / params.nft_beta * params.adv_clip_max
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
    """Return r in [0, 1], the weight of the positive branch, of each advantage.

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


def _weighed_error(x0_hat: Tensor, x0: Tensor, r: Tensor) -> Tensor:
    """Return r times the squared error over the row's detached mean absolute error, [B].

    x0_hat, x0: [B, ...]; r: [B], or as they are. Computed in float64.
    """
    error = (x0_hat - x0).flatten(1).double()
    weight = error.detach().abs().mean(1).clamp(min=1e-5)
    if r.ndim == 1:
        return r * ((error**2).mean(1) / weight)
    return (r.flatten(1) * error**2).mean(1) / weight
