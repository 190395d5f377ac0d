"""The files below a folder, behind links as well."""

import os
from collections.abc import Iterator
from pathlib import Path


def files_below(folder: Path) -> Iterator[Path]:
    """Yield every file below `folder`, in the order of the names, as if links were what they name.

    A link that leads back to a folder that it lies in holds nothing new and is left out. Links to
    nowhere are no files.
    """
    yield from _walk(folder, above=frozenset())


def _walk(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    real = os.path.realpath(folder)
    if real in above:
        return
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _walk(path, above | {real})
        elif path.is_file():
            yield path
