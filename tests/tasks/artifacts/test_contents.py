"""Which files or cases differ between two digests of data."""

from tasks.artifacts.contents import changes, explain, note


def test_changes_are_told_by_name(tmp_path):
    note(tmp_path, "a", {"test1_ref.png": "1", "test2_ref.png": "2", "test3_ref.png": "3"})
    note(tmp_path, "b", {"test1_ref.png": "1", "test2_ref.png": "0", "test4_ref.png": "4"})
    told = changes(tmp_path, "a", "b")
    assert told == "changed: test2_ref.png; new: test4_ref.png; gone: test3_ref.png"
    assert changes(tmp_path, "a", "never noted") is None


def test_long_lists_are_cut_and_orders_are_told(tmp_path):
    names = [f"case{n}" for n in range(11)]
    note(tmp_path, "a", dict.fromkeys(names, "1"))
    note(tmp_path, "b", {})
    note(tmp_path, "c", dict.fromkeys(reversed(names), "1"))
    assert changes(tmp_path, "a", "b") == f"gone: {', '.join(names[:8])} and 3 more"
    assert changes(tmp_path, "a", "c") == "the same ones in another order"


def test_only_datasets_that_differ_are_explained(tmp_path):
    note(tmp_path / "data", "a", {"x": "1"})
    note(tmp_path / "data", "b", {"x": "2"})
    artifact = tmp_path / "run" / "round-0001" / "rollout"
    then = {"train_data": "a", "evaluation_data": "c", "model": "m"}
    now = {"train_data": "b", "evaluation_data": "c", "model": "n"}
    assert explain(artifact, then, now) == ["train_data: changed: x"]
    now["train_data"] = "d"
    assert explain(artifact, then, now) == ["train_data: which samples differ was not noted"]
    assert explain(artifact, then, {"old": "b"}) == []
