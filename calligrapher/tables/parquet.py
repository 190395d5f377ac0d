"""Parquet, written and read: a row is an image; scores and advantages are joined by `sample_id`.

Legend: B rows, L image tokens, D packed channels, W window steps. Tensors are binary columns (their
bytes, row by row); dtype and shape of a row stand in the schema's metadata under `tensors`, with
null for a dimension that differs between rows: the number of bytes tells it. Lists and Arrow's
tensor type were 5-20 times slower, and the latter makes Hugging Face `datasets` refuse the file.
Pictures are PNG.

```
SELECT r.text, s.ocr_text, a.advantage FROM 'rollout/*.parquet' r
JOIN 'score/*.parquet' s USING (sample_id)
JOIN 'advantage/*.parquet' a USING (sample_id)
```
"""

import concurrent.futures
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from calligrapher.data.images import png_bytes
from calligrapher.durable import atomic_path
from calligrapher.errors import ArtifactError
from calligrapher.tables.schema import (
    ADVANTAGE_COLUMNS,
    IMAGE,
    LETTER_ADVANTAGES,
    LETTER_SCORES,
    ROLLOUT_COLUMNS,
    SCHEMA_VERSION,
    SCORE_COLUMNS,
    TENSOR_COLUMNS,
    WINDOW_COLUMNS,
    huggingface_features,
    sample_id,
)

__all__ = [
    "decode_png",
    "encode_png",
    "read_shard",
    "read_table",
    "sample_id",
    "write_advantages",
    "write_scores",
    "write_shard",
]

_THREADS = 4  # zlib lets go of the interpreter


def write_shard(
    path: str | Path,
    columns: Mapping[str, Sequence[Any]],
    images: Sequence[Image.Image | bytes],
    tensors: Mapping[str, Tensor | Sequence[Tensor]],
) -> None:
    """Write one shard of B rows; it is there whole or not at all.

    columns: every name of ROLLOUT_COLUMNS but `image`, B values each. images: B pictures (or their
    PNG bytes). tensors: names of TENSOR_COLUMNS, [B, ...] each or B rows that differ in one
    dimension at most, stored bit by bit in their own dtype; the window's belong together. Raises
    ArtifactError for missing, unknown, too short or non-finite columns; OSError when the disk is
    full.
    """
    rows = len(images)
    fields = [field for field in ROLLOUT_COLUMNS if field.name != "image"]
    arrays = _arrays(path, fields, columns, rows)
    with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
        pngs = list(
            pool.map(lambda image: image if isinstance(image, bytes) else encode_png(image), images)
        )
    arrays.append(pa.array([{"bytes": png, "path": None} for png in pngs], IMAGE))
    fields.append(ROLLOUT_COLUMNS.field("image"))
    _check_tensors(path, tensors, rows)
    layout = {}
    for name, tensor in tensors.items():
        layout[name] = _layout(path, name, tensor)
        arrays.append(_binary(tensor))
        fields.append(pa.field(name, pa.large_binary(), nullable=False))
    metadata = {
        "huggingface": json.dumps({"info": {"features": huggingface_features(fields)}}),
        "tensors": json.dumps(layout),
        "schema_version": SCHEMA_VERSION,
    }
    table = pa.Table.from_arrays(arrays, schema=pa.schema(fields, metadata))
    opaque = {"image", *tensors}
    _write(path, table, opaque)


def read_shard(path: str | Path, columns: Sequence[str] | None = None) -> dict[str, Any]:
    """Return the named columns of a shard, or all.

    Tensors come as [B, ...] of their own dtype, or as a list of B rows where their shapes differ;
    the rest as lists. `image` comes as PNG bytes (`decode_png` makes pictures of them): what the
    reward servers take. Raises ArtifactError when
    the file is damaged, of another schema, or without a column that was named.
    """
    table = _read(path, columns)
    layout = json.loads(table.schema.metadata[b"tensors"])
    found: dict[str, Any] = {}
    for name in columns or table.column_names:
        column = table.column(name)
        if name in layout:
            found[name] = _tensor(column, layout[name])
        elif name == "image":
            found[name] = pa.chunked_array(
                [c.field("bytes") for c in column.chunks], pa.binary()
            ).to_pylist()
        else:
            found[name] = column.to_pylist()
    return found


