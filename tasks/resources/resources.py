"""What every stage of a run works with: the model, the cases, the conditioning cache and the reward
servers.

Built once per process and kept between stages; a stage's results depend only on its inputs and
params, never on what an earlier stage left here.
"""

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import torch
from safetensors.torch import load_file

from calligrapher.data.canvas import Canvas
from calligrapher.data.case import Case
from calligrapher.data.dataset import load_cases
from calligrapher.errors import ArtifactError, CheckpointError, ParamsError
from calligrapher.model.conditioning import ConditioningCache
from calligrapher.model.loading import Model, load_model
from calligrapher.model.policy import INITIAL, Weights
from calligrapher.rl.train_loop import TRAINED, seeded
from calligrapher.tiny.pack import DATA
from tasks.artifacts.contents import note
from tasks.artifacts.digests import bench_contents, cases_digest, contents_digest
from tasks.artifacts.run_dir import Artifact, path_digest
from tasks.params.run_params import RunParams, check_multiple
from tasks.progress import Progress
from tasks.resources.rewards import Scorer
from tasks.weights.checkpoints import TINY, base_folder
from tasks.weights.convert import adapter_file

TINY_CASES = {"train": 512, "evaluation": 64}


@dataclass
class Bench:
    """The work bench of one run.

    `data_dir` holds what is shared between runs: tiny cases, pictures out of tables, encodings.
    """

    params: RunParams
    data_dir: Path
    scorer: Scorer
    progress: Callable[..., Progress] = Progress
    _weights: dict[Path, Weights] = field(default_factory=dict, repr=False)

    @cached_property
    def model_paths(self) -> tuple[Path, Path, Path | None]:
        """Base, SigLIP and adapter; the word `tiny` stands for the embedded model's."""
        m = self.params.model
        if m.siglip is None and m.base != TINY:
            raise ParamsError(
                f"model.siglip must name SigLIP's folder when model.base is {m.base!r}. Got null."
            )
        base = base_folder(m.base)
        siglip = DATA / "siglip" if m.siglip in (None, TINY) else Path(m.siglip)
        return base, siglip, self._initial_adapter()

    def _initial_adapter(self) -> Path | None:
        given = self.params.model.initial_adapter
        try:
            return adapter_file(given, self.data_dir.parent) if given else None
        except ArtifactError as error:
            raise CheckpointError(
                f"model.initial_adapter must name weights. Got {given}: {error}"
            ) from error

    @cached_property
    def model_digest(self) -> str:
        """Digest of the frozen weights and of the adapter that the run starts from."""
        return "+".join(path_digest(p) if p else "new" for p in self.model_paths)

    @cached_property
    def model(self) -> Model:
        """The model, loaded when first asked for."""
        m = self.params.model
        base, siglip, adapter = self.model_paths
        model = load_model(
            base,
            siglip,
            adapter,
            digest=self.model_digest,
            seed=self.params.seed,
            lora=m.lora.model_dump() if m.lora else None,
            **{
                name: getattr(m, name)
                for name in (
                    "guidance_scale",
                    "max_sequence_length",
                    "mixed_precision",
                    "gradient_checkpointing",
                    "offload_text_encoder_two",
                    "train_adapter",
                    "device",
                )
            },
        )
        for side in ("width", "height"):
            check_multiple(f"model.{side}", getattr(m, side), model.multiple)
        return model

    @cached_property
    def conditioning(self) -> ConditioningCache:
        m = self.params.model
        canvas = Canvas(m.width, m.height, m.reference_context)
        return ConditioningCache(
            self.model.encoders, canvas, self.model.device, self.data_dir / "conditioning"
        )

    @cached_property
    def train_folder(self) -> Path:
        return self._data(self.params.data.train, "train")

    @cached_property
    def train_cases(self) -> list[Case]:
        cases = self._cases(self.train_folder)
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
        return self._data_digest(self.train_folder, lambda: self.train_cases)

    @cached_property
    def evaluation_folder(self) -> Path:
        if self.params.data.evaluation is None:
            raise ParamsError(
                "data.evaluation must name held-out cases to be evaluated on. Got null."
            )
        return self._data(self.params.data.evaluation, "evaluation")

    @cached_property
    def evaluation_cases(self) -> list[Case]:
        cases = self._cases(self.evaluation_folder)
        wanted = self.params.evaluate.num_cases
        if len(cases) < wanted:
            raise ParamsError(
                f"num_cases of an evaluation must be at most the number of held-out cases. Got"
                f" {wanted} for {len(cases)} cases in {self.evaluation_folder}. Lower it"
                " (evaluate.num_cases of a run, num_cases in params/evaluate.yaml), or give more"
                " cases."
            )
        return cases[:wanted]

    @cached_property
    def evaluation_digest(self) -> str:
        """What a run is evaluated on, as one hash."""
        return self._data_digest(self.evaluation_folder, lambda: self.evaluation_cases)

    def _data_digest(self, folder: Path, cases: Callable[[], list[Case]]) -> str:
        """Return the digest of a bench folder's files, else of the cases; note what it is of."""
        if self.params.data.kind in ("self", "cross"):
            contents = bench_contents(folder)
            digest = contents_digest(contents)
        else:
            contents = {case.case_id: case.digest for case in cases()}
            digest = cases_digest(contents)
        note(self.data_dir, digest, contents)
        return digest

    def cases_of(self, round: int) -> list[Case]:
        """The cases of a round: each pass over the data is shuffled anew, and no case is twice in a
        round."""
        count = self.params.cases_per_round
        per_pass = len(self.train_cases) // count
        order = torch.randperm(
            len(self.train_cases), generator=seeded(self.params.seed, "cases", round // per_pass)
        ).tolist()
        start = round % per_pass * count
        return [self.train_cases[i] for i in order[start : start + count]]

    def fresh_model(self) -> Model:
        """The model with the weights that the run starts from: loaded anew if a stage has changed
        them."""
        if self.model.policy.loaded != INITIAL:
            for part in ("model", "conditioning"):
                self.__dict__.pop(part, None)
        return self.model

    def weights(self, path: Path) -> Weights:
        """Weights of a file, as the policy holds them; the last two are kept, for `old` and
        `reference`."""
        if path not in self._weights:
            while len(self._weights) > 1:
                self._weights.pop(next(iter(self._weights)))
            self._weights[path] = self.model.policy.held(load_file(path))
        return self._weights[path]

    def let_go_of_weights(self, but: Collection[Path]) -> None:
        """Free what `weights` keeps, but for the files in `but`."""
        self._weights = {path: weights for path, weights in self._weights.items() if path in but}

    def load_trained(self, checkpoint: Artifact) -> None:
        """Make the policy's trained weights those of `checkpoint`, unless they are already."""
        policy = self.model.policy
        if policy.loaded != checkpoint.digest:
            policy.load(load_file(checkpoint.file(TRAINED)))
            policy.loaded = checkpoint.digest

    def model_is(self, checkpoint: Artifact) -> None:
        """Note that the trained weights in memory are those of `checkpoint`, if it was just
        made."""
        if "model" in self.__dict__ and self.model.policy.loaded is None:
            self.model.policy.loaded = checkpoint.digest

    def _cases(self, where: Path) -> list[Case]:
        return load_cases(where, self.params.data.kind, self.data_dir / "pictures")

    def _data(self, where: str, split: str) -> Path:
        if where != TINY:
            return Path(where)
        from calligrapher.tiny.world import shared_bench

        count = TINY_CASES[split]
        folder = self.data_dir / f"tiny-{split}-{count}"
        return shared_bench(folder, num_cases=count, split=split, seed=0)
