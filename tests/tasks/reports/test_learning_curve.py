"""The learning curve: drawn after every evaluation, with intervals and the training reward."""

import logging

from tasks.pictures import grids
from tasks.reports.learning_curve import show_learning_curve


class Tracked:
    """A tracker that knows these histories and keeps the pictures that it is given."""

    def __init__(self, **histories):
        self.histories, self.pictures = histories, []

    def history(self, key):
        return self.histories.get(key.partition("/")[2], [])

    def log_image(self, key, draw, step, *, slider=True):
        self.pictures.append((key, step, slider, draw()))


def test_a_curve_needs_two_evaluations():
    tracker = Tracked(ocr_accuracy=[(0, 0.4)])
    show_learning_curve(tracker, 0, highest_reward=1.0)
    assert tracker.pictures == []


def test_the_curve_has_intervals_and_the_reward_with_its_scale(monkeypatch):
    drawn = {}
    monkeypatch.setattr(grids, "learning_curve", lambda series, **given: drawn.update(given))
    tracker = Tracked(
        ocr_accuracy=[(0, 0.4), (5, 0.5), (10, 0.6)],
        ocr_accuracy_low=[(0, 0.3), (5, 0.4)],  # the last one was not measured
        ocr_accuracy_high=[(0, 0.5), (5, 0.6), (10, 0.7)],
        reward_mean=[(0, 1.1), (1, 1.3)],
    )
    show_learning_curve(tracker, 10, highest_reward=1.5)
    assert [picture[:3] for picture in tracker.pictures] == [("learning_curve", 10, False)]
    assert list(drawn["bands"].values()) == [[(0, 0.3, 0.5), (5, 0.4, 0.6)]]
    assert drawn["below"] == {"mean training reward (highest: 1.5)": [(0, 1.1), (1, 1.3)]}


def test_a_run_draws_and_tells_each_round_once(train, caplog):
    caplog.set_level(logging.INFO)
    changes = {
        "rounds": 2,
        "evaluate": {"every": 1, "num_cases": 2, "grid_cases": 1, "num_images_per_case": 1},
        "tracking": {"enabled": True},
        "rollout": {"num_cases": 2, "num_images_per_prompt": 2},
    }
    folder, _ = train("told", **changes)
    assert (folder / "report/learning_curve.png").is_file()
    told = [record.getMessage() for record in caplog.records if "after_stage" in record.name]
    assert [line.partition(":")[0] for line in told if ":" in line] == [
        "after 0 of 2 rounds",
        "round-0000 (1 of 2)",
        "after 1 of 2 rounds",
        "round-0001 (2 of 2)",
        "after 2 of 2 rounds",
    ]
    assert any(line.endswith("of at most 1") for line in told)
    assert any("(2 of 2) took" in line and "about 0 s of training left" in line for line in told)
    caplog.clear()
    (folder / "report/learning_curve.png").unlink()  # as if killed before it was drawn
    train("told", **changes)
    assert (folder / "report/learning_curve.png").is_file()
    assert [record for record in caplog.records if "after_stage" in record.name] == []
