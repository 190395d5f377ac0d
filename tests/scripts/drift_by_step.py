"""Tells in which steps a trained policy moves what lies outside of the mask.

    python tests/scripts/drift_by_step.py runs/NAME [--round 19] [--num 48]

Samples held-out cases with Euler's steps under the policy before training, under the trained one
(its average), and under one of them in the noisy steps, which are trained, and the other
in the clean ones; prints the background's error of each in grey levels.
"""

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from calligrapher.data.canvas import Canvas
from calligrapher.model.policy import Policy, Weights
from calligrapher.sampling.generate import pictures
from calligrapher.sampling.sampler import sample
from calligrapher.sampling.schedule import sigma_schedule
from tasks.artifacts.layout import PARAMS, RunsDir, round_name
from tasks.evaluation.measures import background
from tasks.params.run_params import load_params
from tasks.runs.run import resources_of

BEFORE, TRAINED = "before", "trained"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--round", type=int, help="default: the last one with weights")
    parser.add_argument("--num", type=int, default=48)
    options = parser.parse_args()
    params = load_params(options.run / PARAMS)
    resources = resources_of(params, RunsDir(options.run.parent), None)
    cases, policy = resources.cases.evaluation[: options.num], resources.model.policy
    conditioning = resources.conditioning.batch(cases)
    folder = "round-*" if options.round is None else round_name(options.round)
    (*_, file) = sorted(options.run.glob(f"{folder}/update/ema.safetensors"))
    weights = {BEFORE: policy.snapshot(), TRAINED: resources.weights(file)}
    steps = params.rollout.num_inference_steps
    schedule = sigma_schedule(steps, conditioning.image_ids.shape[0])
    last_noisy = schedule[params.rl.steps_trained(steps) - 1].item()
    canvas = Canvas(params.model.width, params.model.height)
    for noisy in weights:
        for clean in weights:
            with mixed(policy, weights[noisy], weights[clean], last_noisy):
                x0 = sample(policy, conditioning, list(range(len(cases))), steps).x0
            painted = pictures(resources.model, x0, resources.conditioning.canvas)
            errors = [background(canvas, p, c)[0] for p, c in zip(painted, cases, strict=True)]
            print(f"noisy steps {noisy:8} clean steps {clean:8} {np.mean(errors):6.2f}")


@contextmanager
def mixed(policy: Policy, noisy: Weights, clean: Weights, last_noisy: float) -> Iterator[None]:
    """Let the policy's velocity be that of `noisy` at levels from `last_noisy` on, else `clean`'s.

    All rows of a batch must have one level.
    """
    velocity = policy.velocity

    def of_either(x, sigma, *more):
        with policy.use(noisy if sigma.max().item() >= last_noisy - 1e-6 else clean):
            return velocity(x, sigma, *more)

    policy.velocity = of_either
    try:
        yield
    finally:
        policy.velocity = velocity


if __name__ == "__main__":
    main()
