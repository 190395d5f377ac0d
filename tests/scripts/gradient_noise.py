"""Says which part of the trained weights gets a gradient that is signal, and which one noise.

    calligrapher train tiny-nft run=still rounds=1 rollout.num_cases=24 evaluate.every=0
    python tests/scripts/gradient_noise.py runs/still --round 0 --groups 12

Takes a round of a run whose rollout, advantages and weights are still on disk, and the gradient of
each group of images by itself, at the weights that the round's update started from. A line for each
part: how many weights it has, the norm of the groups' mean gradient, and the cosine to expect
between two rounds of `--groups` groups each, with the standard error of a jackknife over groups. 0
is noise; 1 would be the same gradient in every round. Then a line for each noise level, of all
trained weights, where a group's images are trained at one level at a time (`noise: group`). For
another reward, fork the run first:
`calligrapher rerun still round-0000/score reward.style_weight=0 --downstream --fork spelling`.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calligrapher.model.policy import Policy
from calligrapher.rl.train_loop import batches_of
from tasks.artifacts.layout import PARAMS, RunsDir
from tasks.artifacts.run_dir import RunDir
from tasks.params.run_params import load_params
from tasks.pipeline import name_of, parents
from tasks.resources.resources import Resources
from tasks.runs.run import resources_of
from tasks.stages.refresh import old_weights
from tasks.stages.training_rows import training_rows

PARTS: dict[str, Callable[[str], bool]] = {
    "adapter": lambda name: name.startswith("adapter."),
    ". MLP": lambda name: ".image_proj_mlp." in name,
    ". QFormer": lambda name: ".image_proj_qformer." in name,
    ". keys": lambda name: ".to_k_ip." in name,
    ". values": lambda name: ".to_v_ip." in name,
    "LoRA": lambda name: "lora_" in name,
}


def expected_cosine(gradients: Tensor, groups: int) -> tuple[float, float]:
    """Return the cosine to expect between the means of two draws of `groups` gradients each, and
    its standard error.

    gradients: [G, N], independent, G at least 3. |E g|^2 is estimated from products of different
    gradients alone, so it has no bias; it may come out below 0 where there is nothing but noise.
    """
    gradients = gradients.double()
    total, square = gradients.sum(0), gradients.square().sum(1)  # [N], [G]

    def cosine(count: int, of_sum: Tensor, squares: Tensor) -> Tensor:
        signal = (of_sum - squares) / (count * (count - 1))
        noise = squares / count - signal
        return signal / (signal + noise / groups)

    count = len(gradients)
    without = total.square().sum() - 2 * gradients @ total + square  # of the sum with one left out
    left = cosine(count - 1, without, square.sum() - square)
    spread = (count - 1) / count * (left - left.mean()).square().sum()
    return cosine(count, total.square().sum(), square.sum()).item(), spread.sqrt().item()


def group_gradients(
    resources: Resources, run: RunDir, round_index: int
) -> tuple[dict[str, Tensor], dict[float, Tensor]]:
    """Return the gradients of the loss of each group that can teach.

    Name of a weight -> [G, N], and noise level -> [H, N] of all weights, where H groups have losses
    at that level of all of their images.
    """
    params, policy = resources.params, resources.model.policy
    made_from = parents(name_of("update", round_index), params.rollout.staleness)
    inputs = {key: run.load(name) for key, name in made_from.items()}
    rows = training_rows(resources, inputs["rollout"], inputs["advantages"])
    resources.load_trained(inputs["previous"])
    old = inputs["previous" if params.rl.old_is_trained else "old"]
    old = resources.weights(old_weights(old)) if params.rl.needs_old else None
    # Where the background is held, its own pull is the same in all groups, and would pass for the
    # reward's.
    rl = params.rl.model_copy(update={"background_coef": 0.0, "background_rows": 0})
    groups: dict[int, list[int]] = {}
    for i in range(len(rows)):
        groups.setdefault(int(rows.pick([i]).places[0, 0]), []).append(i)
    found: dict[str, list[Tensor]] = {name: [] for name in policy.parameters}
    levels: dict[float, list[Tensor]] = {}
    sigmas = _trained_levels(policy)
    for group in groups.values():
        total = {name: torch.zeros(weight.numel()) for name, weight in policy.parameters.items()}
        at: dict[float, Tensor] = {}
        for batch in batches_of(group, params.update.batch_size):
            for loss, _ in rl.losses(
                policy,
                rows.pick(batch),
                f"{params.seed}/update/{round_index}/0",
                num_steps=params.rollout.num_inference_steps,
                old=old,
                reference=None,
            ):
                policy.model.zero_grad(set_to_none=True)
                (loss * len(batch) / len(group)).backward()
                own = {n: weight.grad.flatten() for n, weight in policy.parameters.items()}
                for name, gradient in own.items():
                    total[name] += gradient
                sigma = sigmas[-1]
                if len(sigma) in (len(batch), 1) and len(set(sigma)) == 1:
                    at[sigma[0]] = at.get(sigma[0], 0) + torch.cat([*own.values()])
        for name, gradient in total.items():
            found[name].append(gradient)
        for sigma, gradient in at.items():
            levels.setdefault(sigma, []).append(gradient)
    return (
        {name: torch.stack(gradients) for name, gradients in found.items()},
        {sigma: torch.stack(levels[sigma]) for sigma in sorted(levels, reverse=True)},
    )


def _trained_levels(policy: Policy) -> list[list[float]]:
    """Have the policy note the noise levels of each forward that has a gradient; return them."""
    seen: list[list[float]] = []
    velocity = policy.velocity

    def noting(x: Tensor, sigma: Tensor, *rest: Any) -> Tensor:
        if torch.is_grad_enabled():
            seen.append(sigma.tolist())
        return velocity(x, sigma, *rest)

    policy.velocity = noting
    return seen


def table(gradients: dict[str, Tensor], groups: int) -> str:
    """Return a line for each part that has trained weights."""
    lines = [f"{'part':10} {'weights':>9} {'norm':>9} {'cosine':>7} {'error':>6}"]
    for part, belongs in PARTS.items():
        own = [gradient for name, gradient in gradients.items() if belongs(name)]
        if own:
            whole = torch.cat(own, dim=1)
            cosine, error = expected_cosine(whole, groups)
            norm = whole.mean(0).norm().item()
            lines.append(f"{part:10} {whole.shape[1]:9} {norm:9.2e} {cosine:7.2f} {error:6.2f}")
    return "\n".join(lines)


def level_table(levels: dict[float, Tensor], groups: int) -> str:
    """Return a line for each noise level at which three groups or more were trained."""
    lines = [f"{'sigma':10} {'groups':>9} {'norm':>9} {'cosine':>7} {'error':>6}"]
    for sigma, gradients in levels.items():
        if len(gradients) < 3:
            continue
        cosine, error = expected_cosine(gradients, groups)
        norm = gradients.mean(0).norm().item()
        lines.append(f"{sigma:<10.3f} {len(gradients):9} {norm:9.2e} {cosine:7.2f} {error:6.2f}")
    return "\n".join(lines)


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    options.add_argument("run", type=Path, help="folder of the run")
    options.add_argument("--round", type=int, default=0)
    options.add_argument("--groups", type=int, default=12, help="of the rounds compared")
    chosen = options.parse_args()
    params = load_params(chosen.run / PARAMS)
    if params.rl.needs_reference:
        options.error("kl_coef must be 0: a KL to the reference is no part of the signal.")
    resources = resources_of(params, RunsDir(chosen.run.parent), scorer=None)  # nothing is scored
    parts, levels = group_gradients(resources, RunDir(chosen.run), chosen.round)
    print(table(parts, chosen.groups))
    print(level_table(levels, chosen.groups))


if __name__ == "__main__":
    main()
