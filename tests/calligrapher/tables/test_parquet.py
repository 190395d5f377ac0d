import json
import math

import duckdb
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from calligrapher.errors import ArtifactError
from calligrapher.tables.parquet import (
    decode_png,
    encode_png,
    read_shard,
    read_table,
    sample_id,
    write_advantages,
    write_scores,
    write_shard,
)

B, W, L, D = 3, 2, 5, 7


def rollout_columns(round=4, rows=B):
    return {
        "sample_id": [sample_id(round, i // 3, i % 3) for i in range(rows)],
        "round": [round] * rows,
        "case_id": [f"test{i // 3}" for i in range(rows)],
        "group_id": [i // 3 for i in range(rows)],
        "member": [i % 3 for i in range(rows)],
        "prompt": ["The text is 'Été'."] * rows,
        "text": ["Été"] * rows,
        "seed": [2**62 + i for i in range(rows)],
        "policy_digest": ["ab12"] * rows,
        "num_steps": [9] * rows,
        "guidance_scale": [3.5] * rows,
        "mask_box": [[1, 2, 30, 17]] * rows,
    }


def pictures(rows=B):
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (19, 33, 3), dtype=np.uint8)) for _ in range(rows)]


def window():
    return {
        "x0": torch.randn(B, L, D),
        "trajectory": torch.randn(B, W + 1, L, D),
        "log_prob": torch.randn(B, W),
        "window_sigmas": torch.rand(B, W + 1),
    }


def scores(**changes):
    columns = {
        "sample_id": rollout_columns()["sample_id"],
        "ocr_text": ["Ete", None, ""],
        "ocr_confidence": [0.9, None, 0.0],
        "ocr_accuracy": [2 / 3, None, 0.0],
        "ocr_likelihood": [-0.5, None, -3.25],
        "vlm_score": [None, None, None],
        "style_score": [None, None, None],
        "reward": [2 / 3, None, 0.0],
        "reason": [None, "server http://a:1 did not answer", None],
    }
    return columns | changes


def advantages(**changes):
    columns = {
        "sample_id": rollout_columns()["sample_id"],
        "reward": [2 / 3, None, 0.0],
        "group_mean": [1 / 3, None, 1 / 3],
        "group_std": [1 / 3, None, 1 / 3],
        "advantage": [0.99970009, None, -0.99970009],
        "kept": [True, False, True],
    }
    return columns | changes


def test_what_is_written_is_read_back_bit_by_bit(tmp_path):
    tensors, images = window(), pictures()
    tensors["x0"][0, 0, :3] = torch.tensor([-0.0, 1e-45, 3.4e38])
    write_shard(tmp_path / "a.parquet", rollout_columns(), images, tensors)
    found = read_shard(tmp_path / "a.parquet")
    for name, tensor in tensors.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name].view(torch.int32), tensor.view(torch.int32)), name
    for name, values in rollout_columns().items():
        assert found[name] == values
    for png, image in zip(found["image"], images, strict=True):
        assert np.array_equal(np.asarray(decode_png(png)), np.asarray(image))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_tensor_keeps_its_dtype_and_a_view_keeps_its_values(tmp_path, dtype):
    x0 = torch.randn(D, L, 2 * B).to(dtype).permute(2, 1, 0)[::2]
    write_shard(tmp_path / "a.parquet", rollout_columns(), pictures(), {"x0": x0})
    found = read_shard(tmp_path / "a.parquet", ["x0"])["x0"]
    assert found.dtype == dtype
    assert torch.equal(found, x0)
    found += 1  # its own memory


def test_a_score_table_takes_whatever_else_is_measured(tmp_path):
    path = tmp_path / "s.parquet"
    write_scores(path, scores(legibility=[0.25, None, 1.0]))
    table = read_table(path)
    assert list(table) == [*scores(), "legibility"]
    assert table["legibility"] == [0.25, None, 1.0]
    with pytest.raises(ArtifactError, match="legibility"):
        write_scores(path, scores(legibility=[math.nan, None, 1.0]))


def test_only_the_columns_asked_for_are_read(tmp_path):
    write_shard(tmp_path / "a.parquet", rollout_columns(), pictures(), window())
    assert list(read_shard(tmp_path / "a.parquet", ["text", "log_prob"])) == ["text", "log_prob"]
    with pytest.raises(ArtifactError, match=r"must have the columns \['texts'\]"):
        read_shard(tmp_path / "a.parquet", ["texts"])


