"""Tells in which steps one policy spells better than another.

    python tests/scripts/spelling_by_step.py runs/NAME --other runs/OTHER/warmup/trained.safetensors

Evaluates the run's average as its own evaluations do; the other weights of the same model; and, for
each number of noisy steps, the one in these and the other in those that follow. Without `--other`
it is the policy before training. Prints OCR accuracy, style and exact match of each.
"""

import argparse
import tempfile
from pathlib import Path

from drift_by_step import mixed

from calligrapher.sampling.schedule import sigma_schedule
from flows.contexts import lazy_scorer
from tasks.artifacts.layout import PARAMS, RunsDir
from tasks.params.run_params import load_params
from tasks.runs.run import resources_of
from tasks.stages.evaluate import evaluate_weights

SHOWN = ("ocr_accuracy", "style_score", "exact_match")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--other", type=Path)
    parser.add_argument("--noisy", type=int, nargs="+", default=[2, 3, 4])
    options = parser.parse_args()
    params, runs = load_params(options.run / PARAMS), RunsDir(options.run.parent)
    with (
        tempfile.TemporaryDirectory() as work,
        lazy_scorer(params, Path(work), runs.data) as scorer,
    ):
        resources = resources_of(params, runs, scorer)
        policy = resources.model.policy
        (*_, average) = sorted(options.run.glob("round-*/update/ema.safetensors"))
        weights = {
            "run": resources.weights(average),
            "other": resources.weights(options.other) if options.other else policy.snapshot(),
        }
        tokens = resources.conditioning.batch(resources.cases.evaluation[:1]).image_ids.shape[0]
        schedule = sigma_schedule(params.evaluation_steps, tokens)

        def show(noisy: str, clean: str, count: int) -> None:
            with (
                tempfile.TemporaryDirectory() as out,
                mixed(policy, weights[noisy], weights[clean], schedule[count - 1].item()),
            ):
                found = evaluate_weights(
                    resources,
                    weights[noisy],
                    Path(out),
                    policy_digest="mixed",
                    round_index=0,
                    num_cases=params.evaluate.num_cases,
                    images_per_case=params.evaluate.num_images_per_case,
                )
            figures = "  ".join(f"{name} {found[name]:.3f}" for name in SHOWN)
            print(f"{count} noisy steps: {noisy:5}  the others: {clean:5}  {figures}", flush=True)

        for name in weights:
            show(name, name, params.evaluation_steps)
        for count in options.noisy:
            show("run", "other", count)
            show("other", "run", count)


if __name__ == "__main__":
    main()
