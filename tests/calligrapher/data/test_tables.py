"""Tables of cases: Parquet and `datasets` give the cases that a list gives; pictures in them become
files."""

import json
import sys

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from calligrapher.data.dataset import load_cases
from calligrapher.errors import DataError, ParamsError

datasets = pytest.importorskip("datasets")
SIZE = (24, 18)
PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


@pytest.fixture
def folder(tmp_path):
    """Pictures of samples 1 to 3."""
    for number in (1, 2, 3):
        Image.new("RGB", SIZE, (number, 0, 0)).save(tmp_path / f"{number}-source.png")
        Image.new("RGB", (40, 11), (0, number, 0)).save(tmp_path / f"{number}-reference.png")
        mask = Image.new("L", SIZE)
        mask.paste(255, (3, 4, 15, 9))
        mask.save(tmp_path / f"{number}-mask.png")
    return tmp_path


def row(folder, number, *, embedded=True, **changes):
    found = {"text": f"word {number}"}
    for role in ("source", "mask", "reference"):
        path = folder / f"{number}-{role}.png"
        found[role] = {"bytes": path.read_bytes(), "path": path.name} if embedded else path.name
    return found | changes


def table(folder, *rows, name="cases.parquet", **types):
    path = folder / name
    columns = {key: pa.array([r.get(key) for r in rows], types.get(key)) for key in rows[0]}
    pq.write_table(pa.table(columns), path)
    return path


def problems(path, kind="parquet"):
    with pytest.raises(DataError) as caught:
        load_cases(path, kind, path.parent / "cache")
    return str(caught.value).splitlines()[1:]


def test_pictures_in_a_table_become_the_same_cases_as_files_beside_it(folder):
    embedded = load_cases(
        table(folder, *(row(folder, n) for n in (1, 2))), "parquet", folder / "cache"
    )
    named = load_cases(
        table(folder, *(row(folder, n, embedded=False) for n in (1, 2)), name="named.parquet"),
        "parquet",
    )
    assert [c.text for c in embedded] == ["word 1", "word 2"]
    assert [c.digest for c in embedded] == [c.digest for c in named]
    assert [c.case_id for c in embedded] == [c.case_id for c in named]
    assert embedded[0].case_id.startswith("row1-word_1-")
    assert named[1].source == folder / "2-source.png"


def test_a_picture_is_written_once_under_the_hash_of_its_bytes(folder):
    path = table(folder, row(folder, 1), row(folder, 2, mask=row(folder, 1)["mask"]))
    first, second = load_cases(path, "parquet", folder / "cache")
    assert first.mask == second.mask
    assert first.mask.read_bytes() == (folder / "1-mask.png").read_bytes()
    files = sorted((folder / "cache").iterdir())
    assert len(files) == 5  # Two sources, two references, one mask.

    before = [file.stat().st_mtime_ns for file in files]
    first.source.write_bytes(b"damaged")
    assert load_cases(path, "parquet", folder / "cache")[0].source.read_bytes() != b"damaged"
    after = [file.stat().st_mtime_ns for file in files]
    assert sum(a != b for a, b in zip(after, before, strict=True)) == 1


def test_a_folder_of_tables_is_read_in_the_order_of_its_files(folder):
    (folder / "tables" / "b").mkdir(parents=True)
    table(folder, row(folder, 1), name="tables/a.parquet")
    table(folder, row(folder, 2), row(folder, 3), name="tables/b/b.parquet")
    cases = load_cases(folder / "tables", "parquet", folder / "cache")
    assert [(case.case_id[:4], case.text) for case in cases] == [
        ("row1", "word 1"),
        ("row2", "word 2"),
        ("row3", "word 3"),
    ]


