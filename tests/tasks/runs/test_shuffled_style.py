from types import SimpleNamespace

import numpy as np
import pytest
from shuffled_style import ShuffledStyle

from calligrapher.data.images import load_rgb
from calligrapher.tiny.pack import DATA
from calligrapher.tiny.world import write_bench
from reward_server.scorers.style import StyleScorer


def test_the_control_rewards_another_cases_style_and_always_the_same_one(tmp_path):
    siglip, count = DATA / "siglip", 12
    write_bench(tmp_path, num_cases=count, split="train", seed=2)

    def pictures(kind):
        return [np.asarray(load_rgb(tmp_path / f"test{n}_{kind}.png")) for n in range(1, count + 1)]

    targets, references = pictures("target"), pictures("ref")
    items = [
        SimpleNamespace(crop=target, reference=reference)
        for target, reference in zip(targets, references, strict=True)
    ]
    control = ShuffledStyle(str(siglip), str(tmp_path))
    right = StyleScorer.load(siglip, device="cpu", max_wait_s=0.0)
    own = [right.match(*right.embed([item.crop, item.reference])) for item in items]
    shuffled = control.score(items)
    assert np.mean(own) > np.mean(shuffled) + 0.3
    assert control.score(items[::-1]) == shuffled[::-1]
    with pytest.raises(ValueError, match="Found none"):
        ShuffledStyle(str(siglip), str(tmp_path / "nowhere"))
