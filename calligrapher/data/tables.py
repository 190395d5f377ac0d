"""Tables of cases: Parquet files, and what the `datasets` library reads.

Columns `source, mask, reference, text[, case_id][, target][, ocr_match]`. A picture is a path,
relative to the table's folder, or `struct<bytes, path>` as Hugging Face writes it. A case names
files, so pictures that a table holds are written to a cache folder, under the sha256 of their
bytes.
"""

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import ValidationError

from calligrapher.data.lists import (
    Columns,
    ListedCase,
    ListEntry,
    under_our_names,
    wrong_fields,
)
from calligrapher.durable import atomic_write
from calligrapher.errors import DataError, ParamsError
from calligrapher.files import files_below

PICTURES = ("source", "mask", "reference", "target")
SAVED = ("state.json", "dataset_dict.json")  # one of them lies where `save_to_disk` wrote
_BATCH = 16  # rows in memory at once


def parquet_entries(
    path: Path, cache_dir: Path | None, columns: Columns | None = None
) -> Iterator[ListEntry]:
    """Yield the entries of a Parquet file or of a folder of them, row by row."""
    number = 0  # over all files: it makes the case ids
    for table in _tables(path):
        for place, row in enumerate(_rows(table, columns or {}), start=1):
            number += 1
            where = f"{table.name} row {place}"
            if isinstance(row, DataError):
                yield ListEntry(where, error=row)
                continue
            yield _entry(
                where,
                under_our_names(row, columns or {}),
                folder=table.parent,
                name=f"row{number}",
                cache_dir=cache_dir,
            )


def _tables(path: Path) -> list[Path]:
    """Return the Parquet files of a folder, in the order of their names, or the file itself."""
    tables = [path]
    if path.is_dir():
        tables = sorted(file for file in files_below(path) if file.suffix == ".parquet")
    if not tables or not path.exists():
        found = "none in it" if path.is_dir() else "nothing there"
        raise DataError(
            f"{path} must be a Parquet file or a folder of Parquet files. Found {found}."
        )
    return tables


def _rows(table: Path, columns: Columns) -> Iterator[dict[str, Any] | DataError]:
    """Yield the rows of a Parquet file; an error in place of one that cannot be read."""
    try:
        with pq.ParquetFile(table) as file:
            _check_columns(table, file.schema_arrow.names, columns)
            for batch in file.iter_batches(_BATCH):
                for number in range(batch.num_rows):
                    yield _row(batch.slice(number, 1))
    except (pa.ArrowException, OSError) as error:
        raise DataError(
            f"{table} must be a whole, readable Parquet file. Found: {error}."
        ) from error


def _row(batch: pa.RecordBatch) -> dict[str, Any] | DataError:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return DataError(f"its strings must be UTF-8. Found {error.object[:40]!r}.")


def huggingface_entries(
    name: str, cache_dir: Path | None, columns: Columns | None = None
) -> Iterator[ListEntry]:
    """Yield the entries of a folder that `save_to_disk` wrote, or of what `load_dataset` takes.

    A dataset of several splits needs one named: `PATH#train`.
    """
    path, _, split = name.partition("#")
    rows = _one_split(path, _loaded(path, cache_dir), split)
    _check_columns(name, rows.column_names, columns or {})
    where = Path(path).name
    for number, row in enumerate(_undecoded(rows), start=1):
        yield _entry(
            f"{where} row {number}",
            under_our_names(row, columns or {}),
            folder=Path(path).absolute(),
            name=f"row{number}",
            cache_dir=cache_dir,
        )


def _loaded(path: str, cache_dir: Path | None) -> Any:
    """Return the Dataset or DatasetDict.

    `datasets` copies what it reads into our cache, not into the user's.
    """
    try:
        import datasets
    except ImportError as error:
        raise ParamsError(
            "kind must not be huggingface where the package datasets is not installed. Install it"
            " with `pip install 'datasets>=4'`, or use another kind."
        ) from error
    try:
        if any((Path(path) / file).is_file() for file in SAVED):
            return datasets.load_from_disk(path)
        return datasets.load_dataset(path, cache_dir=cache_dir and str(cache_dir / "huggingface"))
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        raise DataError(
            f"{path} must be a dataset that `datasets` reads. Found: {error}"
        ) from error


def _one_split(path: str, loaded: Any, split: str) -> Any:
    if not isinstance(loaded, dict):
        if split:
            raise DataError(
                f"{path} must have splits for #{split} to name one. Found a single table."
            )
        return loaded
    if not split and len(loaded) == 1:
        return next(iter(loaded.values()))
    if split not in loaded:
        raise DataError(
            f"{path} must be given with one of its splits, as {path}#{next(iter(loaded))}. Found "
            f"{', '.join(loaded)}; got {split or 'none'}."
        )
    return loaded[split]


def _undecoded(rows: Any) -> Iterable[dict[str, Any]]:
    """Return the rows with pictures as the bytes that were stored, which encoding would change."""
    from datasets import Image

    for column, feature in rows.features.items():
        if isinstance(feature, Image):
            rows = rows.cast_column(column, Image(decode=False))
    return rows


def _check_columns(where: Path | str, found: list[str], columns: Columns) -> None:
    required = {name for name, field in ListedCase.model_fields.items() if field.is_required()}
    missing = {columns.get(name, name) for name in required | set(columns)} - set(found)
    unknown = set() if columns else set(found) - set(ListedCase.model_fields)
    if missing or unknown:
        wrong = {"without": missing, "also": unknown}
        told = " and ".join(
            f"{word} {', '.join(sorted(names))}" for word, names in wrong.items() if names
        )
        fields = ", ".join(columns.get(name, name) for name in ListedCase.model_fields)
        raise DataError(
            f"{where} must have the columns {fields} (the last three may be left out). Found"
            f" {told}. Name yours in data.columns, or rename or drop them."
        )


def _entry(
    where: str, row: dict[str, Any], *, folder: Path, name: str, cache_dir: Path | None
) -> ListEntry:
    try:
        paths = {column: _picture_path(row.get(column), cache_dir) for column in PICTURES}
        return ListEntry(where, (ListedCase.model_validate(row | paths).case(folder, name),))
    except ValidationError as error:
        problem = DataError(f"must have its pictures and its text. Found {wrong_fields(error)}.")
        return ListEntry(where, error=problem)
    except DataError as error:
        return ListEntry(where, error=error)


def _picture_path(value: Any, cache_dir: Path | None) -> Any:
    """Return a path as it stands; bytes become a file. ListedCase refuses what is neither."""
    path = value
    if isinstance(value, dict):
        path = value.get("path")
        value = value.get("bytes")
    return path if not isinstance(value, bytes) else str(_cached(value, cache_dir))


def _cached(content: bytes, cache_dir: Path | None) -> Path:
    """Return the file of the cache with these bytes; a damaged one is written anew."""
    if cache_dir is None:
        raise ParamsError(
            "cache_dir must be given: this table holds pictures, and cases are files. Got None."
        )
    path = cache_dir / hashlib.sha256(content).hexdigest()
    if not path.is_file() or path.read_bytes() != content:
        cache_dir.mkdir(parents=True, exist_ok=True)
        atomic_write(path, content)
    return path
