"""Makes cases from a folder of pictures that show text: resumable, picture by picture.

`OUT/NAME/` holds what came of one picture: `source.png`, `1-mask.png`, `1-reference.png`, ... and
`record.json`. It appears whole, by renaming, or not at all; the same command again skips what is
there. `OUT/cases.jsonl` lists the cases of all pictures, written last.
"""

import hashlib
import json
import logging
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from calligrapher.data.cutting import Rules, TextPlace, cut_cases
from calligrapher.data.images import load_rgb
from calligrapher.durable import atomic_write, fsync_path, is_temporary
from calligrapher.errors import DataError, ParamsError
from calligrapher.files import files_below
from tasks.artifacts.lock import run_lock
from tasks.progress import Progress

logger = logging.getLogger(__name__)

# [H, W, 3] uint8 RGB -> its texts, in reading order
SceneReader = Callable[[np.ndarray], Sequence[TextPlace]]

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff")
UNREADABLE = "not a readable picture"
LIST, RECORD, SETTINGS = "cases.jsonl", "record.json", "settings.json"


@dataclass(frozen=True)
class MadeCases:
    """What came of the pictures."""

    path: Path
    pictures: int
    cases: int
    skipped: Counter[str]  # reason -> pictures that gave no case
    left_out: Counter[str]  # reason -> texts that gave no case
    unreadable: tuple[str, ...]  # the pictures that could not be read

    def text(self) -> str:
        lines = [f"{self.cases} cases of {self.pictures} pictures are in {self.path}."]
        for what, counts in (("pictures", self.skipped), ("texts", self.left_out)):
            lines.append(f"{what} that gave no case: {counts.total()}")
            lines += [f"{count:>8}  {reason}" for reason, count in sorted(counts.items())]
        if self.unreadable:
            lines.append(f"{UNREADABLE}: {', '.join(self.unreadable)}")
        return "\n".join(lines)


def make_cases(
    pictures: Path,
    out: Path,
    *,
    read: SceneReader,
    reads_with: Mapping[str, str],
    rules: Rules,
    max_cases: int | None = None,
) -> MadeCases:
    """Make the cases of all pictures below `pictures`, in the order of their names.

    At most `max_cases` are made. `reads_with` says what `read` is. Raises ParamsError when `out`
    was made with other settings or lies in `pictures`, DataError when there is no picture,
    RunLockedError when another process works on `out`.
    """
    paths = _pictures(pictures, out)
    logger.info("%d pictures are below %s", len(paths), pictures)
    with run_lock(out), Progress("data make", len(paths), "picture") as progress:
        _same_settings(
            out / SETTINGS, {"rules": rules.model_dump(), "reads_with": dict(reads_with)}
        )
        for leftover in filter(is_temporary, out.iterdir()):
            shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
        records: list[dict[str, Any]] = []
        count = 0
        for path in paths:
            if max_cases is not None and count >= max_cases:
                break
            name = path.relative_to(pictures)
            records.append(_record(path, name, out=out, read=read, rules=rules))
            count += len(records[-1]["cases"])
            progress.advance(cases=count)
        cases = [case for record in records for case in record["cases"]][:max_cases]
        atomic_write(out / LIST, "".join(map(_line, cases)).encode())
    return MadeCases(
        path=out / LIST,
        pictures=len(records),
        cases=len(cases),
        skipped=Counter(record["skipped"] for record in records if record["skipped"]),
        left_out=sum((Counter(record["left_out"]) for record in records), Counter()),
        unreadable=tuple(r["picture"] for r in records if r["skipped"] == UNREADABLE),
    )


def _pictures(folder: Path, out: Path) -> list[Path]:
    if out.resolve().is_relative_to(folder.resolve()):
        raise ParamsError(f"OUT must not lie in the folder of pictures. Got {out} in {folder}.")
    paths = []
    if folder.is_dir():
        paths = sorted(p for p in files_below(folder) if p.suffix.lower() in SUFFIXES)
    if not paths:
        raise DataError(
            f"{folder} must be a folder that holds pictures ({', '.join(SUFFIXES)}). Found none."
        )
    return paths


def _same_settings(path: Path, settings: dict[str, Any]) -> None:
    """Write the settings down. Raises ParamsError when other ones are written there already."""
    text = json.dumps(settings, indent=1, sort_keys=True) + "\n"
    if not path.exists():
        atomic_write(path, text.encode())
    elif path.read_text() != text:
        raise ParamsError(
            f"{path.parent} must be made with the settings that it was begun with ({path}). Got"
            f" others: {json.dumps(settings)}. Use the same, or another folder."
        )


def _record(
    path: Path, name: Path, *, out: Path, read: SceneReader, rules: Rules
) -> dict[str, Any]:
    """Return the record of one picture: the one that is there, or a new one.

    name: the picture's path below the folder; its bytes may be no UTF-8.
    """
    name_bytes = os.fsencode(name.as_posix())
    digest = _digest(path)
    plain = re.sub(r"[^A-Za-z0-9]+", "_", path.stem).strip("_")[:40] or "picture"
    place = f"{plain}-{hashlib.sha256(name_bytes).hexdigest()[:8]}"
    final = out / place
    if (final / RECORD).is_file():
        record = json.loads((final / RECORD).read_bytes())
        if record["sha256"] == digest:
            return record
        shutil.rmtree(final)  # The picture has changed since.
    building = out / f".writing-{place}"
    building.mkdir()
    shown = name_bytes.decode(errors="backslashreplace")
    record = {"picture": shown, "sha256": digest}
    record |= _built(path, building, place=place, read=read, rules=rules)
    (building / RECORD).write_text(
        json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
    )
    for file in building.iterdir():
        fsync_path(file)
    fsync_path(building)
    os.rename(building, final)
    fsync_path(out)
    return record


def _digest(path: Path) -> str:
    """Return the sha256 of a picture; "" for one that may not be read: it is tried again."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _built(
    path: Path, folder: Path, *, place: str, read: SceneReader, rules: Rules
) -> dict[str, Any]:
    """Write the pictures of the cases into `folder`; return what the record says of them."""
    try:
        picture = load_rgb(path)
    except DataError as error:
        logger.warning("no case: %s", error)
        return {"cases": [], "skipped": UNREADABLE, "left_out": {}}
    places = read(np.asarray(picture))
    cuts, left_out = cut_cases(picture.size, places, rules)
    cases = []
    for number, cut in enumerate(cuts, start=1):
        files = {
            "source": "source.png",
            "mask": f"{number}-mask.png",
            "reference": f"{number}-reference.png",
        }
        cut.mask.save(folder / files["mask"])
        picture.crop(cut.reference).save(folder / files["reference"])
        paths = {role: f"{place}/{file}" for role, file in files.items()}
        # The picture shows its text: what supervised learning should paint is the source itself.
        cases.append(
            {"case_id": f"{place}-{number}", "text": cut.text, **paths, "target": paths["source"]}
        )
    if cases:
        picture.save(folder / "source.png")
    return {
        "cases": cases,
        "skipped": _why_none(len(places), bool(cases)),
        "left_out": dict(left_out),
    }


def _why_none(texts: int, cases: bool) -> str | None:
    """Return why a picture gave no case; None when it gave one."""
    if cases:
        return None
    return {0: "no text", 1: "one text only, and that made no case"}.get(
        texts, "no text that makes a case"
    )


def _line(case: dict[str, Any]) -> str:
    return json.dumps(case, ensure_ascii=False) + "\n"
