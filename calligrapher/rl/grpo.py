"""Flow-GRPO: the clipped policy-gradient loss on a rollout's stochastic steps.

Legend: B rows, L image tokens, D packed channels. Optional GRPO-Guard ratio. Which steps those
are: `calligrapher.sampling.exploration`.
"""

from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from calligrapher.errors import InputError
from calligrapher.model.policy import Policy, Weights, velocity_once
from calligrapher.rl.algorithm import Algorithm, Losses
from calligrapher.rl.credit import credited, drawn, gain
from calligrapher.rl.held_background import HeldBackground
from calligrapher.rl.kl import KLToReference
from calligrapher.rl.rows import TrainRows
from calligrapher.sampling.exploration import Exploration, stochastic_step, window_length
from calligrapher.sampling.schedule import sigma_schedule


class GRPOParams(Exploration, HeldBackground, KLToReference, Algorithm):
    """The settings of Flow-GRPO. The learning rate, batch sizes and passes belong to the update
    stage."""

    clip_range: float = Field(
        0.2,
        gt=0,
        lt=1,
        description=(
            "The ratio is clipped to 1 +- this. Ratios here live within about 1 +- 1e-4, so 0.2"
            " never clips; 1e-5 to 1e-3 does (2e-6 to 4e-6 with guard). See clip_fraction and"
            " ratio_max_dev. With trust_region dppo it is the largest divergence instead."
        ),
    )
    trust_region: Literal["clip", "guard", "dppo"] = Field(
        "clip",
        description=(
            "What bounds an update. clip: the ratio; guard: GRPO-Guard's ratio, as guard: true;"
            " dppo: a row whose step mean lies further than clip_range from the old one, as a"
            " squared distance over twice the variance, and would go on, is left out."
        ),
    )
    kl_coef: float = Field(
        0.1,
        ge=0,
        description="Weight of the KL to the frozen reference. 0 saves the reference's forward.",
    )
    kl_space: Literal["mean", "velocity"] = Field(
        "mean",
        description=(
            "What the KL compares: the means of a step, over its variance, or the velocities"
            " themselves, which weighs all noise levels alike."
        ),
    )
    adv_clip_max: float = Field(5.0, gt=0, description="Advantages are clipped to +- this.")

    direction: Literal["noise", "image"] = Field(
        "noise",
        description=(
            "Along what an advantage moves a step's mean: the noise that it explored, as published,"
            " or what came of it: how the clean image differs from the mean of its group's, which"
            " on the embedded model is far less noisy a gradient. For noise: group."
        ),
    )
    importance_cap: float | None = Field(
        None,
        ge=1,
        description=(
            "Weigh each row by how much likelier its steps are under the policy that the update"
            " begins with than under the one that sampled, at most so much, and bound the update"
            " around the former; null = they are taken for one. For rollout.staleness. Costs as"
            " recompute_log_prob."
        ),
    )
    recompute_log_prob: bool = Field(
        False,
        description=(
            "Reckon the old log-probabilities and means anew, in the update's own batches under the"
            " policy that sampled, in place of the rollout's: the ratio is then 1 before the first"
            " step whatever the precision and the batch sizes. Costs a forward per image and step"
            " of the window, and that policy's weights in memory."
        ),
    )

    name: ClassVar[str] = "grpo"
    default_ema_decay: ClassVar[float] = 0.9999

    @model_validator(mode="after")
    def _one_trust_region(self) -> Self:
        if self.guard and self.trust_region == "dppo":
            raise ValueError(
                "guard must be false with trust_region 'dppo'. Got true: both bound an update."
            )
        if self.trust_region == "guard" and self.sampler == "cps":
            raise ValueError(
                "trust_region must be clip or dppo with sampler 'cps'. Got 'guard': the"
                " log-probability of cps has no variance to undo."
            )
        return self

    @model_validator(mode="after")
    def _images_can_give_a_direction(self) -> Self:
        if self.direction == "image" and self.noise != "group":
            raise ValueError(
                "noise must be 'group' with direction 'image': images that start from noise of"
                f" their own differ by it. Got {self.noise!r}."
            )
        if self.direction == "image" and self.bounds == "guard":
            raise ValueError(
                "direction must be 'noise' where the guard bounds an update, whose exponent has a"
                " gradient beside the log-probability's. Got 'image'."
            )
        return self

    @model_validator(mode="after")
    def _reckons_anew_once(self) -> Self:
        if self.recompute_log_prob and self.importance_cap is not None:
            raise ValueError(
                "recompute_log_prob must be false with importance_cap, which reckons the"
                " log-probabilities anew as well. Got true."
            )
        return self

    @property
    def bounds(self) -> Literal["clip", "guard", "dppo"]:
        """What bounds an update, whichever key says so."""
        return "guard" if self.guard else self.trust_region

    @property
    def credits_places(self) -> bool:
        return self.bounds != "guard"  # its exponent has a gradient beside the log-probability's

    @property
    def compares_images(self) -> bool:
        return self.direction == "image"

    @property
    def keeps_means(self) -> bool:
        return self.bounds != "clip"

    @property
    def exploration(self) -> Exploration:
        return self

    @property
    def needs_old(self) -> bool:
        # Else the rollout wrote down what is needed of it.
        return self.recompute_log_prob or self.old_is_trained

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def old_is_start(self) -> bool:
        return False

    @property
    def old_is_trained(self) -> bool:
        return self.importance_cap is not None

    @property
    def lacks_for_stale(self) -> str | None:
        return "importance_cap" if self.importance_cap is None else None

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
        """Yield a loss for every step of the rows' windows, then the background's elsewhere.

        Nothing of the windows is drawn from `key`: their noise was the rollout's.
        """
        window = rows.window
        sigma_max = sigma_schedule(num_steps, rows.x0.shape[1])[1].item()
        steps = window.log_prob.shape[1]
        for j in range(steps):
            x, x_next = window.trajectory[:, j], window.trajectory[:, j + 1]
            sigma, sigma_next = window.sigmas[:, j], window.sigmas[:, j + 1]
            levels = sigma, sigma_next, sigma_max
            sampled_log_prob = old_log_prob = window.log_prob[:, j]
            mean_old = window.mean[:, j]
            alike = window.trunks if j == 0 else None
            mean_ref = velocity_ref = None
            if self.needs_old:
                with policy.use(old):
                    velocity_ref = velocity_once(policy, x, sigma, rows.conditioning, alike)
                    old_log_prob, mean_old, _ = _score(velocity_ref, x, x_next, *levels, self)
                mean_ref = mean_old
            if self.kl_coef == 0:
                mean_ref = None
            elif reference is not None:
                with policy.use(reference):
                    velocity_ref = velocity_once(policy, x, sigma, rows.conditioning, alike)
                    _, mean_ref, _ = _score(velocity_ref, x, x_next, *levels, self)
            velocity, outside = self.trained_velocity(
                policy, x, sigma, rows.conditioning, rows.background, alike=alike
            )
            log_prob, mean, std = _score(velocity, x, x_next, *levels, self)
            credit = rows.credit
            if credit is None and self.compares_images:
                credit = rows.advantages[:, None, None]
            if credit is not None:
                credit = credit.clamp(-self.adv_clip_max, self.adv_clip_max)
            if self.compares_images:
                # As the sampler's own log-probability weighs its noise.
                precision = 2.0 if self.sampler == "cps" else std[:, None, None] ** -2
                log_prob = drawn(log_prob, mean, precision * credit * rows.deviation)
            elif credit is not None:
                log_prob, _, _ = _score(credited(velocity, credit), x, x_next, *levels, self)
            loss, metrics = grpo_loss(
                log_prob,
                old_log_prob,
                rows.advantages,
                self,
                mean=mean,
                mean_ref=mean_ref,
                mean_old=mean_old,
                std=std,
                dt=sigma_next - sigma,
                velocity=velocity,
                velocity_ref=velocity_ref,
                is_credited=credit is not None,
                sampled_log_prob=sampled_log_prob,
            )
            loss, metrics = self.whole_loss(loss, metrics, outside)
            yield loss / steps, metrics
        yield from self.untrained_steps(policy, rows, key, num_steps)

    def old_policy_decay(self, step: int, round_index: int) -> float:
        """Return 0: the trained weights sample the next round."""
        return 0.0

    def forwards_per_image(self, num_steps: int) -> int:
        return window_length(num_steps, self.window_size, self.timestep_fraction)

    def steps_trained(self, num_steps: int) -> int:
        """Return how many steps a window may hold; the last one has no noise to explore with."""
        return min(super().steps_trained(num_steps), num_steps - 1)

    def fits(self, num_steps: int) -> None:
        super().fits(num_steps)
        try:
            self.forwards_per_image(num_steps)
        except InputError as error:
            raise ValueError(
                f"grpo.window_size does not fit rollout.num_inference_steps: {error}"
            ) from None


