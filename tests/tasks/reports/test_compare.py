"""Two runs side by side, and all runs of a folder."""

import json

import pytest

from calligrapher.errors import ArtifactError
from tasks.reports.compare import compare
from tasks.reports.listing import as_table, list_runs


def test_runs_differ_by_what_was_changed_and_by_what_came_of_it(train, judged):
    evaluated = {"every": 1, "num_images_per_case": 1}
    first, _ = train("a", scorer=judged(0.25, 0.5), evaluate=evaluated)
    second, _ = train(
        "b", scorer=judged(0.5, 0.75), evaluate=evaluated, update={"betas": (0.8, 0.9)}
    )
    found = compare(first, second)
    assert found.params == {"update.betas": ([0.9, 0.999], [0.8, 0.9])}
    assert found.curves == {0: (0.0, 0.0), 1: (0.25, 0.5), 2: (0.5, 0.75)}
    assert found.reason is None
    # Both cases differ by the same amount: the interval is a point.
    assert found.difference["ocr_accuracy"] == pytest.approx((0.25, 0.25, 0.25))
    assert "ocr_likelihood" not in found.difference, "what nobody measured is absent"
    assert "ocr_accuracy: +0.250 [+0.250, +0.250]" in found.text()
    assert compare(first, first).params == {}


def test_evaluations_that_were_not_made_alike_do_not_compare(train, judged):
    first, _ = train("a", scorer=judged(0.25, 0.5), evaluate={"every": 1})
    second, _ = train("b", scorer=judged(0.5, 0.75), evaluate={"every": 1, "seed": 7})
    found = compare(first, second)
    assert found.difference == {}
    assert found.reason == (
        "evaluate.num_cases, evaluate.num_images_per_case, evaluate.seed must be the same"
    )
    assert found.reason in found.text()
    third, _ = train("c", evaluate={"every": 0})
    assert compare(first, third).reason == "a run has none"
    assert compare(first, third).curves == {0: (0.0, None), 1: (0.25, None), 2: (0.5, None)}


def test_a_folder_that_is_no_run_is_not_compared(train, tmp_path):
    folder, _ = train("a", rounds=1)
    with pytest.raises(ArtifactError, match="must be the folder of a run"):
        compare(folder, tmp_path)


def test_every_run_of_a_folder_has_a_line_and_a_broken_one_hides_no_other(train, judged):
    folder, _ = train("a", scorer=judged(0.25, 0.5), evaluate={"every": 1})
    (folder.parent / "broken").mkdir()
    (folder.parent / "broken/params.json").write_text('{"rounds": "many"}')
    line, broken = list_runs(folder.parent)
    rewards = json.loads((folder / "round-0001/score/artifact.json").read_text())["meta"]
    assert (line.run, line.state, line.rounds_done, line.rounds) == ("a", "finished", 2, 2)
    assert (line.ocr_accuracy_before, line.ocr_accuracy) == (0.0, 0.5)
    assert line.reward == rewards["reward_mean"]
    assert broken.run == "broken"
    assert "rounds must be a whole number" in broken.problem
    head, first, second = as_table([line, broken], folder.parent).splitlines()
    assert head.split() == ["run", "state", "algorithm", "rounds", "reward", "accuracy", "size"]
    assert first.startswith("a       finished  nft        2 of 2  ")
    assert "0.000 -> 0.500" in first
    assert second.startswith("broken  damaged   ")
    assert as_table([], folder) == f"{folder} holds no run."
