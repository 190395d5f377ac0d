from tasks.evaluation.verdict import champion, mark_champion, reward_hacking, rises

RISING = [0.10, 0.12, 0.11, 0.30, 0.28, 0.31, 0.50, 0.52, 0.51]
FLAT = [0.30, 0.28, 0.31, 0.29, 0.30, 0.32]


def difference(**named):
    """`reward=(low, high)` -> the keys of a comparison."""
    found = {}
    for name, (low, high) in named.items():
        found |= {name: (low + high) / 2, f"{name}_low": low, f"{name}_high": high}
    return found


def test_a_reward_rises_when_its_last_third_is_clearly_above_the_first():
    assert rises(RISING)
    assert not rises(FLAT)
    assert not rises([0.1, 0.9])  # too few rounds to say


def test_a_held_out_metric_that_falls_for_certain_while_the_reward_rises_is_an_alarm():
    fell = {"base": difference(second_ocr_accuracy=(-0.2, -0.05), style_match=(-0.1, 0.1))}
    assert reward_hacking(fell, RISING) == ["second_ocr_accuracy since base"]


def test_the_held_out_reward_counts_as_rising_too():
    fell = {
        "warmup": difference(reward=(0.1, 0.2), style_match=(-0.2, -0.1), ocr_accuracy=(0.1, 0.3))
    }
    assert reward_hacking(fell, FLAT) == ["style_match since warmup"]


def test_what_falls_together_with_the_reward_or_within_its_interval_is_no_alarm():
    assert reward_hacking({"base": difference(style_match=(-0.2, -0.1))}, FLAT) == []
    assert reward_hacking({"base": difference(style_match=(-0.2, 0.01))}, RISING) == []


def test_a_background_that_gets_painted_over_is_an_alarm_and_rounding_is_none():
    assert reward_hacking({"base": difference(background_error=(2.0, 3.0))}, RISING) == [
        "background_error since base"
    ]
    assert reward_hacking({"base": difference(background_error=(0.1, 0.3))}, RISING) == []


def test_the_best_reader_without_an_alarm_is_the_champion(tmp_path):
    assert champion(tmp_path) is None
    assert mark_champion(
        tmp_path, "round-0001", {"ocr_accuracy": 0.5, "second_ocr_accuracy": 0.3}, []
    )
    assert mark_champion(
        tmp_path, "round-0003", {"ocr_accuracy": 0.5, "second_ocr_accuracy": 0.5}, []
    )
    # It pleases the rewarded engine alone: the mean of both falls.
    assert not mark_champion(
        tmp_path, "round-0005", {"ocr_accuracy": 0.7, "second_ocr_accuracy": 0.2}, []
    )
    assert not mark_champion(
        tmp_path, "round-0007", {"ocr_accuracy": 0.9}, ["style_match since base"]
    )
    assert champion(tmp_path) == "round-0003"
    assert mark_champion(
        tmp_path, "round-0003", {"ocr_accuracy": 0.5, "second_ocr_accuracy": 0.5}, []
    )


def test_a_fall_too_small_to_mean_anything_raises_no_alarm():
    assert reward_hacking({"base": difference(style_match=(-0.004, -0.001))}, RISING) == []
    assert reward_hacking({"base": difference(style_match=(-0.02, -0.006))}, RISING) != []
