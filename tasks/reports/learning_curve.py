"""The learning curve of a run so far: held-out accuracy with intervals, and the training reward."""

from tasks.pictures import grids
from tasks.tracking.tracker import Tracker

LEARNING_CURVE = "learning_curve"
ACCURACY = "evaluate/ocr_accuracy"
REWARD = "score/reward_mean"


def show_learning_curve(tracker: Tracker, rounds_done: int, *, highest_reward: float) -> None:
    """Draw what `metrics.jsonl` holds, from the second evaluation on.

    highest_reward: of a perfect picture; it stands in the title, as the reward has its own scale.
    """
    accuracy = tracker.history(ACCURACY)
    if len(accuracy) < 2:
        return
    low, high = (dict(tracker.history(f"{ACCURACY}_{end}")) for end in ("low", "high"))
    name = "held-out OCR accuracy, 95 % intervals"
    band = [(step, low[step], high[step]) for step, _ in accuracy if step in low and step in high]
    # The images of round i are painted by the policy after i rounds.
    reward = tracker.history(REWARD)
    below = {f"mean training reward (highest: {highest_reward:g})": reward} if reward else None
    tracker.log_image(
        LEARNING_CURVE,
        lambda: grids.learning_curve(
            {name: accuracy}, bands={name: band}, below=below, xlabel="rounds done"
        ),
        rounds_done,
        slider=False,
    )