def grpo_loss(
    log_prob: Tensor,  # [B] of the trained policy, with gradient
    old_log_prob: Tensor,  # [B] of the policy around which the update is bounded
    advantages: Tensor,  # [B]
    params: GRPOParams,
    *,
    mean: Tensor | None = None,  # [B, ...] the trained policy's step mean, with gradient
    mean_ref: Tensor | None = None,  # [B, ...] the reference's
    mean_old: Tensor | None = None,  # [B, ...] that of old_log_prob's policy
    std: (
        float | Tensor | None
    ) = None,  # [] or [B], Step.std (that is S, the square root of -dt included)
    dt: float | Tensor | None = None,  # [] or [B], sigma_next - sigma (negative)
    velocity: Tensor | None = None,  # [B, ...] the trained policy's, with gradient
    velocity_ref: Tensor | None = None,  # [B, ...] the reference's
    is_credited: bool = False,  # log_prob's gradient holds the advantages: `credited`, `drawn`
    sampled_log_prob: Tensor | None = None,  # [B] of the policy that sampled, for importance_cap
) -> tuple[Tensor, dict[str, Tensor]]:
    """`policy + kl_coef * kl`, a scalar with gradient, and detached 0-d metrics, for the rows of
    one step.

    `kl_coef > 0` needs mean, mean_ref, std (and dt but with the cps sampler), or with `kl_space`
    velocity the two velocities; the guard needs mean, mean_old, std and dt, dppo all of them but
    dt. Metrics: policy_loss, clip_fraction (rows whose ratio, with dppo whose divergence, lies
    outside the clip range), approx_kl = mean((log_prob - old_log_prob)^2) / 2, ratio_mean,
    ratio_max_dev = max |ratio - 1|, kl (when computed); with importance_cap importance_mean and
    importance_max_dev, the same of the rows' weights. Before the first optimizer step of a round
    ratio == 1 and approx_kl == 0, exactly on the CPU. Raises InputError for missing or wrongly
    shaped inputs. Source: Flow-GRPO (arXiv 2505.05470), `train_flux.py`; GRPO-Guard (arXiv
    2510.22319); decoupled PPO as in AReaL (arXiv 2505.24298).
    """
    if not log_prob.ndim == 1 or not log_prob.shape == old_log_prob.shape == advantages.shape:
        raise InputError(
            "log_prob, old_log_prob and advantages must all be [B]. "
            f"Got {tuple(log_prob.shape)}, {tuple(old_log_prob.shape)}, {tuple(advantages.shape)}."
        )
    log_prob = log_prob.float()
    log_ratio = log_prob - old_log_prob.detach().float()
    advantages = advantages.detach().float().clamp(-params.adv_clip_max, params.adv_clip_max)

    exponent, weight = log_ratio, 1.0
    if params.bounds == "guard":
        _need("guard", mean=mean, mean_old=mean_old, std=std, dt=dt)
        std_B, dt_B = _per_row(std, log_prob), _per_row(dt, log_prob)
        exponent = (log_ratio + _distance(mean, mean_old) / (2.0 * std_B**2)) * std_B
        weight = 1.0 / -dt_B
    ratio = exponent.exp()
    deviation = (ratio - 1.0).abs()
    if params.bounds == "dppo":
        _need("trust_region 'dppo'", mean=mean, mean_old=mean_old, std=std)
        divergence = _distance(mean, mean_old) / (2.0 * _per_row(std, log_prob) ** 2)
        far = divergence.detach() > params.clip_range
    else:
        far = deviation > params.clip_range
    if params.bounds == "dppo" or is_credited:
        beyond = far & (advantages * (ratio - 1.0) > 0)
        gained = gain(advantages, ratio, is_credited=is_credited)
        per_row = (-gained).masked_fill(beyond, 0.0)
    else:
        clipped = ratio.clamp(1.0 - params.clip_range, 1.0 + params.clip_range)
        per_row = torch.maximum(-advantages * ratio, -advantages * clipped)
    importance = {}
    if params.importance_cap is not None:
        _need("importance_cap", sampled_log_prob=sampled_log_prob)
        likelier = (old_log_prob.float() - sampled_log_prob.float()).detach().exp()
        likelier = likelier.clamp(max=params.importance_cap)
        weight = weight * likelier
        importance = {
            "importance_mean": likelier.mean(),
            "importance_max_dev": (likelier - 1.0).abs().max(),
        }
    policy = loss = (per_row * weight).mean()
    metrics = importance | {
        "policy_loss": policy,
        "clip_fraction": far.float().mean(),
        "approx_kl": 0.5 * (log_ratio**2).mean(),
        "ratio_mean": ratio.mean(),
        "ratio_max_dev": deviation.max(),
    }
    if params.kl_space == "velocity" and params.kl_coef > 0:
        _need("kl_space 'velocity'", velocity=velocity, velocity_ref=velocity_ref)
        metrics["kl"] = _distance(velocity, velocity_ref).mean()
    elif params.kl_coef > 0 or mean_ref is not None:
        metrics["kl"] = _reference_kl(log_prob, params, mean, mean_ref, std, dt)
    if params.kl_coef > 0:
        loss = policy + params.kl_coef * metrics["kl"]
    return loss, {name: value.detach() for name, value in metrics.items()}