def test_equal_rows_give_equal_bytes(tmp_path):
    tensors = window()
    for name in "ab":
        write_shard(tmp_path / name, rollout_columns(), pictures(), tensors)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def test_an_evaluation_shard_needs_no_tensors_and_png_bytes_pass_as_they_are(tmp_path):
    pngs = [encode_png(image) for image in pictures()]
    write_shard(tmp_path / "a.parquet", rollout_columns(), pngs, {})
    found = read_shard(tmp_path / "a.parquet")
    assert found["image"] == pngs
    assert "x0" not in found


def test_hugging_face_datasets_shows_the_pictures(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    datasets = pytest.importorskip("datasets")
    images, tensors = pictures(), window()
    for i in range(2):
        write_shard(tmp_path / f"shard-{i}.parquet", rollout_columns(round=i), images, tensors)
    files = str(tmp_path / "shard-*.parquet")
    found = datasets.load_dataset(
        "parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache")
    )
    assert len(found) == 2 * B
    assert isinstance(found[4]["image"], Image.Image)
    assert np.array_equal(np.asarray(found[4]["image"]), np.asarray(images[1]))
    assert found[4]["mask_box"] == [1, 2, 30, 17]
    assert found[4]["x0"] == tensors["x0"][1].numpy().tobytes()


def test_duckdb_joins_rollouts_scores_and_advantages_in_one_query(tmp_path):
    for name in ("rollout", "score", "advantage"):
        (tmp_path / name).mkdir()
    write_shard(tmp_path / "rollout" / "0.parquet", rollout_columns(), pictures(), window())
    write_scores(tmp_path / "score" / "0.parquet", scores())
    write_advantages(tmp_path / "advantage" / "0.parquet", advantages())
    query = f"""
        SELECT r.text, r.member, s.ocr_text, s.reason, a.advantage, octet_length(r.image.bytes),
            octet_length(r.x0)
        FROM '{tmp_path}/rollout/*.parquet' r
        JOIN '{tmp_path}/score/*.parquet' s USING (sample_id)
        JOIN '{tmp_path}/advantage/*.parquet' a USING (sample_id) ORDER BY sample_id
    """
    rows = duckdb.sql(query).fetchall()
    assert [row[:5] for row in rows] == [
        ("Été", 0, "Ete", None, 0.99970009),
        ("Été", 1, None, "server http://a:1 did not answer", None),
        ("Été", 2, "", None, -0.99970009),
    ]
    assert all(row[5] > 19 * 33 for row in rows)
    assert {row[6] for row in rows} == {L * D * 4}


def test_scores_and_advantages_come_back_exactly_and_nothing_becomes_a_number(tmp_path):
    write_scores(tmp_path / "s", scores())
    write_advantages(tmp_path / "a", advantages())
    assert read_table(tmp_path / "s") == scores()
    assert read_table(tmp_path / "a") == advantages()
    assert read_table(tmp_path / "s", ["reward"]) == {"reward": [2 / 3, None, 0.0]}


@pytest.mark.parametrize("name", ["x0", "trajectory", "log_prob", "window_sigmas"])
def test_nan_and_infinity_are_refused_and_nothing_is_written(tmp_path, name):
    for bad in (math.nan, math.inf):
        tensors = window()
        tensors[name][1].view(-1)[1] = bad
        with pytest.raises(
            ArtifactError, match=f"{name} must be finite. Row 1 holds NaN or infinity"
        ):
            write_shard(tmp_path / "a.parquet", rollout_columns(), pictures(), tensors)
    assert list(tmp_path.iterdir()) == []


def test_a_score_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ArtifactError, match=r"reward must be finite .* Got nan in row 2"):
        write_scores(tmp_path / "s", scores(reward=[1.0, None, math.nan]))


