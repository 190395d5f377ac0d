"""The data of a run: whatever lists the cases, a changed picture changes the hash of the data."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from calligrapher.errors import ParamsError
from calligrapher.tiny.world import write_bench
from tasks.artifacts.digests import path_digest
from tasks.artifacts.layout import RunsDir
from tasks.evaluation.evaluation import EvaluationParams, open_evaluation
from tasks.params.run_params import EvaluateParams, RunParams
from tasks.resources.cases import Cases
from tasks.runs.run import resources_of

ROLES = ("source", "mask", "reference")


def cases_of(train, kind, data_dir):
    params = RunParams.model_validate(
        {
            "rounds": 1,
            "model": {"base": "tiny"},
            "data": {"train": str(train), "evaluation": str(train), "kind": kind},
            "rollout": {"num_cases": 2, "num_images_per_prompt": 2},
            "reward": {"vlm_weight": 0},
            "evaluate": {"num_cases": 1, "grid_cases": 1},
            "nft": {},
        }
    )
    return Cases(params, data_dir)


@pytest.fixture
def folder(tmp_path):
    """Two cases as a resources folder, a JSONL file and a Parquet file that holds the pictures."""
    write_bench(tmp_path / "cases", num_cases=2, split="train", seed=0)
    rows = []
    for line in (tmp_path / "cases" / "self_bench.txt").read_text().split():
        number, text = line.split("-")
        files = {"source": f"test{number}_source.png", "mask": f"test{number}_mask.png"}
        rows.append(
            files | {"reference": f"test{number}_ref.png", "text": text, "case_id": f"case{number}"}
        )
    (tmp_path / "cases" / "cases.jsonl").write_text("\n".join(map(json.dumps, rows)))
    held = [
        row
        | {r: {"bytes": (tmp_path / "cases" / row[r]).read_bytes(), "path": row[r]} for r in ROLES}
        for row in rows
    ]
    pq.write_table(pa.Table.from_pylist(held), tmp_path / "cases.parquet")
    return tmp_path


def test_a_table_keeps_its_pictures_in_the_data_folder_and_has_the_hash_of_a_list(folder):
    listed = cases_of(folder / "cases" / "cases.jsonl", "jsonl", folder / "data")
    held = cases_of(folder / "cases.parquet", "parquet", folder / "data")
    assert held.train_digest == listed.train_digest
    assert {case.source.parent for case in held.train} == {folder / "data" / "pictures"}


def test_files_that_are_no_part_of_the_bench_do_not_change_its_hash(folder):
    cases = folder / "cases"
    (cases / "cases.jsonl").unlink()
    clean = cases_of(cases, "self", folder / "data").train_digest
    assert clean == path_digest(cases)
    (cases / ".DS_Store").touch()
    (cases / "test1_source.png.bak").touch()
    (cases / ".ipynb_checkpoints").mkdir()
    (cases / ".ipynb_checkpoints" / "test1_source-checkpoint.png").touch()
    assert path_digest(cases) != clean
    assert cases_of(cases, "self", folder / "data").train_digest == clean
    assert cases_of(cases, "self", folder / "data").evaluation_digest == clean


def evaluating(folder, settings, **changed):
    params = cases_of(folder / "cases", "self", folder / "data").params.model_copy(update=changed)
    resources = resources_of(params, RunsDir(folder), scorer=None)
    return open_evaluation(folder / "run", settings, resources)


def test_an_evaluation_of_more_cases_than_are_held_out_is_refused_in_a_sentence(folder):
    cases = cases_of(folder / "cases", "self", folder / "data")
    cases.params = cases.params.model_copy(update={"evaluate": EvaluateParams(num_cases=3)})
    with pytest.raises(
        ParamsError, match=r"Got 3 for 2 cases in .*cases\. Lower it .*evaluate\.yaml"
    ):
        _ = cases.evaluation


def test_an_evaluation_without_held_out_data_is_refused_in_a_sentence(folder):
    data = cases_of(folder / "cases", "self", folder / "data").params.data
    none = data.model_copy(update={"evaluation": None})
    with (
        pytest.raises(ParamsError, match=r"data\.evaluation must name held-out cases .*Got null"),
        evaluating(folder, EvaluationParams(), data=none),
    ):
        pass


@pytest.mark.parametrize(("kind", "name"), [("self", ""), ("jsonl", "cases.jsonl")])
def test_a_changed_picture_changes_the_hash_though_the_list_is_the_same(folder, kind, name):
    before = cases_of(folder / "cases" / name, kind, folder / "data")
    digests = before.train_digest, before.evaluation_digest
    picture = folder / "cases" / "test1_ref.png"
    picture.write_bytes((folder / "cases" / "test2_ref.png").read_bytes())
    after = cases_of(folder / "cases" / name, kind, folder / "data")
    assert after.train_digest != digests[0]
    assert after.evaluation_digest != digests[1]
