"""What a run leaves can be read without this project: Hugging Face `datasets`, DuckDB, a folder
listing."""

import duckdb
import pytest


@pytest.fixture
def round_folder(train):
    folder, _ = train("a", "grpo", rounds=1)
    return folder / "round-0000"


def test_datasets_shows_the_pictures(round_folder, tmp_path):
    import datasets

    shards = [str(path) for path in sorted((round_folder / "rollout").glob("*.parquet"))]
    table = datasets.load_dataset(
        "parquet", data_files=shards, split="train", cache_dir=str(tmp_path / "c")
    )
    assert len(table) == 9
    assert isinstance(table.features["image"], datasets.Image)
    assert table[4]["image"].size == (48, 32)
    assert table[4]["sample_id"] == "0000-00001-001"
    assert table[4]["prompt"] == f"The text is '{table[4]['text']}'."


def test_duckdb_joins_images_scores_and_advantages_by_sample(round_folder):
    found = duckdb.sql(f"""
        SELECT sample_id, r.text, s.reward, a.advantage, a.group_mean,
               octet_length(r.image.bytes) AS bytes
        FROM '{round_folder}/rollout/*.parquet' r
        JOIN '{round_folder}/score/*.parquet' s USING (sample_id)
        JOIN '{round_folder}/advantage/*.parquet' a USING (sample_id)
        ORDER BY sample_id
        """).fetchall()
    assert len(found) == 9
    assert [row[0] for row in found] == [
        f"0000-{g:05d}-{m:03d}" for g in range(3) for m in range(3)
    ]
    for group in (found[0:3], found[3:6], found[6:9]):
        mean = sum(row[2] for row in group) / 3
        assert all(row[4] == pytest.approx(mean) for row in group)
        assert sorted(group, key=lambda row: row[2]) == sorted(group, key=lambda row: row[3])
        assert sum(row[3] for row in group) == pytest.approx(0, abs=1e-9)
    assert all(row[5] > 100 for row in found)
