"""The cases of a run: where they lie, which of them a round takes, and their digests."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch

from calligrapher.data.case import Case
from calligrapher.data.dataset import load_cases
from calligrapher.errors import ParamsError
from calligrapher.rl.seeds import seeded
from calligrapher.tiny.pack import TINY
from tasks.artifacts.contents import note
from tasks.artifacts.digests import bench_contents, cases_digest, contents_digest
from tasks.params.run_params import RunParams

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
        """All cases to learn from.

        Raises ParamsError when a round has not enough of them, or where letters are weighed of
        which none is in their texts.
        """
        cases = self._load(self.train_folder)
        weighed = set(self.params.rollout.letter_weights)
        if weighed and weighed.isdisjoint(letter for case in cases for letter in case.text):
            raise ParamsError(
                "rollout.letter_weights must have a letter of the texts, in the same case. Got"
                f" {' '.join(sorted(weighed))}, of which no text in {self.train_folder} has any."
                " Set it to {} to draw all cases in turn."
            )
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
        if self.params.data.evaluation is None:
            raise ParamsError(
                "data.evaluation must name held-out cases to be evaluated on. Got null."
            )
        return self._folder(self.params.data.evaluation, "evaluation")

    @cached_property
    def evaluation(self) -> list[Case]:
        """The first `evaluate.num_cases` held-out cases; ParamsError when there are fewer."""
        cases = self._load(self.evaluation_folder)
        expected = self.params.evaluate.num_cases
        if len(cases) < expected:
            raise ParamsError(
                "num_cases of an evaluation must be at most the number of held-out cases. Got"
                f" {expected} for {len(cases)} cases in {self.evaluation_folder}. Lower it"
                " (evaluate.num_cases of a run, num_cases in params/evaluate.yaml), or give more"
                " cases."
            )
        return cases[:expected]

    @cached_property
    def evaluation_digest(self) -> str:
        """What a run is evaluated on, as one hash."""
        return self._digest(self.evaluation_folder, lambda: self.evaluation)

    def of_round(self, round_index: int) -> list[Case]:
        """Return the cases of a round.

        Each pass over the data is shuffled anew, and no case is twice in a round. With
        `rollout.letter_weights` there are no passes: each round draws from all cases by weight.
        """
        count = self.params.cases_per_round
        if self.params.rollout.letter_weights:
            return self._drawn(self.train, count, "cases", round_index)
        per_pass = len(self.train) // count
        order = torch.randperm(
            len(self.train), generator=seeded(self.params.seed, "cases", round_index // per_pass)
        ).tolist()
        start = round_index % per_pass * count
        return [self.train[i] for i in order[start : start + count]]

    def further(self, round_index: int) -> list[Case]:
        """Return the cases that a round does not take, in the order in which it may be refilled."""
        taken = {case.case_id for case in self.of_round(round_index)}
        others = [case for case in self.train if case.case_id not in taken]
        if self.params.rollout.letter_weights:
            return self._drawn(others, len(others), "refill", round_index)
        generator = seeded(self.params.seed, "refill", round_index)
        return [others[i] for i in torch.randperm(len(others), generator=generator).tolist()]

    def _drawn(self, cases: list[Case], count: int, name: str, round_index: int) -> list[Case]:
        """Return `count` different ones of the cases, each drawn by the weight of its text."""
        of_letter = self.params.rollout.letter_weights
        weights = torch.tensor(
            [math.prod(of_letter.get(letter, 1.0) for letter in case.text) for case in cases],
            dtype=torch.float64,
        )
        generator = seeded(self.params.seed, name, round_index)
        # Keys whose order is a draw without replacement: Efraimidis and Spirakis, 2006.
        keys = torch.rand(len(cases), generator=generator, dtype=torch.float64).log() / weights
        return [cases[i] for i in keys.argsort(descending=True, stable=True)[:count].tolist()]

    def _digest(self, folder: Path, cases: Callable[[], list[Case]]) -> str:
        """Return the digest of a bench folder's files, else of the cases; note what it is of."""
        if self.params.data.kind in ("self", "cross"):
            contents = bench_contents(folder)
            digest = contents_digest(contents)
        else:
            contents = {case.case_id: case.digest for case in cases()}
            digest = cases_digest(contents)
        note(self.data_dir, digest, contents)
        return digest

    def _load(self, where: Path) -> list[Case]:
        data = self.params.data
        return load_cases(where, data.kind, self.data_dir / "pictures", data.columns)

    def _folder(self, where: str, split: str) -> Path:
        if where != TINY:
            return Path(where)
        from calligrapher.tiny.world import shared_bench

        count = TINY_CASES[split]
        folder = self.data_dir / f"tiny-{split}-{count}"
        return shared_bench(folder, num_cases=count, split=split, seed=0)