def write_scores(path: str | Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write a score table: all columns of SCORE_COLUMNS, then what else was measured, as numbers,
    and `ocr_letters` where letters were asked about.

    Raises ArtifactError when a row has neither a reward nor a reason, or both.
    """
    for sample, reward, reason in zip(
        columns["sample_id"], columns["reward"], columns["reason"], strict=True
    ):
        if (reward is None) != bool(reason):
            raise ArtifactError(
                f"{path}: {sample} must have a reward or a reason. Got {reward=}, {reason=}."
            )
    further = [
        LETTER_SCORES if name == LETTER_SCORES.name else pa.field(name, pa.float64())
        for name in columns
        if name not in SCORE_COLUMNS.names
    ]
    _write_table(path, pa.schema([*SCORE_COLUMNS, *further]), columns)


def write_advantages(path: str | Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write an advantage table.

    It has all columns of ADVANTAGE_COLUMNS, and `letters` where they were compared; the rows kept
    have an advantage.
    """
    for sample, advantage, kept in zip(
        columns["sample_id"], columns["advantage"], columns["kept"], strict=True
    ):
        if (advantage is not None) != kept:
            raise ArtifactError(
                f"{path}: {sample} must have an advantage if kept, else none. Got {advantage=},"
                f" {kept=}."
            )
    further = [LETTER_ADVANTAGES] if LETTER_ADVANTAGES.name in columns else []
    _write_table(path, pa.schema([*ADVANTAGE_COLUMNS, *further]), columns)


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Return a score or advantage table, or some of its columns: name -> values.

    A value that is not there is None.
    """
    return _read(path, columns).to_pydict()


def encode_png(image: Image.Image) -> bytes:
    """Return the PNG bytes of a picture, as a shard holds them."""
    return png_bytes(image)


def decode_png(png: bytes) -> Image.Image:
    """The picture of PNG bytes."""
    image = Image.open(io.BytesIO(png))
    image.load()
    return image


def _write_table(path: str | Path, schema: pa.Schema, columns: Mapping[str, Sequence[Any]]) -> None:
    rows = len(columns["sample_id"])
    arrays = _arrays(path, list(schema), columns, rows)
    _write(
        path,
        pa.Table.from_arrays(
            arrays, schema=schema.with_metadata({"schema_version": SCHEMA_VERSION})
        ),
    )


def _arrays(
    path: str | Path, fields: list[pa.Field], columns: Mapping[str, Sequence[Any]], rows: int
) -> list[pa.Array]:
    """Return one Arrow array per field.

    Raises ArtifactError for anything that does not fit the schema exactly.
    """
    names = [field.name for field in fields]
    if set(names) != set(columns):
        missing, unknown = sorted(set(names) - set(columns)), sorted(set(columns) - set(names))
        raise ArtifactError(
            f"{path} must have the columns {names}. Missing: {missing}. Unknown: {unknown}."
        )
    arrays = []
    for field in fields:
        values = list(columns[field.name])
        if len(values) != rows:
            raise ArtifactError(f"{path}: {field.name} must have {rows} rows. Got {len(values)}.")
        if pa.types.is_floating(field.type):
            bad = [i for i, v in enumerate(values) if v is not None and not np.isfinite(v)]
            if bad:
                raise ArtifactError(
                    f"{path}: {field.name} must be finite (null where there is no value). Got "
                    f"{values[bad[0]]} in row {bad[0]}."
                )
        try:
            array = pa.array(values, field.type)
        except (pa.ArrowException, TypeError, ValueError) as error:
            raise ArtifactError(f"{path}: {field.name} must be {field.type}: {error}") from error
        if array.null_count and not field.nullable:
            raise ArtifactError(f"{path}: {field.name} must have a value in every row. Got null.")
        arrays.append(array)
    ids = columns["sample_id"]
    if len(set(ids)) != rows:
        twice = sorted({i for i in ids if list(ids).count(i) > 1})
        raise ArtifactError(
            f"{path}: every sample_id must be there once. Twice: {', '.join(twice)}."
        )
    return arrays


def _check_tensors(
    path: str | Path, tensors: Mapping[str, Tensor | Sequence[Tensor]], rows: int
) -> None:
    unknown = sorted(set(tensors) - set(TENSOR_COLUMNS))
    if unknown:
        raise ArtifactError(
            f"{path}: tensors must be among {', '.join(TENSOR_COLUMNS)}. Got {', '.join(unknown)}."
        )
    absent = sorted(WINDOW_COLUMNS - set(tensors))
    if absent and len(absent) < len(WINDOW_COLUMNS):
        raise ArtifactError(
            f"{path}: the window's tensors belong together. Missing: {', '.join(absent)}."
        )
    for name, tensor in tensors.items():
        if len(tensor) != rows:
            found = f"shape {tuple(tensor.shape)}" if isinstance(tensor, Tensor) else len(tensor)
            raise ArtifactError(f"{path}: {name} must have {rows} rows. Got {found}.")
        bad = [i for i, row in enumerate(tensor) if not torch.isfinite(row).all()]
        if bad:
            raise ArtifactError(
                f"{path}: {name} must be finite. Row {bad[0]} holds NaN or infinity."
            )


def _layout(path: str | Path, name: str, tensor: Tensor | Sequence[Tensor]) -> dict[str, Any]:
    """Return dtype and shape of a row; null stands for the dimension in which rows differ."""
    if isinstance(tensor, Tensor):
        dtype, shape = tensor.dtype, list(tensor.shape[1:])
    else:
        dtypes, shapes = {row.dtype for row in tensor}, {tuple(row.shape) for row in tensor}
        sides = [set(side) for side in zip(*shapes, strict=False)]
        shape = [side.pop() if len(side) == 1 else None for side in sides]
        if len(dtypes) != 1 or len({len(s) for s in shapes}) != 1 or shape.count(None) > 1:
            raise ArtifactError(
                f"{path}: rows of {name} must have one dtype, and shapes that differ in one"
                f" dimension at most. Got {sorted(map(str, dtypes))} and {sorted(shapes)}."
            )
        (dtype,) = dtypes
    return {"dtype": str(dtype).removeprefix("torch."), "shape": shape}


def _binary(tensor: Tensor | Sequence[Tensor]) -> pa.LargeBinaryArray:
    """[B, ...] -> B binary values that share the tensor's own memory; a list of rows is joined."""
    if isinstance(tensor, Tensor):
        flat = tensor.detach().cpu().contiguous().reshape(-1)
        sizes = np.full(len(tensor), flat.nbytes // max(len(tensor), 1))
    else:
        flat = torch.cat([row.detach().cpu().reshape(-1) for row in tensor])
        sizes = np.array([row.nbytes for row in tensor])
    data = flat.view(torch.uint8).numpy() if flat.numel() else np.empty(0, np.uint8)
    offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(tensor), [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )


def _tensor(column: pa.ChunkedArray, layout: dict[str, Any]) -> Tensor | list[Tensor]:
    """The reverse of `_binary`; one copy, so that the result can be written to."""
    dtype, shape = getattr(torch, layout["dtype"]), layout["shape"]
    array = column.combine_chunks().cast(pa.large_binary())
    if len(array) == 0:
        return [] if None in shape else torch.empty((0, *shape), dtype=dtype)
    _, offsets, data = array.buffers()
    first = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    raw = np.frombuffer(data, np.uint8)[first[0] : first[-1]].copy()
    flat = torch.from_numpy(raw).view(dtype)
    if None not in shape:
        return flat.reshape(len(array), *shape)
    rows = flat.split((np.diff(first) // dtype.itemsize).tolist())
    return [row.reshape([-1 if side is None else side for side in shape]) for row in rows]


def _write(path: str | Path, table: pa.Table, opaque: set[str] = frozenset()) -> None:
    """Write `table`; `opaque` columns are stored as they are, without statistics.

    They hold noise and PNG, which do not compress.
    """
    plain = [name for name in table.column_names if name not in opaque]
    compression = dict.fromkeys(plain, "zstd") | dict.fromkeys(opaque - {"image"}, "none")
    if "image" in opaque:
        compression |= {"image.bytes": "none", "image.path": "none"}
    if "mask_box" in compression:
        del compression["mask_box"]
        compression["mask_box.list.element"] = "zstd"
    with atomic_path(path) as temporary:
        pq.write_table(
            table, temporary, compression=compression, use_dictionary=plain, write_statistics=plain
        )


def _read(path: str | Path, columns: Sequence[str] | None) -> pa.Table:
    try:
        schema = pq.read_schema(path)
        unknown = sorted(set(columns or ()) - set(schema.names))
        if unknown:
            raise ArtifactError(f"{path} must have the columns {unknown}. It has {schema.names}.")
        version = (schema.metadata or {}).get(b"schema_version", b"none").decode()
        if version != SCHEMA_VERSION:
            raise ArtifactError(f"{path} must have schema_version {SCHEMA_VERSION}. Got {version}.")
        return pq.read_table(
            path, columns=None if columns is None else list(columns), partitioning=None
        )
    except FileNotFoundError:
        raise ArtifactError(f"{path} must be a Parquet file. It is missing.") from None
    except (pa.ArrowException, OSError) as error:
        raise ArtifactError(
            f"{path} must be a whole Parquet file. It cannot be read: {error}"
        ) from error