def test_tables_behind_a_linked_folder_are_read_as_if_they_lay_there(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (folder / "parts").mkdir()
    table(folder / "parts", row(folder, 1), name="1.parquet")
    table(elsewhere, row(folder, 2), row(folder, 3), name="2.parquet")
    (folder / "parts" / "more").symlink_to(elsewhere)
    cases = load_cases(folder / "parts", "parquet", folder / "cache")
    assert [case.text for case in cases] == ["word 1", "word 2", "word 3"]


def test_more_rows_than_a_batch_keep_their_order(folder):
    path = table(folder, *(row(folder, 1, case_id=f"case{n}") for n in range(35)))
    cases = load_cases(path, "parquet", folder / "cache")
    assert [case.case_id for case in cases] == [f"case{n}" for n in range(35)]


def test_every_broken_row_is_named_in_one_pass(folder):
    rows = [
        row(folder, 1, source={"bytes": b"<html>", "path": "a.png"}),
        row(folder, 2, text="two\nlines"),
        row(folder, 3, mask=None),
        row(folder, 1, text=None),
        row(folder, 2, case_id="a/b"),
        row(folder, 3),
    ]
    rows = [{"case_id": None, **r} for r in rows]
    found = problems(table(folder, *rows, mask=PICTURE))
    assert len(found) == 5
    for number, (problem, said) in enumerate(
        zip(
            found,
            ["in no known image", "one line", "mask: Input", "text: Input", "case_id: "],
            strict=True,
        ),
        start=1,
    ):
        assert problem.startswith(f"- cases.parquet row {number}")
        assert said in problem


def test_a_string_that_is_no_utf_8_is_told_with_its_row(folder):
    path = table(folder, row(folder, 1), row(folder, 2), row(folder, 3))
    whole = pq.read_table(path)
    words = pa.array([b"one", b"caf\xe9", b"three"], pa.binary()).view(pa.string())
    pq.write_table(whole.set_column(whole.schema.get_field_index("text"), "text", words), path)
    (problem,) = problems(path)
    assert problem == r"- cases.parquet row 2: its strings must be UTF-8. Found b'caf\xe9'."


def test_an_empty_cell_is_told_with_its_row(folder):
    rows = [row(folder, 1), row(folder, 2, source=""), row(folder, 3)]
    (problem,) = problems(
        table(folder, *(r | {"source": r["source"] and "1-source.png"} for r in rows))
    )
    assert problem.startswith("- cases.parquet row 2: must have its pictures and its text. Found ")
    assert "source: String should have at least 1 character" in problem


def test_columns_that_are_missing_or_unknown_are_named(folder):
    odd = [{"txt" if key == "text" else key: value for key, value in row(folder, 1).items()}]
    with pytest.raises(
        DataError, match=r"Found without text and also txt\. Name yours in data\.columns"
    ):
        load_cases(table(folder, *odd), "parquet", folder / "cache")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nothing", r"must be a Parquet file or a folder of Parquet files\. Found nothing there"),
        ("empty", r"must be a Parquet file or a folder of Parquet files\. Found none in it"),
        ("1-mask.png", r"must be a whole, readable Parquet file"),
        ("cut.parquet", r"must be a whole, readable Parquet file"),
    ],
)
def test_what_is_no_parquet_is_refused(folder, name, message):
    (folder / "empty").mkdir()
    whole = table(folder, row(folder, 1)).read_bytes()
    (folder / "cut.parquet").write_bytes(whole[: len(whole) - 50])
    with pytest.raises(DataError, match=message):
        load_cases(folder / name, "parquet", folder / "cache")


def test_a_table_without_rows_is_refused(folder):
    path = folder / "none.parquet"
    pq.write_table(pq.read_table(table(folder, row(folder, 1))).slice(0, 0), path)
    assert problems(path) == ["- none.parquet: must list at least one case. Found none."]


def test_pictures_in_a_table_need_a_place_for_them(folder):
    with pytest.raises(ParamsError, match="cache_dir must be given"):
        load_cases(table(folder, row(folder, 1)), "parquet")


# --- datasets ---


def hugging(folder, *numbers):
    kinds = {role: datasets.Image() for role in ("source", "mask", "reference")}
    rows = [row(folder, number) for number in numbers]
    return datasets.Dataset.from_list(
        rows, datasets.Features(kinds | {"text": datasets.Value("string")})
    )


def test_a_dataset_saved_on_disk_keeps_the_bytes_of_its_pictures(folder):
    hugging(folder, 1, 3).save_to_disk(folder / "saved")
    first, second = load_cases(folder / "saved", "huggingface", folder / "cache")
    assert first.source.read_bytes() == (folder / "1-source.png").read_bytes()
    assert (second.text, second.case_id[:5]) == ("word 3", "row2-")


