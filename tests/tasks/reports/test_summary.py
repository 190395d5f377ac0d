"""What `train` says at its end."""

import json
from dataclasses import replace

import pytest

from tasks.reports.summary import Summary, closing_lines

SUMMARY = Summary(
    run="a",
    algorithm="nft",
    rounds=2,
    images=18,
    seconds=4.0,
    training_seconds=3.0,
    adapter_digest="0" * 64,
    checkpoint="runs/a/round-0001/update",
    ocr_accuracy_before=None,
    ocr_accuracy_after=None,
    exact_match_before=None,
    exact_match_after=None,
    style_before=None,
    style_after=None,
)


@pytest.fixture
def told(tmp_path):
    """`told(picture, ..., uri=)` -> the lines after the adapter's, of a run that left these."""

    def told(*pictures, uri=None):
        folder = tmp_path / "a"
        for name in pictures:
            (folder / "report" / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / "report" / name).touch()
        folder.mkdir(exist_ok=True)
        if uri is not None:
            (folder / "mlflow.json").write_text(json.dumps({"uri": uri}))
        lines = closing_lines(SUMMARY, tmp_path)[3:]
        *lines, report = [line.replace(str(tmp_path), "runs") for line in lines]
        assert report == "Report:   calligrapher report runs/a"
        return lines

    return told


def test_only_pictures_that_are_there_are_named(told):
    assert told() == ["Curves:   runs/a/metrics.jsonl"]
    assert told("grid/000000.png")[0] == "Pictures: runs/a/report"
    assert told("learning_curve.png")[0] == "Pictures: runs/a/report (learning_curve.png)"
    both = told("before_after.png")[0]
    assert both == "Pictures: runs/a/report (before_after.png, learning_curve.png)"


@pytest.mark.parametrize(
    ("uri", "where"),
    [
        ("sqlite:////x/mlflow.db", "mlflow ui --backend-store-uri sqlite:////x/mlflow.db"),
        ("http://me:secret@host:5000/a", "http://host:5000/a"),
        ("https://host", "https://host"),
        ("postgresql://me:secret@host/db", "runs/a/metrics.jsonl"),
    ],
)
def test_curves_are_where_the_run_was_tracked_and_no_password_is_shown(told, uri, where):
    assert told(uri=uri) == [f"Curves:   {where}"]


def test_curves_that_tensorboard_alone_has_are_told_so(told, tmp_path):
    (tmp_path / "a/tensorboard").mkdir(parents=True)
    assert told() == ["Curves:   tensorboard --logdir runs"]


def test_spelling_and_style_are_told_before_and_after_where_they_were_measured(tmp_path):
    def interval(mean):
        return {"mean": mean, "low": mean - 0.05, "high": mean + 0.05}

    spelled = replace(SUMMARY, ocr_accuracy_before=interval(0.4), ocr_accuracy_after=interval(0.9))
    both = replace(spelled, style_before=interval(0.5), style_after=interval(0.8))
    lines = [
        "  held-out OCR accuracy before 0.400  [0.350, 0.450]",
        "  held-out OCR accuracy after  0.900  [0.850, 0.950]",
        "  held-out style before        0.500  [0.450, 0.550]",
        "  held-out style after         0.800  [0.750, 0.850]",
    ]
    assert closing_lines(both, tmp_path)[1:5] == lines
    assert closing_lines(spelled, tmp_path)[1:4] == [*lines[:2], "  training 3 s; this start 4 s"]


def test_a_run_that_the_alarm_ended_says_what_fell_and_how_to_go_on(tmp_path):
    ended = replace(SUMMARY, reward_hacking=["style_match since the start"])
    _, why, how, *_ = closing_lines(ended, tmp_path)
    assert "evaluate.stop_on_alarm: the reward may be gamed (style_match since the start)" in why
    assert how.endswith("evaluate.stop_on_alarm=false goes on")
