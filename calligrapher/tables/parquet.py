"""Reading and writing Parquet: rollout shards, one row per image; scores and advantages by
`sample_id`.

Legend: B rows, L image tokens, D packed channels, W window steps. Tensors are binary columns (their
bytes, row by row); dtype and shape of a row stand in the schema's metadata under `tensors`. Lists
and Arrow's tensor type were 5-20 times slower, and the latter makes Hugging Face `datasets` refuse
the file. Pictures are PNG.

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
    tensors: Mapping[str, Tensor],
) -> None:
    """Write one shard of B rows; it is there whole or not at all.

    columns: every name of ROLLOUT_COLUMNS but `image`, B values each. images: B pictures (or their
    PNG bytes). tensors: names of TENSOR_COLUMNS, [B, ...] each, stored bit by bit in their own
    dtype; the window's belong together. Raises ArtifactError for missing, unknown, too short or
    non-finite columns; OSError when the disk is full.
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
        layout[name] = {
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "shape": list(tensor.shape[1:]),
        }
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
    """Read the named columns of a shard, or all: tensors as [B, ...] of their own dtype, the rest
    as lists.

    `image` comes as PNG bytes (`decode_png` makes pictures of them): what the reward servers take.
    Raises ArtifactError when the file is damaged, of another schema, or without a column that was
    named.
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
    """Write a score table: all columns of SCORE_COLUMNS, then what else was measured, as numbers.

    Raises ArtifactError when a row has neither a reward nor a reason, or both.
    """
    for sample, reward, reason in zip(
        columns["sample_id"], columns["reward"], columns["reason"], strict=True
    ):
        if (reward is None) != bool(reason):
            raise ArtifactError(
                f"{path}: {sample} must have a reward or a reason. Got {reward=}, {reason=}."
            )
    further = [pa.field(name, pa.float64()) for name in columns if name not in SCORE_COLUMNS.names]
    _write_table(path, pa.schema([*SCORE_COLUMNS, *further]), columns)


def write_advantages(path: str | Path, columns: Mapping[str, Sequence[Any]]) -> None:
    """Write an advantage table: all columns of ADVANTAGE_COLUMNS; the rows kept have an
    advantage."""
    for sample, advantage, kept in zip(
        columns["sample_id"], columns["advantage"], columns["kept"], strict=True
    ):
        if (advantage is not None) != kept:
            raise ArtifactError(
                f"{path}: {sample} must have an advantage if kept, else none. Got {advantage=},"
                f" {kept=}."
            )
    _write_table(path, ADVANTAGE_COLUMNS, columns)


def read_table(path: str | Path, columns: Sequence[str] | None = None) -> dict[str, list[Any]]:
    """Read a score or advantage table, or some of its columns: name -> values, None where there is
    none."""
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
    """One Arrow array per field. Raises ArtifactError for anything that does not fit the schema
    exactly."""
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


def _check_tensors(path: str | Path, tensors: Mapping[str, Tensor], rows: int) -> None:
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
            raise ArtifactError(
                f"{path}: {name} must have {rows} rows. Got shape {tuple(tensor.shape)}."
            )
        if not torch.isfinite(tensor).all():
            bad = (~torch.isfinite(tensor).flatten(1).all(1)).nonzero()[0].item()
            raise ArtifactError(f"{path}: {name} must be finite. Row {bad} holds NaN or infinity.")


def _binary(tensor: Tensor) -> pa.LargeBinaryArray:
    """[B, ...] -> B binary values that share the tensor's own memory."""
    tensor = tensor.detach().cpu().contiguous()
    data = tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else np.empty(0, np.uint8)
    offsets = np.arange(len(tensor) + 1, dtype=np.int64) * (data.nbytes // max(len(tensor), 1))
    return pa.LargeBinaryArray.from_buffers(
        pa.large_binary(), len(tensor), [None, pa.py_buffer(offsets), pa.py_buffer(data)]
    )


def _tensor(column: pa.ChunkedArray, layout: dict[str, Any]) -> Tensor:
    """The reverse of `_binary`; one copy, so that the result can be written to."""
    dtype, shape = getattr(torch, layout["dtype"]), layout["shape"]
    array = column.combine_chunks().cast(pa.large_binary())
    if len(array) == 0:
        return torch.empty((0, *shape), dtype=dtype)
    _, offsets, data = array.buffers()
    first = np.frombuffer(offsets, np.int64)[array.offset : array.offset + len(array) + 1]
    raw = np.frombuffer(data, np.uint8)[first[0] : first[-1]].copy()
    return torch.from_numpy(raw).view(dtype).reshape(len(array), *shape)


def _write(path: str | Path, table: pa.Table, opaque: set[str] = frozenset()) -> None:
    """Noise and PNG do not compress: `opaque` columns are stored as they are, without
    statistics."""
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
