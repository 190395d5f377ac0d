"""What a model folder's weights are: one digest over all that decides its answers."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

_DECIDES = (".safetensors", ".bin", ".json", ".txt", ".model", ".jinja")


def folder_digest(path: Path) -> str:
    """sha256 over name and whole content of each file that a model is loaded from.

    Files are read side by side (15 GB in five files take seconds, and loading reads them anyway);
    notes and licences beside them do not count.
    """
    files = sorted(file for file in path.iterdir() if file.suffix in _DECIDES)
    with ThreadPoolExecutor(8) as pool:
        digests = list(pool.map(_file_digest, files))
    lines = [f"{file.name}:{digest}" for file, digest in zip(files, digests, strict=True)]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _file_digest(path: Path) -> str:
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()
