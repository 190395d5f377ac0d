"""A split by hash: no text on both sides, and what is added moves nothing."""

import pytest

from calligrapher.data.dataset import load_cases
from calligrapher.errors import DataError
from calligrapher.tiny.world import write_bench
from tasks.data.split import is_held_out, split_cases


@pytest.fixture(scope="module")
def cases(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bench")
    write_bench(folder, num_cases=24, split="train", seed=0)
    cases = load_cases(folder, "self")
    return [*cases, *(case.model_copy(update={"case_id": f"{case.case_id}-b"}) for case in cases)]


def read(path):
    return [case.model_dump(exclude={"digest"}) for case in load_cases(path, "jsonl")]


def test_both_lists_are_all_cases_and_share_no_text(cases, tmp_path):
    split = split_cases(cases, tmp_path / "lists", share=0.3)
    train, held_out = read(split.train), read(split.evaluation)
    assert (len(train), len(held_out)) == (split.train_cases, split.evaluation_cases)
    wanted = [case.model_dump() for case in cases]
    assert sorted(c["case_id"] for c in train + held_out) == sorted(c["case_id"] for c in wanted)
    assert not {case["text"] for case in train} & {case["text"] for case in held_out}
    found = {case["case_id"]: case for case in train + held_out}
    for case in cases:
        for role in ("source", "mask", "reference", "target"):
            assert found[case.case_id][role].samefile(getattr(case, role))


def test_a_case_stays_on_its_side_when_others_are_added(cases, tmp_path):
    few = split_cases(cases[:20], tmp_path / "few", share=0.3)
    many = split_cases(cases, tmp_path / "many", share=0.3)
    held_out = {case["case_id"] for case in read(few.evaluation)}
    assert held_out <= {case["case_id"] for case in read(many.evaluation)}


def test_the_share_is_that_of_the_keys():
    assert sum(is_held_out(f"word {i}", 0.2) for i in range(10_000)) == pytest.approx(2000, abs=120)


def test_an_empty_side_and_lists_that_are_there_are_refused(cases, tmp_path):
    one = [case for case in cases if case.text == cases[0].text]
    with pytest.raises(DataError, match=r"would have none of 2: name another --held-out than 0\.5"):
        split_cases(one, tmp_path, share=0.5)
    split_cases(cases, tmp_path, share=0.3, by="case_id")
    with pytest.raises(DataError, match=r"train\.jsonl.* must not be there yet"):
        split_cases(cases, tmp_path, share=0.3)
