"""The cases of a run: where they lie, which of them a round takes, and their digests."""

import logging
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from calligrapher.data.case import Case
from calligrapher.data.dataset import load_cases
from calligrapher.errors import ParamsError
from calligrapher.rl.train_loop import seeded
from calligrapher.tiny.pack import TINY
from tasks.artifacts.digests import cases_digest, path_digest
from tasks.params.run_params import RunParams

logger = logging.getLogger(__name__)

TINY_CASES = {"train": 512, "evaluation": 64}


@dataclass
class Cases:
    """What a run learns from and what it is evaluated on; read when first asked for.

    data_dir: shared between runs; tiny cases are drawn there, pictures out of tables are put there.
    """

    params: RunParams
    data_dir: Path

    @cached_property
    def train_folder(self) -> Path:
        return self._folder(self.params.data.train, "train")

    @cached_property
    def train(self) -> list[Case]:
        """All cases to learn from. Raises ParamsError when a round has not enough of them."""
        cases = self._load(self.train_folder)
        if len(cases) < self.params.cases_per_round:
            raise ParamsError(
                "rollout.num_cases * rollout.num_batches_per_epoch must be at most the number of"
                f" cases. Got {self.params.cases_per_round} for {len(cases)} cases in"
                f" {self.train_folder}."
            )
        return cases

    @cached_property
    def train_digest(self) -> str:
        """What a run learns from, as one hash."""
        return self._digest(self.train_folder, lambda: self.train)

    @cached_property
    def evaluation_folder(self) -> Path:
        return self._folder(self.params.data.evaluation, "evaluation")

    @cached_property
    def evaluation(self) -> list[Case]:
        """The first `evaluate.num_cases` held-out cases; ParamsError when there are fewer."""
        cases = self._load(self.evaluation_folder)
        expected = self.params.evaluate.num_cases
        if len(cases) < expected:
            raise ParamsError(
                "evaluate.num_cases must be at most the number of held-out cases. Got"
                f" {expected} for {len(cases)} cases in {self.evaluation_folder}."
            )
        return cases[:expected]

    @cached_property
    def evaluation_digest(self) -> str:
        """What a run is evaluated on, as one hash."""
        return self._digest(self.evaluation_folder, lambda: self.evaluation)

    def of_round(self, round_index: int) -> list[Case]:
        """Return the cases of a round.

        Each pass over the data is shuffled anew, and no case is twice in a round.
        """
        count = self.params.cases_per_round
        per_pass = len(self.train) // count
        order = torch.randperm(
            len(self.train), generator=seeded(self.params.seed, "cases", round_index // per_pass)
        ).tolist()
        start = round_index % per_pass * count
        return [self.train[i] for i in order[start : start + count]]

    def _digest(self, folder: Path, cases) -> str:
        """Return the hash of a bench folder's files, else that of the cases themselves."""
        if self.params.data.kind in ("self", "cross"):
            return path_digest(folder)
        return cases_digest(cases())

    def _load(self, where: Path) -> list[Case]:
        return load_cases(where, self.params.data.kind, self.data_dir / "pictures")

    def _folder(self, where: str, split: str) -> Path:
        if where != TINY:
            return Path(where)
        from calligrapher.tiny.world import write_bench

        count = TINY_CASES[split]
        folder = self.data_dir / f"tiny-{split}-{count}"
        if not (folder / "self_bench.txt").exists():
            logger.info("drawing %d tiny %s cases into %s", count, split, folder)
            write_bench(folder, num_cases=count, split=split, seed=0)
        return folder
