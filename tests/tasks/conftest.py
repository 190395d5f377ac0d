"""Whole runs in seconds: random tiny model, drawn cases, a scorer that asks nobody, no Prefect, no
MLflow."""

import subprocess
from dataclasses import asdict
from pathlib import Path

import pytest
from small_runs import ALGORITHMS, SETTINGS, ConstantScorer, HashScorer


@pytest.fixture(scope="session")
def cases(tmp_path_factory) -> Path:
    """Bench folders `train` (7 cases) and `evaluation` (2 cases)."""
    from calligrapher.tiny.world import write_bench

    folder = tmp_path_factory.mktemp("cases")
    write_bench(folder / "train", num_cases=7, split="train", seed=1)
    write_bench(folder / "evaluation", num_cases=2, split="evaluation", seed=1)
    return folder


@pytest.fixture(scope="session")
def encodings(tmp_path_factory) -> Path:
    """The data folder that all runs share, as those of one `runs_dir` do."""
    folder = tmp_path_factory.mktemp("shared") / "data"
    folder.mkdir()
    return folder


@pytest.fixture(scope="session")
def run_values(random_model, cases):
    """Values of a params file: `values("nft", update={"batch_size": 3})` changes keys of
    sections."""

    def values(algorithm="nft", **changes):
        given = {name: dict(v) if isinstance(v, dict) else v for name, v in SETTINGS.items()}
        given[algorithm] = dict(ALGORITHMS[algorithm])
        given["model"] |= {
            "base": str(random_model / "flux-fill"),
            "siglip": str(random_model / "siglip"),
            "initial_adapter": str(random_model / "calligrapher.bin"),
        }
        given["data"] |= {"train": str(cases / "train"), "evaluation": str(cases / "evaluation")}
        for name, value in changes.items():
            given[name] = {**given.get(name, {}), **value} if isinstance(value, dict) else value
        return given

    return values


@pytest.fixture
def values(run_values):
    """`run_values`, under the name that most tests use."""
    return run_values


@pytest.fixture
def make_resources(values, encodings):
    """`make_resources("grpo", scorer, rounds=1)` -> Resources; more arguments as in `values`."""
    from tasks.artifacts.layout import RunsDir
    from tasks.params.run_params import RunParams
    from tasks.runs.run import resources_of

    def make(algorithm="nft", scorer=None, **changes):
        params = RunParams.model_validate(values(algorithm, **changes))
        return resources_of(params, RunsDir(encodings.parent), scorer or HashScorer())

    return make


@pytest.fixture
def train(make_resources, tmp_path):
    """Run, or go on with, the run `name`; returns (folder, summary)."""
    from tasks.runs.run import open_run

    def train(name, algorithm="nft", scorer=None, **changes):
        with open_run(make_resources(algorithm, scorer, **changes), tmp_path / name) as run:
            run.make_planned()
            return run.folder.path, asdict(run.summarise(run.newest_update()))

    return train


@pytest.fixture
def hash_scorer():
    return HashScorer()


@pytest.fixture
def constant_scorer():
    return ConstantScorer()


@pytest.fixture
def scorer_class():
    return HashScorer


@pytest.fixture
def judged(scorer_class):
    """A scorer whose evaluations (of two pictures) come out as these accuracies, one after the
    other."""

    def judged(*accuracies):
        class Judged(scorer_class):
            def __init__(self):
                super().__init__()
                self.left = [0.0, *accuracies]  # the first is that before the first round

            def score(self, images, cases, letters=False):
                rows = super().score(images, cases)
                if len(images) == 2:
                    value = self.left.pop(0)
                    rows = [row | {"ocr_accuracy": value} for row in rows]
                return rows

        return Judged()

    return judged


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 1 MiB of its own; `mount -o remount,size=...` changes its size."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True
    ).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)
