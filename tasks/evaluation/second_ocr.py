"""A second text recogniser that no reward uses: what only the rewarded engine can read is
suspect."""

import functools
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

from PIL import Image

from calligrapher.data.images import png_bytes

_HEIGHT = 64  # pixels of a line of text that Tesseract reads well
_MARGIN = 16  # it misses letters that touch the border
_TIMEOUT_S = 30.0
_THREADS = 2


@functools.cache
def version() -> str | None:
    """As in `tesseract 5.3.0`; None where it is not installed (`apt-get install tesseract-ocr`)."""
    if shutil.which("tesseract") is None:
        return None
    said = subprocess.run(["tesseract", "--version"], capture_output=True, text=True, check=True)
    return (said.stdout or said.stderr).splitlines()[0].strip()


def read_lines(crops: list[Image.Image]) -> list[str]:
    """What Tesseract reads in each picture of one line of text; "" where it finds none."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(_read, crops))


def _read(crop: Image.Image) -> str:
    scale = max(1, round(_HEIGHT / crop.height))
    line = crop.resize((crop.width * scale, crop.height * scale), Image.Resampling.BICUBIC)
    framed = Image.new(
        "RGB", (line.width + 2 * _MARGIN, line.height + 2 * _MARGIN), line.getpixel((0, 0))
    )
    framed.paste(line, (_MARGIN, _MARGIN))
    command = ["tesseract", "stdin", "stdout", "--psm", "7", "-l", "eng"]
    said = subprocess.run(
        command,
        input=png_bytes(framed),
        capture_output=True,
        check=True,
        timeout=_TIMEOUT_S,
        env={"OMP_THREAD_LIMIT": "1", "PATH": "/usr/local/bin:/usr/bin:/bin"},
    )
    return said.stdout.decode().strip()
