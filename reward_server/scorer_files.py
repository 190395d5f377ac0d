"""A scorer of one's own: which file and class it is, checked without running it.

`legible=my_rewards.py:Legible?darker_than=90` measures the component `legible` by the class
`Legible` of that file, made with `Legible(darker_than="90")`. Standard library only: params,
servers and fingerprints read the same words.
"""

import ast
import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from reward_server.components import FACTORS, NAMES

FORM = "FILE:CLASS or FILE:CLASS?KEY=VALUE&KEY=VALUE"
_NAME = re.compile(r"[a-z][a-z0-9_]{0,39}")
# Columns of the score table, keys of an answer, and metrics beside the components.
_TAKEN = {"sample_id", "case_id", "reward", "reason", "text", "errors", "kinds", "images"}
_TAKEN |= {"unscored", "exact_match", "reward_model_disabled", "style", "spread", "error"}
_TAKEN |= {"second_ocr_text", "second_ocr_accuracy", "background_error", "background_psnr"}
# The scorers that a server brings along: status and metrics speak of each by its name.
_TAKEN |= {"ocr", "vlm", "debug", "scorers"}


def check_own_name(name: str) -> str:
    """Return `name`. Raises ValueError unless it can name a component of one's own."""
    if not _NAME.fullmatch(name) or name in (*_TAKEN, *NAMES, *FACTORS):
        raise ValueError(
            "a scorer's name must be 1 to 40 of a-z, 0-9 and _, begin with a letter, and not be"
            f" taken ({', '.join(NAMES)}, reward, reason ...). Got {name!r}. Choose another."
        )
    return name


@dataclass(frozen=True)
class ScorerFile:
    """One scorer: `cls` of the Python file `path`, called with `arguments` (texts)."""

    name: str
    path: Path
    cls: str
    arguments: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def parse(cls, name: str, text: str) -> "ScorerFile":
        """Return what `FILE:CLASS?KEY=VALUE` names. Raises ValueError; opens nothing."""
        check_own_name(name)
        place, _, query = text.partition("?")
        path, colon, attribute = place.rpartition(":")
        pairs = [pair.partition("=") for pair in query.split("&") if pair]
        keys = [key for key, _, _ in pairs]
        named = path and colon and attribute.isidentifier()
        if not named or not all(key.isidentifier() and sign for key, sign, _ in pairs):
            raise ValueError(f"scorer {name} must be {FORM}. Got {text!r}.")
        if len(set(keys)) != len(keys):
            raise ValueError(f"scorer {name} must be given each argument once. Got {text!r}.")
        given = {key: unquote(value) for key, _, value in pairs}
        return cls(name, Path(path).expanduser(), attribute, given)

    def text(self, absolute: Callable[[str], str] = str) -> str:
        """Return `FILE:CLASS?KEY=VALUE` with paths as `absolute` makes them."""
        quoted = {key: absolute(value) for key, value in self.arguments.items()}
        query = "&".join(
            f"{key}={value.replace('%', '%25').replace('&', '%26')}"
            for key, value in quoted.items()
        )
        return f"{absolute(str(self.path))}:{self.cls}" + (f"?{query}" if query else "")

    def check(self) -> None:
        """Raise ValueError unless the file can be read, is Python, and names the class.

        Nothing of it is run: what it imports may take a minute.
        """
        try:
            tree = ast.parse(self.path.read_bytes(), filename=str(self.path))
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(
                f"scorer {self.name} must be in a readable Python file. Got {self.path}: {error}."
            ) from None
        names = set(_bound(tree))
        if self.cls not in names and "*" not in names:
            classes = [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
            raise ValueError(
                f"scorer {self.name} must be a class of {self.path}. Got {self.cls}; there are:"
                f" {', '.join(classes) or 'none'}."
            )

    def identity(self) -> dict[str, str]:
        """Return what decides its numbers: class, digests of the file and of each argument.

        An argument that names a file or a folder counts with its content, wherever that lies.
        Raises ValueError.
        """
        try:
            found = {"class": self.cls, "sha256": content_digest(self.path)}
            for key, value in sorted(self.arguments.items()):
                place = Path(value).expanduser()
                there = value != "" and place.exists()
                found[f"argument {key}"] = f"sha256:{content_digest(place)}" if there else value
        except OSError as error:
            raise ValueError(
                f"scorer {self.name} must be made of readable files. Got {error}."
            ) from None
        return found


def content_digest(path: Path) -> str:
    """sha256 of a file, or over names and contents of all files below a folder."""
    if not path.is_dir():
        with path.open("rb") as handle:
            return hashlib.file_digest(handle, "sha256").hexdigest()
    lines = [
        f"{file.relative_to(path).as_posix()}:{content_digest(file)}"
        for file in sorted(path.rglob("*"))
        if file.is_file() and "__pycache__" not in file.parts
    ]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _bound(tree: ast.Module):
    """Yield the names that a module's own statements bind, those in `if` and `try` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from (alias.asname or alias.name for alias in node.names)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
