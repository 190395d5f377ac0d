"""Settings of whole runs that take seconds, and scorers that ask nobody."""

import hashlib
import io

import numpy as np
from PIL import Image

SETTINGS = {
    "seed": 3,
    "rounds": 2,
    "model": {"width": 48, "height": 32, "max_sequence_length": 24, "device": "cpu"},
    "data": {},
    "warmup": {"steps": 1, "batch_size": 2, "gradient_accumulation_steps": 1},
    # Three groups of three in shards of four and batches of two: nothing divides.
    "rollout": {
        "num_cases": 3,
        "num_images_per_prompt": 3,
        "num_inference_steps": 3,
        "batch_size": 2,
        "shard_size": 4,
    },
    "reward": {"ocr_weight": 1.0, "vlm_weight": 0.0},
    "update": {
        "batch_size": 4,
        "gradient_accumulation_steps": 2,
        "learning_rate": 1e-3,
        "weight_decay": 0.0,
    },
    "ema": {"use_ema": True, "decay": 0.9},
    "evaluate": {"every": 0, "num_cases": 2, "grid_cases": 1},
    "tracking": {"enabled": False},
    "retention": {"keep_last": 9},
}
ALGORITHMS = {
    "nft": {"nft_beta": 1.0, "num_train_sigmas": 1, "kl_coef": 0.0, "old_policy": "slow"},
    "grpo": {"window_size": 1, "clip_range": 1e-3, "kl_coef": 0.0},
    "awm": {"num_train_sigmas": 1, "kl_coef": 0.0},
}


class HashScorer:
    """Rewards in [0, 1) that the picture's bytes decide; `calls` holds (pictures, cases) of each
    call."""

    def __init__(self):
        self.calls = []

    def identity(self):
        return {"scorers": "hash"}

    def reward(self, image, case):
        return hashlib.sha256(image).digest()[0] / 256

    def score(self, images, cases, letters=False):
        self.calls.append((list(images), list(cases)))
        return [self.row(i, c) for i, c in zip(images, cases, strict=True)]

    def row(self, image, case):
        reward = self.reward(image, case)
        return {
            "ocr_text": case.text.lower(),
            "ocr_confidence": 0.5,
            "ocr_accuracy": reward,
            "ocr_likelihood": None,
            "vlm_score": None,
            "style_score": None,
            "reward": reward,
            "reason": None if reward is not None else "the server gave none",
        }


class Gamed(HashScorer):
    """Held-out pictures are read worse from evaluation to evaluation, for a higher reward."""

    evaluations = 0

    def score(self, images, cases, letters=False):
        rows = super().score(images, cases)
        if len(images) == 2:
            held_out = {"ocr_accuracy": 0.9 - self.evaluations / 10}
            rows = [row | held_out | {"reward": self.evaluations / 10} for row in rows]
            self.evaluations += 1
        return rows


class GreyScorer(HashScorer):
    """Rewards that change as little as the pictures do: their mean grey level."""

    def identity(self):
        return {"scorers": "grey"}

    def reward(self, image, case):
        return float(np.mean(Image.open(io.BytesIO(image)).convert("L"))) / 255


class ConstantScorer(HashScorer):
    def reward(self, image, case):
        return 0.25


def rewrite_average(folder, weights):
    """Put other weights into a finished artifact's `ema.safetensors`; its manifest knows them."""
    from safetensors.torch import save_file

    from tasks.artifacts.artifact import Artifact, write_manifest
    from tasks.artifacts.provenance import Provenance

    manifest = Artifact.load(folder).manifest
    save_file(weights, folder / "ema.safetensors")
    names = ("stage", "stage_version", "params", "inputs", "extra")
    provenance = Provenance(**{name: getattr(manifest, name) for name in names})
    write_manifest(folder, provenance, meta=manifest.meta, seconds=manifest.seconds)
