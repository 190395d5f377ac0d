"""The reward service is shown pictures that have the style asked for and not the text."""

import numpy as np
import pytest

from calligrapher.tiny import world
from calligrapher.tiny.pack import DATA
from reward_server.client import RewardClient, RewardItem
from reward_server.processes.launch import local_server
from tasks.params.run_params import RewardParams
from tasks.resources.rewards import reward_of

CASES = [world.random_case(np.random.default_rng([7, n]), "evaluation") for n in range(6)]
WEIGHTS = {"ocr_weight": 1.0, "likelihood_weight": 1.0, "vlm_weight": 0.0, "style_weight": 1.0}


def bars(case):
    """Upright bars of the reference's ink on the source's paper."""
    drawn = np.abs(case.reference - case.reference[0, 0]).sum(-1)
    ink = case.reference[np.unravel_index(drawn.argmax(), drawn.shape)]
    picture = np.broadcast_to(case.source[0, 0], case.source.shape).copy()
    for left in range(world.LEFT + 3, world.WIDTH - 6, 8):
        picture[world.TOP + 4 : world.BOTTOM - 4, left : left + 3] = ink
    return picture


PICTURES = {
    "right": lambda case: case.target,
    "copied": lambda case: case.reference,
    "bars": bars,
    "untouched": lambda case: case.source,
}


@pytest.fixture(scope="module")
def measured():
    """Kind of picture -> what the service measures of each case's."""
    flags = ["--ocr-mode=line", f"--siglip-path={DATA / 'siglip'}"]
    with local_server(ocr_threads=1, flags=flags) as url, RewardClient([url]) as client:
        return {
            kind: client.score_batch(
                [
                    RewardItem(
                        world.to_image(painted(case)),
                        f"The text is '{case.text}'.",
                        mask=world.to_image(case.mask),
                        reference=world.to_image(case.reference),
                    )
                    for case in CASES
                ]
            )
            for kind, painted in PICTURES.items()
        }


def mean_reward(results, **changes):
    params = RewardParams(**WEIGHTS | changes)
    return np.mean([reward_of(params, r.components(), r.errors)["reward"] for r in results])


def test_style_without_the_text_is_paid_in_a_sum_and_not_where_it_must_be_read(measured):
    summed = {kind: mean_reward(results) for kind, results in measured.items()}
    read = {kind: mean_reward(r, style_factors=["ocr_accuracy"]) for kind, r in measured.items()}
    assert summed["copied"] > 0.5
    for kind in ("copied", "bars", "untouched"):
        assert read[kind] < 0.25, kind
    assert read["right"] == pytest.approx(summed["right"], abs=0.1)
    assert read["right"] > 2
