"""Params of a run that trackers are shown; nothing is trained."""

from tasks.params.run_params import RunParams


def run_params(changed=None, **tracking):
    """changed: other keys, whole sections; tracking: values of that section."""
    return RunParams.model_validate({
        "rounds": 2,
        "model": {"base": "tiny"},
        "data": {"train": "cases", "evaluation": "held-out"},
        "rollout": {"num_cases": 3, "num_images_per_prompt": 4},
        "reward": {"vlm_weight": 0},
        "nft": {},
        "tracking": tracking,
    } | (changed or {}))  # fmt: skip