def _reference_kl(log_prob: Tensor, params: GRPOParams, mean, mean_ref, std, dt) -> Tensor:
    """`mean((mu - mu_ref)^2) / (2 std_dev^2)`: std_dev is `S / sqrt(-dt)` for the SDEs and `S`
    for CPS."""
    _need("kl_coef > 0", mean=mean, mean_ref=mean_ref, std=std)
    variance = _per_row(std, log_prob) ** 2
    if params.sampler != "cps":
        _need(f"the KL of the {params.sampler} sampler", dt=dt)
        variance = variance / -_per_row(dt, log_prob)
    return (_distance(mean, mean_ref) / (2.0 * variance)).mean()


def _distance(mean: Tensor, other: Tensor) -> Tensor:
    """[B, ...] -> [B]: the mean squared distance of each row; `other` carries no gradient."""
    return ((mean.float() - other.detach().float()) ** 2).flatten(1).mean(1)


def _per_row(value: float | Tensor, like: Tensor) -> Tensor:
    value = torch.as_tensor(value, dtype=torch.float32, device=like.device).detach()
    if value.ndim > 0 and value.shape != like.shape:
        raise InputError(
            f"std and dt must be scalars or {tuple(like.shape)}. Got {tuple(value.shape)}."
        )
    return value.expand_as(like)


def _need(reason: str, **inputs: object) -> None:
    missing = [name for name, value in inputs.items() if value is None]
    if missing:
        raise InputError(f"{reason} needs {', '.join(inputs)}. Missing: {', '.join(missing)}.")


def _score(
    velocity: Tensor,
    x: Tensor,
    x_next: Tensor,
    sigma: Tensor,
    sigma_next: Tensor,
    sigma_max: float,
    exploration: Exploration,
) -> tuple[Tensor, Tensor, Tensor]:
    """log_prob [B], mean [B, L, D] and std [B] of landing on `x_next`; rows may differ in noise
    level."""
    log_prob, mean, std = (
        velocity.new_empty(len(x)),
        torch.empty_like(velocity),
        velocity.new_empty(len(x)),
    )
    for level in sigma.unique():
        index = (sigma == level).nonzero()[:, 0]
        step = stochastic_step(
            velocity[index],
            x[index],
            level.item(),
            sigma_next[index[0]].item(),
            sigma_max,
            exploration,
            x_next=x_next[index],
        )
        log_prob = log_prob.index_copy(0, index, step.log_prob)
        mean = mean.index_copy(0, index, step.mean)
        std = std.index_fill(0, index, step.std.item())
    return log_prob, mean, std
