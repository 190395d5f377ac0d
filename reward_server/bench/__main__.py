"""What the service does per second, for long, and when servers die.

Run it with `python -m reward_server.bench WHAT`.

    throughput   images/s beside a bare loop and one blocking request at a time; latencies
    sizes        images/s beside a bare loop, for pictures of 96x32 to 1024x1024
    tight        images/s of the OCR alone where a line fills its mask: read as a line, and found
    soak         memory, threads and descriptors of the server over many requests
    faults       one of three servers is killed while it scores
    heldout      OCR components of right, slightly wrong, mirrored and empty pictures
    cases DIR    labelled pictures: how many right ones score low, how many wrong ones score 1
    draw DIR     draws such pictures into a new folder: --count of each kind, by --seed

Each prints one JSON object.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from reward_server.bench.cases import cases
from reward_server.bench.draw import draw
from reward_server.bench.endurance import faults, soak
from reward_server.bench.heldout import heldout
from reward_server.bench.throughput import sizes, throughput, tight

_RUNS = {
    "throughput": (throughput, 512),
    "sizes": (sizes, 128),
    "tight": (tight, 128),
    "soak": (soak, 20_000),
    "faults": (faults, 300),
    "heldout": (heldout, 200),
}
_FOLDERS = ("cases", "draw")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one benchmark and print its JSON."""
    parser = argparse.ArgumentParser(
        prog="python -m reward_server.bench",
        description=__doc__,
        formatter_class=argparse.RawTextHelpFormatter,
    )
    parser.add_argument("what", choices=[*_RUNS, *_FOLDERS])
    parser.add_argument(
        "folder", nargs="?", type=Path, help="labelled pictures, for cases and draw"
    )
    parser.add_argument(
        "--mode", choices=("auto", "scene", "line"), default="auto", help="of cases: how to read"
    )
    parser.add_argument(
        "--threads", type=int, default=2, help="OCR threads of the server, and of the bare loop"
    )
    parser.add_argument(
        "--count", type=int, help="pictures, or requests (soak); see the table in the file"
    )
    parser.add_argument("--seed", type=int, default=0, help="of draw: others are other pictures")
    options = parser.parse_args(argv)
    if (options.what in _FOLDERS) != (options.folder is not None):
        parser.error("a folder must be given for cases and draw, and only for them.")
    if options.what in _FOLDERS:
        try:
            if options.what == "draw":
                found = draw(options.folder, options.seed, options.count or 4)
            else:
                found = cases(options.folder, options.threads, options.mode)
        except (ValueError, FileExistsError) as error:
            parser.error(str(error))
        sys.stdout.write(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        return 0
    run, count = _RUNS[options.what]
    sys.stdout.write(json.dumps(run(options.count or count, options.threads), indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