def test_of_several_splits_one_must_be_named(folder):
    splits = {"train": hugging(folder, 1), "held_out": hugging(folder, 2, 3)}
    datasets.DatasetDict(splits).save_to_disk(folder / "saved")
    assert len(load_cases(f"{folder}/saved#held_out", "huggingface", folder / "cache")) == 2
    with pytest.raises(DataError, match=r"saved#train\. Found train, held_out; got none"):
        load_cases(folder / "saved", "huggingface", folder / "cache")
    with pytest.raises(DataError, match=r"Found train, held_out; got test"):
        load_cases(f"{folder}/saved#test", "huggingface", folder / "cache")


def test_a_local_dataset_folder_is_read_and_its_copy_stays_in_our_cache(folder):
    (folder / "local").mkdir()
    records = []
    for number in (2, 1):
        names = {role: f"{number}-{role}.png" for role in ("source", "mask", "reference")}
        for name in names.values():
            (folder / name).rename(folder / "local" / name)
        records.append(
            {f"{role}_file_name": name for role, name in names.items()} | {"text": f"{number}!"}
        )
    (folder / "local" / "metadata.jsonl").write_text("\n".join(map(json.dumps, records)))
    cases = load_cases(folder / "local", "huggingface", folder / "cache")
    assert [case.text for case in cases] == ["2!", "1!"]
    assert cases[0].source == folder / "local" / "2-source.png"
    assert (folder / "cache" / "huggingface").is_dir()


@pytest.mark.parametrize("name", ["nowhere/at/all", "1-mask.png"])
def test_what_datasets_cannot_read_is_refused(folder, name):
    with pytest.raises(DataError, match="must be a dataset that `datasets` reads"):
        load_cases(folder / name, "huggingface", folder / "cache")


def test_without_the_package_the_error_says_what_to_install(folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ParamsError, match="pip install 'datasets>=4'"):
        load_cases(folder, "huggingface", folder / "cache")


# --- tables with other names ---

COLUMNS = {"text": "caption", "source": "image"}


def test_a_table_with_names_of_its_own_gives_the_same_cases(folder):
    ours = [row(folder, n) for n in (1, 2)]
    theirs = [
        {"caption": r["text"], "image": r["source"], "text": "what is not meant", "year": 1999}
        | {role: r[role] for role in ("mask", "reference")}
        for r in ours
    ]
    wanted = load_cases(table(folder, *ours), "parquet", folder / "cache")
    found = load_cases(
        table(folder, *theirs, name="theirs.parquet"), "parquet", folder / "cache", COLUMNS
    )
    assert [case.digest for case in found] == [case.digest for case in wanted]
    saved = datasets.Dataset.from_list(theirs)
    saved.save_to_disk(folder / "saved")
    found = load_cases(folder / "saved", "huggingface", folder / "cache", COLUMNS)
    assert [case.digest for case in found] == [case.digest for case in wanted]


def test_jsonl_with_names_of_its_own_gives_the_same_cases(folder):
    ours = [row(folder, n, embedded=False) for n in (1, 2)]
    theirs = [
        {"caption": r["text"], "image": r["source"], "mask": r["mask"], "reference": r["reference"]}
        | {"n": 3}
        for r in ours
    ]
    for name, rows in (("ours", ours), ("theirs", theirs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    wanted = load_cases(folder / "ours.jsonl", "jsonl")
    assert load_cases(folder / "theirs.jsonl", "jsonl", columns=COLUMNS) == wanted
    with pytest.raises(DataError, match="Field required"):
        load_cases(folder / "theirs.jsonl", "jsonl", columns={"text": "title", "source": "image"})
    (folder / "theirs.jsonl").write_text("{")
    with pytest.raises(DataError, match="must be JSON"):
        load_cases(folder / "theirs.jsonl", "jsonl", columns=COLUMNS)


def test_a_named_column_that_is_not_there_is_told_and_lists_without_columns_take_none(folder):
    path = table(folder, row(folder, 1))
    with pytest.raises(DataError, match=r"columns source, mask, reference, caption.*without capt"):
        load_cases(path, "parquet", folder / "cache", {"text": "caption"})
    with pytest.raises(
        ParamsError, match=r"data\.columns must be left out where data\.kind is self"
    ):
        load_cases(folder, "self", None, {"text": "caption"})
