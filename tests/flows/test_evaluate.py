"""What one run costs the others, and which runs are evaluated at all."""

from pathlib import Path

import pytest

from calligrapher.errors import CalligrapherError
from flows.evaluate import each, evaluate
from tasks.artifacts.layout import MANIFEST, PARAMS


def test_a_run_that_cannot_be_evaluated_does_not_keep_the_others_from_it(caplog):
    def work(folder):
        if folder.name == "b":
            raise TypeError("no held-out data")
        return {"run": folder.name}

    results, failures = each([Path("a"), Path("b"), Path("c")], work)
    assert results == [{"run": "a"}, {"run": "c"}]
    assert failures == ["b: no held-out data"]
    assert "b cannot be evaluated" in caplog.text


def test_a_run_without_a_checkpoint_is_left_out():
    assert each([Path("a"), Path("b")], lambda folder: None) == ([], [])


def test_a_folder_that_is_no_round_costs_only_its_own_run(tmp_path):
    update = tmp_path / "a" / "round-copy" / "update"
    update.mkdir(parents=True)
    (update / MANIFEST).touch()
    for name in ("a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / PARAMS).touch()
    with pytest.raises(CalligrapherError, match=r"No run could be evaluated: a: .*'copy'"):
        evaluate.fn(runs_dir=str(tmp_path))
