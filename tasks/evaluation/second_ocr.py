"""A second text recogniser that no reward uses: what only the rewarded engine can read is
suspect."""

import functools
import logging
import os
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from calligrapher.data.images import png_bytes

_log = logging.getLogger(__name__)

_HEIGHT = 64  # pixels of a line of text that Tesseract reads well
_MARGIN = 16  # it misses letters that touch the border
_TIMEOUT_S = 30.0
_THREADS = 2


@functools.cache
def version() -> str | None:
    """As in `tesseract 5.3.0`; None where it is not installed (`apt-get install tesseract-ocr`)."""
    program = shutil.which("tesseract")
    if program is None:
        return None
    try:
        said = subprocess.run(
            [program, "--version"], capture_output=True, text=True, check=True, timeout=_TIMEOUT_S
        )
    except (OSError, subprocess.SubprocessError) as error:
        _log.warning("no second reading: Tesseract does not start: %s", _reason(error))
        return None
    return (said.stdout or said.stderr).splitlines()[0].strip()


def read_lines(crops: list[Image.Image]) -> list[str | None]:
    """Return what Tesseract reads in each picture of one line of text; "" where it finds none.

    None where it fails: the failures are counted in one warning.
    """
    with ThreadPoolExecutor(_THREADS) as pool:
        answers = list(pool.map(_attempt, crops))
    failures = [answer for answer in answers if isinstance(answer, Exception)]
    if failures:
        _log.warning(
            "no second reading of %d of %d pictures: %s",
            len(failures), len(crops), _reason(failures[0]),
        )  # fmt: skip
    return [None if isinstance(answer, Exception) else answer for answer in answers]


def _attempt(crop: Image.Image) -> str | Exception:
    try:
        return _read(crop)
    except (OSError, subprocess.SubprocessError, UnicodeDecodeError) as error:
        return error


def _reason(error: Exception) -> str:
    said = getattr(error, "stderr", None) or b""
    text = said.decode(errors="replace") if isinstance(said, bytes) else said
    return " ".join(f"{error} {text}".split())


def _read(crop: Image.Image) -> str:
    scale = max(1, round(_HEIGHT / crop.height))
    line = crop.resize((crop.width * scale, crop.height * scale), Image.Resampling.BICUBIC)
    framed = Image.new(
        "RGB", (line.width + 2 * _MARGIN, line.height + 2 * _MARGIN), line.getpixel((0, 0))
    )
    framed.paste(line, (_MARGIN, _MARGIN))
    program = shutil.which("tesseract") or "tesseract"
    command = [program, "stdin", "stdout", "--psm", "7", "-l", "eng"]
    said = subprocess.run(
        command,
        input=png_bytes(framed),
        capture_output=True,
        check=True,
        timeout=_TIMEOUT_S,
        env=os.environ | {"OMP_THREAD_LIMIT": "1"},
    )
    return said.stdout.decode().strip()