def test_an_unscored_image_needs_a_reason_and_a_scored_one_has_none(tmp_path):
    with pytest.raises(
        ArtifactError, match=r"0004-00000-001 must have a reward or a reason\. Got reward=None"
    ):
        write_scores(tmp_path / "s", scores(reason=[None, None, None]))
    with pytest.raises(ArtifactError, match="0004-00000-000 must have a reward or a reason"):
        write_scores(tmp_path / "s", scores(reason=["late", "late", None]))
    with pytest.raises(ArtifactError, match="0004-00000-001 must have an advantage if kept"):
        write_advantages(tmp_path / "a", advantages(kept=[True, True, True]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c, t: c.pop("seed"), r"Missing: \['seed'\]"),
        (lambda c, t: c.update(case="x"), r"Unknown: \['case'\]"),
        (lambda c, t: c.update(text=["a", "b"]), "text must have 3 rows. Got 2"),
        (lambda c, t: c.update(text=["a", None, "b"]), "text must have a value in every row"),
        (lambda c, t: c.update(member=["a", "b", "c"]), "member must be int32"),
        (lambda c, t: c.update(mask_box=[[1, 2, 3]] * 3), "mask_box must be fixed_size_list"),
        (
            lambda c, t: c.update(sample_id=["a", "b", "a"]),
            "every sample_id must be there once. Twice: a",
        ),
        (lambda c, t: t.pop("log_prob"), "the window's tensors belong together. Missing: log_prob"),
        (lambda c, t: t.update(x0=t["x0"][:2]), r"x0 must have 3 rows\. Got shape \(2, 5, 7\)"),
        (lambda c, t: t.update(x1=t["x0"]), r"tensors must be among .*\. Got x1"),
    ],
)
def test_rows_that_do_not_fit_the_schema_are_refused(tmp_path, change, message):
    columns, tensors = rollout_columns(), window()
    change(columns, tensors)
    with pytest.raises(ArtifactError, match=message):
        write_shard(tmp_path / "a.parquet", columns, pictures(), tensors)


def test_a_damaged_or_missing_file_and_another_schema_are_refused(tmp_path):
    path = tmp_path / "a.parquet"
    with pytest.raises(ArtifactError, match=r"a\.parquet must be a Parquet file\. It is missing"):
        read_shard(path)
    write_shard(path, rollout_columns(), pictures(), window())
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ArtifactError, match=r"a\.parquet must be a whole Parquet file"):
        read_shard(path)
    path.write_bytes(whole)
    table = pq.read_table(path)
    pq.write_table(table.replace_schema_metadata({"schema_version": "9"}), path)
    with pytest.raises(ArtifactError, match=r"must have schema_version 1\. Got 9"):
        read_shard(path)


def test_a_shard_without_rows_keeps_its_shapes(tmp_path):
    write_shard(tmp_path / "a", rollout_columns(rows=0), [], {"x0": torch.empty(0, L, D)})
    assert read_shard(tmp_path / "a", ["x0"])["x0"].shape == (0, L, D)


def test_the_layout_of_the_tensors_stands_in_the_metadata(tmp_path):
    write_shard(tmp_path / "a", rollout_columns(), pictures(), window())
    layout = json.loads(pq.read_schema(tmp_path / "a").metadata[b"tensors"])
    assert layout["trajectory"] == {"dtype": "float32", "shape": [W + 1, L, D]}


def test_rows_of_several_lengths_are_read_back_bit_by_bit(tmp_path):
    tensors = window()
    lengths = [5, 2, 9]
    tensors["x0"] = [torch.randn(n, D) for n in lengths]
    tensors["trajectory"] = [
        torch.randn(W + 1, n, D).transpose(0, 1).contiguous().transpose(0, 1) for n in lengths
    ]
    write_shard(tmp_path / "a.parquet", rollout_columns(), pictures(), tensors)
    layout = json.loads(pq.read_schema(tmp_path / "a.parquet").metadata[b"tensors"])
    assert layout["x0"] == {"dtype": "float32", "shape": [None, D]}
    assert layout["trajectory"]["shape"] == [W + 1, None, D]
    assert layout["log_prob"]["shape"] == [W]
    found = read_shard(tmp_path / "a.parquet")
    for name in ("x0", "trajectory"):
        assert all(torch.equal(a, b) for a, b in zip(found[name], tensors[name], strict=True))
    assert torch.equal(found["log_prob"], tensors["log_prob"])


@pytest.mark.parametrize(
    "rows",
    [
        [torch.zeros(2, 3), torch.zeros(3, 2), torch.zeros(2, 3)],
        [torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 3)],
        [torch.zeros(2, 3), torch.zeros(2, 3).double(), torch.zeros(2, 3)],
    ],
)
def test_rows_that_differ_in_more_than_a_length_are_refused(tmp_path, rows):
    with pytest.raises(ArtifactError, match=r"rows of x0 must have one dtype, and shapes"):
        write_shard(tmp_path / "a.parquet", rollout_columns(), pictures(), {"x0": rows})
