"""Photographs MLflow's and Prefect's pages of finished runs, and checks that they show what they
should.

    python tests/scripts/screenshots.py --runs runs --out docs/images python
    tests/scripts/screenshots.py --prefect http://127.0.0.1:4200 --run tiny-nft --out docs/images

Needs Chromium and the package `playwright`. The first form serves a copy of RUNS/mlflow.db, so the
runs stay as they are, and writes mlflow-*.png of the runs that --compare names. The second visits
the server of `make services` and writes prefect-*.png of the run. Exit status 1, with the page and
what it lacks, when a curve, a step of the slider, a picture, a field of the form or a part of the
report is not there.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import mlflow_pages
import prefect_pages
from browser import CHROMIUM, opened
from playwright.sync_api import Error


def shoot_mlflow(runs_dir: Path, names: Sequence[str], out: Path, chromium: str) -> None:
    """The runs `names` of `runs_dir`, compared; AssertionError when a page shows something else."""
    runs = [mlflow_pages.Tracked.of(runs_dir / name) for name in names]
    with mlflow_pages.served(runs_dir) as url, opened(chromium) as page:
        mlflow_pages.shoot_curves(page, url, runs, out)
        mlflow_pages.shoot_comparison(page, url, runs, out)
        mlflow_pages.shoot_grid(page, url, runs, out)


def shoot_prefect(url: str, run: str, out: Path, chromium: str) -> None:
    """The deployments and the run `run` of the server at `url`; AssertionError as above."""
    with opened(chromium) as page:
        prefect_pages.shoot_deployments(page, url, out)
        prefect_pages.shoot_form(page, url, out)
        prefect_pages.shoot_run(page, url, run, out)
        prefect_pages.shoot_report(page, url, run, out)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--compare", nargs="+", default=["nft-0", "grpo-0"], metavar="NAME")
    parser.add_argument(
        "--prefect", metavar="URL", help="photograph Prefect's pages there, not MLflow's"
    )
    parser.add_argument("--run", default="tiny-nft", help="with --prefect: the flow run's name")
    parser.add_argument("--out", type=Path, default=Path("docs/images"))
    parser.add_argument("--chromium", default=CHROMIUM)
    chosen = parser.parse_args()
    if not chosen.chromium:
        parser.error("a Chromium must be on the PATH or named by --chromium. There is none.")
    chosen.out.mkdir(parents=True, exist_ok=True)
    try:
        if chosen.prefect:
            shoot_prefect(chosen.prefect.rstrip("/"), chosen.run, chosen.out, chosen.chromium)
        else:
            shoot_mlflow(chosen.runs.absolute(), chosen.compare, chosen.out, chosen.chromium)
    except (AssertionError, Error) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
