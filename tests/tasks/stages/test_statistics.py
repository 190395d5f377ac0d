import pytest

from tasks.stages.statistics import group_means, means_with_intervals


def test_a_mean_has_an_interval_around_it_and_what_was_not_measured_is_absent():
    statistics = means_with_intervals(
        {"style": [0.2, None, 0.4], "second_ocr_accuracy": [None, None, None]}
    )
    assert statistics["style"] == pytest.approx(0.3)
    assert statistics["style_low"] == pytest.approx(0.2)
    assert statistics["style_high"] == pytest.approx(0.4)
    assert "second_ocr_accuracy" not in statistics


def test_the_mean_of_a_group_is_over_what_was_measured():
    assert group_means([0.0, None, 0.5, 1.0, None, None], 2) == [0.0, 0.75, None]
