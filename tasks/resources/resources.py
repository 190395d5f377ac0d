"""What the stages of a run work with: the model, the cases, the encodings and the reward servers.

Loaded once per process, when first asked for, and kept between stages; a stage's results depend
only on its inputs and params, never on what an earlier stage left here.
"""

from collections.abc import Callable, Collection
from pathlib import Path

from safetensors.torch import load_file

from calligrapher.data.canvas import Canvas
from calligrapher.model.conditioning import ConditioningCache
from calligrapher.model.loading import Model, load_model
from calligrapher.model.policy import INITIAL, Weights
from calligrapher.model.sharding import Strategy, check_strategy
from calligrapher.ranks import ALONE, Ranks
from calligrapher.rl.train_state import TRAINED
from tasks.artifacts.artifact import Artifact
from tasks.params.run_params import RunParams, check_multiple
from tasks.pipeline import Sources
from tasks.progress import Progress
from tasks.resources.cases import Cases
from tasks.resources.rewards import RewardScorer
from tasks.weights.model_files import ModelFiles


def open_model(
    params: RunParams, files: ModelFiles, *, strategy: Strategy = "ddp", ranks: Ranks = ALONE
) -> Model:
    """Load the model in `files` as `params` want it. Raises ParamsError, CheckpointError.

    ranks: the processes that share out its weights where the strategy is fsdp2.
    """
    m = params.model
    check_strategy(
        strategy,
        use_8bit_adam=params.warmup.use_8bit_adam or params.update.use_8bit_adam,
        compiled=m.compile,
    )
    model = load_model(
        files.base,
        files.siglip,
        files.adapter,
        digest=files.digest,
        seed=params.seed,
        lora=m.lora.model_dump() if m.lora else None,
        guidance_scale=m.guidance_scale,
        max_sequence_length=m.max_sequence_length,
        mixed_precision=m.mixed_precision,
        gradient_checkpointing=m.gradient_checkpointing,
        offload_text_encoder_two=m.offload_text_encoder_two,
        train_adapter=m.train_adapter,
        device=m.device,
        attention_backend=m.attention_backend,
        compiled=m.compile,
        strategy=strategy,
        ranks=ranks,
    )
    files.load_lora(model.policy)
    for side, pixels in (("width", m.width), ("height", m.height)):
        check_multiple(f"model.{side}", pixels, model.multiple)
    return model


class Resources:
    """What stages work with.

    progress: makes the progress line of a stage. ranks: the processes that share a stage's work.
    strategy: whether each of them holds the whole model (ddp) or a share of it (fsdp2).
    """

    def __init__(
        self,
        params: RunParams,
        files: ModelFiles,
        cases: Cases,
        scorer: RewardScorer,
        *,
        progress: Callable[..., Progress] = Progress,
        ranks: Ranks = ALONE,
        strategy: Strategy = "ddp",
    ) -> None:
        self.params, self.files, self.cases, self.scorer = params, files, cases, scorer
        self.progress, self.ranks, self.strategy = progress, ranks, strategy
        self._model: Model | None = None
        self._conditioning: ConditioningCache | None = None
        self._weights: dict[Path, Weights] = {}

    @property
    def sources(self) -> Sources:
        """What the fingerprints of stages cover outside of the run; each is reckoned when asked."""
        return {
            "model": lambda: self.files.digest,
            "train_data": lambda: self.cases.train_digest,
            "evaluation_data": lambda: self.cases.evaluation_digest,
            "scored_by": self.scorer.identity,
        }

    @property
    def model(self) -> Model:
        """The model, loaded when first asked for."""
        if self._model is None:
            self._model = open_model(
                self.params, self.files, strategy=self.strategy, ranks=self.ranks
            )
        return self._model

    @property
    def conditioning(self) -> ConditioningCache:
        """What the frozen encoders say of cases, kept on disk."""
        if self._conditioning is None:
            m = self.params.model
            self._conditioning = ConditioningCache(
                self.model.encoders,
                Canvas(m.width, m.height, m.reference_context),
                self.model.device,
                self.cases.data_dir / "conditioning",
            )
        return self._conditioning

    def initial_model(self) -> Model:
        """Return the model with the weights that the run starts from.

        It is loaded anew if a stage has changed them.
        """
        if self.model.policy.loaded != INITIAL:
            self._model = self._conditioning = None
        return self.model

    def weights(self, path: Path) -> Weights:
        """Return the weights in a file as the policy holds them.

        The last two are kept, for `old` and `reference`.
        """
        if path not in self._weights:
            while len(self._weights) > 1:
                self._weights.pop(next(iter(self._weights)))
            self._weights[path] = self.model.policy.to_storage(load_file(path))
        return self._weights[path]

    def evict_weights(self, *, but: Collection[Path]) -> None:
        """Free what `weights` keeps, except for the files in `but`."""
        self._weights = {path: kept for path, kept in self._weights.items() if path in but}

    def load_trained(self, checkpoint: Artifact) -> None:
        """Make the policy's trained weights those of `checkpoint`, unless they are already."""
        policy = self.model.policy
        if policy.loaded != checkpoint.digest:
            policy.load(load_file(checkpoint.file(TRAINED)))
            policy.loaded = checkpoint.digest

    def mark_loaded(self, artifact: Artifact) -> None:
        """Note that the trained weights in memory are those of `artifact`, just made here.

        Nothing is noted of artifacts without trained weights.
        """
        policy = self._model.policy if self._model else None
        if policy and policy.loaded is None and TRAINED in artifact.files:
            policy.loaded = artifact.digest
