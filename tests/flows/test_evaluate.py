from pathlib import Path

from flows.evaluate import each


def test_a_run_that_cannot_be_evaluated_does_not_keep_the_others_from_it(caplog):
    def work(folder):
        if folder.name == "b":
            raise TypeError("no held-out data")
        return {"run": folder.name}

    results, failures = each([Path("a"), Path("b"), Path("c")], work)
    assert results == [{"run": "a"}, {"run": "c"}]
    assert failures == ["b: no held-out data"]
    assert "b cannot be evaluated" in caplog.text
