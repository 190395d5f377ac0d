"""Advantage Weighted Matching: the flow-matching loss of pretraining, weighed by advantages.

The likelihood of an image has the surrogate `-mean((v - (noise - x0))^2)` at random noise; it is
raised for images of high advantage and lowered for the others. Legend: B rows.
"""

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from calligrapher.errors import InputError
from calligrapher.model.policy import Policy, Weights
from calligrapher.rl.algorithm import Losses
from calligrapher.rl.credit import credited, gain
from calligrapher.rl.forward_process import Following, ForwardProcess
from calligrapher.rl.rows import TrainRows

Weighting = Literal["uniform", "t", "t2", "huber", "ghuber"]
_GHUBER_POWER = 0.25


class AWMParams(ForwardProcess):
    """The settings of Advantage Weighted Matching.

    The learning rate, batch sizes and passes belong to the update stage.
    """

    clip_range: float | None = Field(
        None,
        gt=0,
        lt=1,
        description=(
            "The ratio of the surrogate likelihoods, trained over old, is clipped to 1 +- this; "
            "null = the advantage alone is the weight, which saves the old policy's forward."
        ),
    )
    weighting: Weighting = Field(
        "ghuber",
        description=(
            "How noise levels t are weighed: uniform; t; t2 (its square); huber: the root of the "
            "error, times t; ghuber: its fourth root, times 4 t."
        ),
    )
    adv_clip_max: float = Field(1.0, gt=0, description="Advantages are clipped to +- this.")
    old_policy: Following = Field(
        "copy",
        description=(
            "How the rollout policy follows the trained one after a round: as `nft.old_policy`. "
            "copy: rollouts are sampled by the trained policy."
        ),
    )

    name: ClassVar[str] = "awm"
    default_ema_decay: ClassVar[float] = 0.999

    @property
    def needs_old(self) -> bool:
        return self.clip_range is not None

    @property
    def lacks_for_stale(self) -> str | None:
        return "clip_range" if self.clip_range is None else None

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

        Noise and levels are fresh in each pass, per row or group. Where one forward serves as old
        and as reference it is run once; with `kl_coef` 0 the reference is not run.
        """
        count = self.forwards_per_image(num_steps)
        for at in self.noised_rows(rows, key, num_steps):
            target = at.noise - rows.x0
            old_log_prob = velocity_ref = None
            shares = self.kl_coef > 0 and reference is None
            if self.clip_range is not None or shares:
                with policy.use(old):
                    velocity = policy.velocity(at.x, at.sigma, rows.conditioning)
                old_log_prob = surrogate(velocity, target, at.sigma, self.weighting)
                velocity_ref = velocity if shares else None
            if self.kl_coef > 0 and reference is not None:
                with policy.use(reference):
                    velocity_ref = policy.velocity(at.x, at.sigma, rows.conditioning)
            velocity, outside = self.trained_velocity(
                policy, at.x, at.sigma, rows.conditioning, rows.background
            )
            judged = velocity
            if rows.credit is not None:
                credit = rows.credit.clamp(-self.adv_clip_max, self.adv_clip_max)
                judged = credited(velocity, credit)
            loss, metrics = awm_loss(
                surrogate(judged, target, at.sigma, self.weighting),
                rows.advantages,
                self,
                old_log_prob=old_log_prob,
                velocity=velocity,
                velocity_ref=velocity_ref,
                is_credited=rows.credit is not None,
            )
            loss, metrics = self.whole_loss(loss, metrics, outside)
            yield loss / count, metrics
        yield from self.untrained_steps(policy, rows, key, num_steps)


def surrogate(velocity: Tensor, target: Tensor, sigma: Tensor, weighting: Weighting) -> Tensor:
    """Return the surrogate of each row's log-likelihood, [B, ...] -> [B] in float32.

    target: `noise - x0`; sigma: [B]. Uniform is `-e` with `e = mean((velocity - target)^2)` in
    float64; t `-e t`; t2 `-e t^2`; huber `-(sqrt(e + 1e-10) - 1e-5) t`; ghuber
    `-((e + 1e-10)^p - 1e-10^p) t / p` with p = 1/4. Source: AWM, arXiv 2509.25050.
    """
    error = ((velocity.double() - target.double()) ** 2).flatten(1).mean(1)
    t, tiny, p = sigma.double(), 1e-10, _GHUBER_POWER
    match weighting:
        case "uniform":
            found = -error
        case "t":
            found = -error * t
        case "t2":
            found = -error * t**2
        case "huber":
            found = -((error + tiny).sqrt() - tiny**0.5) * t
        case "ghuber":
            found = -((error + tiny) ** p - tiny**p) * t / p
    return found.float()


def awm_loss(
    log_prob: Tensor,  # [B] the surrogate of the trained policy, with gradient
    advantages: Tensor,  # [B]
    params: AWMParams,
    *,
    old_log_prob: Tensor | None,  # [B], None only without a clip range
    velocity: Tensor,  # [B, ...] the trained policy's, with gradient
    velocity_ref: Tensor | None,  # [B, ...], None only when kl_coef == 0
    is_credited: bool = False,  # log_prob is one of a `credited` velocity
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return `policy + kl_coef * mean((v - v_ref)^2)`, a scalar, and detached 0-d metrics.

    policy: `mean(max(-A ratio, -A clamp(ratio, 1 - c, 1 + c)))`, `ratio = exp(log_prob - old)`;
    without a clip range `mean(-A log_prob)`, which has the same gradient where trained is old.
    Metrics: policy_loss, surrogate_mean, kl (where the reference ran), and with a clip range
    clip_fraction, ratio_mean, ratio_max_dev. Raises InputError where a policy that the settings
    ask for is missing. Source: AWM (arXiv 2509.25050), as in Flow-Factory's trainer.
    """
    if params.kl_coef > 0 and velocity_ref is None:
        raise InputError(f"kl_coef = {params.kl_coef} needs velocity_ref. Got None.")
    advantages = advantages.detach().float().clamp(-params.adv_clip_max, params.adv_clip_max)
    metrics = {"surrogate_mean": log_prob.mean()}
    if params.clip_range is None:
        policy = loss = -gain(advantages, log_prob, is_credited=is_credited).mean()
    else:
        if old_log_prob is None:
            raise InputError(f"clip_range = {params.clip_range} needs old_log_prob. Got None.")
        ratio = (log_prob - old_log_prob.detach()).exp()
        deviation = (ratio - 1.0).abs()
        if is_credited:
            beyond = (deviation > params.clip_range) & (advantages * (ratio - 1.0) > 0)
            per_row = (-gain(advantages, ratio, is_credited=True)).masked_fill(beyond, 0.0)
        else:
            clipped = ratio.clamp(1.0 - params.clip_range, 1.0 + params.clip_range)
            per_row = torch.maximum(-advantages * ratio, -advantages * clipped)
        policy = loss = per_row.mean()
        metrics |= {
            "clip_fraction": (deviation > params.clip_range).float().mean(),
            "ratio_mean": ratio.mean(),
            "ratio_max_dev": deviation.max(),
        }
    metrics["policy_loss"] = policy
    if velocity_ref is not None:
        metrics["kl"] = ((velocity - velocity_ref.detach().float()) ** 2).mean()
        if params.kl_coef > 0:
            loss = policy + params.kl_coef * metrics["kl"]
    return loss, {name: value.detach() for name, value in metrics.items()}
