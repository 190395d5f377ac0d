"""The sections of a params file: every parameter, its default, its bounds and what it does.

The algorithms' own sections (`nft`, `grpo`, `advantage`) are declared beside their formulas in
`calligrapher`.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from calligrapher.data.dataset import DatasetKind
from calligrapher.data.lists import Column
from calligrapher.params import Count, Positive, Section, Weight
from calligrapher.sampling.step import Solver
from reward_server.components import (
    FACTORS,
    LESSENED,
    NAMES,
    STYLE,
    WEIGHABLE,
    WEIGHT_OF,
    is_weighable,
)
from reward_server.scorer_files import ScorerFile, check_own_name

Letter = Annotated[str, Field(min_length=1, max_length=1)]
Scheduler = Literal["constant", "constant_with_warmup", "linear", "cosine", "warmup_stable_decay"]
# Seeds are stored and given to generators as signed 64-bit numbers; no count needs more.


class LoraParams(Section):
    """Low-rank weights beside linear layers of the transformer and of the adapter (peft)."""

    rank: Positive = Field(16, description="Rank of each pair of matrices.")
    alpha: Annotated[float, Field(gt=0)] = Field(
        16.0, description="The pair's product is scaled by alpha / rank."
    )
    targets: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0"],
        description=(
            "Names of the linear layers of the transformer that get a pair, as peft matches them."
        ),
    )
    adapter_targets: list[str] = Field(
        [],
        description=(
            "The same of the adapter: to_k_ip, to_v_ip, proj.0, proj.2, id_proj.0, id_proj.2. A "
            "layer with a pair is itself left as it is, also where train_adapter trains the rest."
        ),
    )


class ModelParams(Section):
    """Which model, on what canvas, and how it is held in memory.

    One guidance value serves every stage.
    """

    base: str = Field(
        description="'tiny' (the embedded model) or the folder of a diffusers FLUX.1-Fill."
    )
    siglip: str | None = Field(
        None,
        description=(
            "Folder of the SigLIP that reads the style; null with base 'tiny', which has its own."
        ),
    )
    initial_adapter: str | None = Field(
        None,
        description=(
            "Adapter weights to start from (initial_ip_adapter_path): a file, or an artifact or run"
            " by folder, name or MLflow URI; null = new weights."
        ),
    )
    width: Positive = Field(
        512, description="Canvas width in pixels: a multiple of twice the VAE's factor."
    )
    height: Positive = Field(
        512, description="Canvas height in pixels, without the reference's strip on top."
    )
    guidance_scale: Weight = Field(
        3.5,
        description=(
            "Embedded guidance of warm-up, rollout, update and evaluation (Fill's own default is "
            "30)."
        ),
    )
    max_sequence_length: Annotated[int, Field(ge=1, le=512)] = Field(
        512, description="Longest prompt in T5 tokens; a longer one is an error, it is never cut."
    )
    mixed_precision: Literal["no", "fp16", "bf16"] = Field(
        "no", description="Number type of the model's forwards."
    )
    gradient_checkpointing: bool = Field(
        False, description="Recompute activations: less memory, ~30 % more time."
    )
    offload_text_encoder_two: bool = Field(
        False, description="T5 leaves the accelerator after encoding."
    )
    reference_context: bool = Field(
        False,
        description="Also show the reference to the transformer, stacked on top of the canvas.",
    )
    device: str = Field(
        "auto",
        description="'auto', 'cpu', 'cuda', 'cuda:1', ...; auto takes CUDA when there is one.",
    )
    attention_backend: str | None = Field(
        None,
        description=(
            "How attention is computed, by its name in diffusers (native, flash, _native_cudnn,"
            " ...); null = torch's choice. Changes the last bits."
        ),
    )
    compile: bool = Field(
        False,
        description=(
            "Compile the transformer's blocks (torch.compile), anew for each batch size and length;"
            " needs a C++ compiler, goes with ddp alone. Changes the last bits."
        ),
    )
    train_adapter: bool = Field(
        True, description="Train the adapter; false = only the LoRA weights."
    )
    lora: LoraParams | None = Field(
        None, description="LoRA on transformer and adapter; null = none."
    )


class DataParams(Section):
    """Where the cases are."""

    train: str = Field(
        description=(
            "Cases to train on: a bench folder (self, cross), a file (jsonl), a Parquet file or a "
            "folder of them (parquet), or a dataset of the `datasets` library (huggingface)."
        )
    )
    evaluation: str | None = Field(
        None, description="Held-out cases for `evaluate`, of the same kind."
    )
    kind: DatasetKind = Field("self", description="How the cases are listed (docs/data.md).")
    columns: dict[Column, Annotated[str, Field(min_length=1)]] = Field(
        {},
        description=(
            "Of a jsonl, parquet or huggingface dataset: field of a case (source, mask, reference, "
            "text, case_id, target, ocr_match) -> its name in the table. Columns that are neither "
            "named nor a field are left out then."
        ),
    )
    reconstruct: bool = Field(
        False,
        description=(
            "Warm-up learns to paint the source of a case that has no target. Right only where the "
            "source shows the text of the case already; false = such a case is refused."
        ),
    )


class OptimizerParams(Section):
    """What warm-up and update have in common."""

    batch_size: Positive = Field(
        1, description="Images per forward and backward (train_batch_size)."
    )
    gradient_accumulation_steps: Positive = Field(4, description="Batches per optimizer step.")
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        1e-4, description="Peak learning rate of AdamW."
    )
    lr_scheduler: Scheduler = Field(
        "constant",
        description=(
            "linear and cosine fall to 0 at the last step; warmup_stable_decay stays at the peak"
            " until the last quarter of the steps, and falls to 0 in it."
        ),
    )
    lr_warmup_steps: Count = Field(
        0, description="Steps of linear rise; needs a scheduler other than constant."
    )
    weight_decay: Weight = Field(0.01, description="AdamW's decoupled weight decay.")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Gradients are scaled down to this norm."
    )
    use_8bit_adam: bool = Field(
        False, description="bitsandbytes' 8-bit AdamW: a quarter of the optimizer's memory."
    )
    checkpointing_steps: Positive = Field(
        500, description="Steps between checkpoints inside the stage."
    )


class WarmupParams(OptimizerParams):
    """Supervised flow matching on reference-styled targets before RL."""

    steps: Count = Field(
        1000, description="Optimizer steps (rl_warmup_steps); 0 = start RL from the weights given."
    )
    style_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="Share of rows trained without style tokens."
    )


class RolloutParams(Section):
    """How many images a round samples, and how."""

    num_cases: Positive = Field(description="Cases (groups) per batch of a round.")
    num_batches_per_epoch: Positive = Field(1, description="Batches per round.")
    letter_weights: dict[Letter, Annotated[float, Field(gt=0)]] = Field(
        {},
        description=(
            "How many times as often a case is drawn, about, for each time that such a letter is in"
            " its text; for several, the product. Each round then draws anew from all cases, of"
            " which it should take few. For letters that are harder or rarer than others. {} = all"
            " cases are drawn in turn."
        ),
    )
    num_images_per_prompt: Positive = Field(
        1, description="Images per case: the group size; 4-8 is advised."
    )
    num_inference_steps: Annotated[int, Field(ge=2)] = Field(
        50,
        description="Sampling steps; evaluation's as well, unless it has a number of its own.",
    )
    solver: Solver = Field(
        "euler",
        description=(
            "How a rollout's deterministic steps are taken: Euler's, or DPM-Solver++ of second"
            " order, which needs fewer for the same image. For algorithms that do not explore;"
            " evaluations, generate and the page take Euler's steps, or evaluate.noise_level's."
        ),
    )
    refill: Count = Field(
        0,
        description=(
            "Times that a round may sample further cases in place of groups whose advantages are"
            " all 0, which are then left out of the update whatever the KL; 0 = none."
        ),
    )
    shared_trunk: bool = Field(
        False,
        description=(
            "Run what a group's images have in common, the steps up to the window and what its"
            " first one sees, once for all of a batch, in the rollout and in the update: fewer"
            " forwards for the same images, but for last bits. Needs grpo.noise: group."
        ),
    )
    staleness: Annotated[int, Field(ge=0, le=1)] = Field(
        0,
        description=(
            "Rounds by which the policy that samples is older than the newest one: with 1 a round's"
            " images do not wait for the update of the round before. GRPO needs importance_cap"
            " then, AWM clip_range."
        ),
    )
    batch_size: Positive = Field(1, description="Images sampled at once.")
    shard_size: Positive = Field(
        16,
        description=(
            "Images per Parquet shard: what a crash can cost, and what scoring can start with."
        ),
    )


class RewardParams(Section):
    """The reward: a weighted sum of what the reward servers measure."""

    server_urls: list[str] = Field(
        [], description="Reward servers; empty = the run starts and stops its own."
    )
    ocr_weight: Weight = Field(
        0.7, description="Weight of ocr_accuracy: closeness of the text read to the target."
    )
    likelihood_weight: Weight = Field(
        0.0,
        description=(
            "Weight of ocr_likelihood, the target's CTC likelihood: dense where accuracy is a "
            "staircase."
        ),
    )
    vlm_weight: Weight = Field(
        0.3, description="Weight of vlm_score; must be 0 where no VLM answers."
    )
    style_weight: Weight = Field(
        0.0, description="Weight of style_score: closeness to the reference's style."
    )
    weights: dict[str, Weight] = Field(
        {},
        description=(
            "Component -> weight, those of your own scorers too. What it does not name counts "
            "nothing; ocr_accuracy, ocr_likelihood, vlm_score and style_score may be given here or "
            "by their keys above, and mean the same."
        ),
    )
    factors: list[str] = Field(
        [],
        description=(
            "Components of 0..1 by which ocr_accuracy and ocr_likelihood are multiplied before "
            "they are weighed: of ocr_visibility, ocr_upright, ocr_unstruck, ocr_sharpness, "
            "ocr_inside, ocr_size. Text that nobody can see or accept then earns nothing."
        ),
    )
    style_factors: list[str] = Field(
        [],
        description=(
            "Components of 0..1 by which style_score is multiplied before it is weighed: of "
            "ocr_accuracy, ocr_likelihood and those that `factors` may name. With ocr_accuracy, "
            "lettering that does not say the text (bars of ink, the reference itself) earns "
            "nothing by its style."
        ),
    )
    ocr_mode: Literal["auto", "scene", "line"] | None = Field(
        None,
        description=(
            "How the run's own server reads: auto finds lines and keeps those in the mask, line "
            "takes the mask's box for one line; null = auto. Named servers have their own flag."
        ),
    )
    ocr_match: Literal["loose", "exact"] | None = Field(
        None,
        description=(
            "Whether case and spaces count (exact) or not (loose), where a case does not say; null "
            "= as the server is set up: loose for the run's own."
        ),
    )
    scorers: dict[str, str] = Field(
        {},
        description=(
            "Scorers of your own for the run's own server: component -> FILE:CLASS, or "
            "FILE:CLASS?KEY=VALUE&... (docs/extending.md)."
        ),
    )
    disable_reward_model: bool = Field(
        False,
        description="Debug: no servers, constant rewards. Marked in every artifact made from it.",
    )
    vlm: str | None = Field(
        None, description="VLM for the run's own server (a model folder); null = none."
    )
    server_host: str | None = Field(
        None,
        min_length=1,
        description=(
            "Host of reward servers that are there already, one for each rank; null = 127.0.0.1."
        ),
    )
    server_port: Annotated[int, Field(ge=1, le=65535)] | None = Field(
        None,
        description=(
            "Port of rank 0's reward server; rank i's is i higher. null = 8000. Without host, port,"
            " launch.gpu_ids and server_urls the run has a server of its own."
        ),
    )
    token_file: str | None = Field(
        None,
        description=(
            "File with the token that the reward servers ask for. The environment variable "
            "CALLIGRAPHER_REWARD_TOKEN, where it is set, is sent in its place."
        ),
    )
    timeout_s: Annotated[float, Field(gt=0)] = Field(
        60.0, description="Seconds to wait for one answer."
    )
    max_unscored_share: Annotated[float, Field(ge=0, le=1)] = Field(
        0.1,
        description="The round stops when more than this share of its images could not be scored.",
    )

    @model_validator(mode="before")
    @classmethod
    def _weights_have_one_place(cls, values: Any) -> Any:
        """Move the weights of components with a key of their own there.

        Equal rewards are then equal params, whichever way they are written.
        """
        weights = values.get("weights") if isinstance(values, Mapping) else None
        if not weights or not isinstance(weights, Mapping):
            return values
        keys = {c: WEIGHT_OF[c] for c in weights if c in WEIGHT_OF}
        for component, key in keys.items():
            if key in values:
                raise ValueError(
                    f"{key} must not be given beside weights.{component}: they are one weight."
                    f" Got {values[key]!r} and {weights[component]!r}. Leave one out."
                )
        moved = {key: weights[component] for component, key in keys.items()}
        left = {name: weight for name, weight in weights.items() if name not in keys}
        return dict.fromkeys(WEIGHT_OF.values(), 0.0) | dict(values) | moved | {"weights": left}

    @classmethod
    def make_way(cls, values: dict[str, Any], key: str) -> None:
        """An override wins over the other way of writing a weight; other weights stay."""
        weights, _, component = key.partition(".")
        if weights == "weights":
            stays = {} if not component else dict(WEIGHT_OF)
            stays.pop(component, None)
            for other, name in WEIGHT_OF.items():
                if other not in stays:
                    values.pop(name, None)
                elif not values.get("weights"):
                    values.setdefault(name, cls.model_fields[name].default)
        elif values.get("weights"):
            given = values["weights"]
            values["weights"] = {c: w for c, w in given.items() if WEIGHT_OF.get(c) != key}

    @field_validator("weights")
    @classmethod
    def _weighs_components(cls, weights: dict[str, float]) -> dict[str, float]:
        for name in weights:
            if not is_weighable(name):
                raise ValueError(
                    f"weights must name components that can be weighed ({', '.join(WEIGHABLE)}, or"
                    f" one of your own). Got {name!r}."
                )
            if name not in NAMES and name not in FACTORS:
                check_own_name(name)
        return weights

    @field_validator("factors")
    @classmethod
    def _names_factors(cls, factors: list[str]) -> list[str]:
        for name in factors:
            if name not in FACTORS or factors.count(name) > 1:
                raise ValueError(
                    f"factors must name some of {', '.join(FACTORS)}, each once. Got {name!r}."
                )
        return factors

    @field_validator("style_factors")
    @classmethod
    def _names_style_factors(cls, factors: list[str]) -> list[str]:
        allowed = (*LESSENED, *FACTORS)
        for name in factors:
            if name not in allowed or factors.count(name) > 1:
                raise ValueError(
                    f"style_factors must name some of {', '.join(allowed)}, each once. Got"
                    f" {name!r}."
                )
        return factors

    @field_validator("scorers")
    @classmethod
    def _names_scorers(cls, scorers: dict[str, str]) -> dict[str, str]:
        for name, text in scorers.items():
            ScorerFile.parse(name, text)
        return scorers

    @property
    def component_weights(self) -> dict[str, float]:
        """Component -> weight, for those that make up the reward; none of the weights is 0."""
        given = {component: getattr(self, key) for component, key in WEIGHT_OF.items()}
        given |= self.weights
        return {component: weight for component, weight in given.items() if weight > 0}

    @property
    def needed(self) -> tuple[str, ...]:
        """The components that a reward is made of: what is weighed, and the factors."""
        weighed = self.component_weights
        style = self.style_factors if STYLE in weighed else ()
        return tuple(dict.fromkeys([*weighed, *self.factors, *style]))

    @property
    def scorer_files(self) -> dict[str, ScorerFile]:
        """Component -> the scorer of `scorers` that measures it."""
        return {name: ScorerFile.parse(name, text) for name, text in self.scorers.items()}


class UpdateParams(OptimizerParams):
    """The RL optimisation of a round.

    Of max_train_steps and rounds, whichever ends first counts.
    """

    max_train_steps: Positive | None = Field(
        None, description="Optimizer steps of the whole run; null = no limit."
    )
    num_inner_epochs: Positive = Field(1, description="Passes over a round's images.")
    adapter_learning_rate: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Peak learning rate of the style adapter; null = learning_rate."
    )
    adam_epsilon: Annotated[float, Field(gt=0)] = Field(
        1e-8,
        description=(
            "Added to the root of AdamW's second moment. Near the size of the gradients it keeps "
            "weights with small, noisy gradients from moving as much as the others."
        ),
    )
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = Field(
        (0.9, 0.999), description="AdamW's decay rates of the first and second moment."
    )


class EmaParams(Section):
    """The moving average of the trained weights: evaluated and exported in their place."""

    use_ema: bool = Field(
        False, description="Keep a moving average; false = evaluate the trained weights."
    )
    decay: Annotated[float, Field(ge=0, lt=1)] | None = Field(
        None, description="Its decay; null = 0.9999 for grpo, 0.999 for nft."
    )
    update_interval: Positive = Field(
        1, description="Optimizer steps between updates of the average."
    )


class EvaluateParams(Section):
    """The evaluation: fixed cases, fixed noise, EMA weights."""

    every: Count = Field(
        1,
        description=(
            "Rounds between evaluations; also before the first and after the last. 0 = none."
        ),
    )
    num_cases: Positive = Field(
        64, description="Held-out cases, the first ones of data.evaluation."
    )
    grid_cases: Positive = Field(8, description="Of these, how many are shown in the image grid.")
    seed: Count = Field(0, description="Seed of the evaluation's noise, apart from the run's.")
    num_images_per_case: Positive = Field(
        1,
        description=(
            "Images per case; their mean counts as the case's. In rounds without an evaluation one"
            " of each of grid_cases is painted."
        ),
    )
    num_inference_steps: Annotated[int, Field(ge=2)] | None = Field(
        None,
        description=(
            "Sampling steps of evaluations, of `generate` and of the page; null = the rollout's."
            " Few steps make rollouts cheap, more show what was learned."
        ),
    )
    noise_level: float = Field(
        0.0,
        ge=0,
        le=1,
        description=(
            "Fresh noise of evaluations, of `generate` and of the page: each of their steps but the"
            " last puts so much of it (as grpo.sampler cps) in the place of what is left of the old"
            " noise. 0 = none, the ODE."
        ),
    )
    stop_on_alarm: bool = Field(
        False,
        description=(
            "End the run after an evaluation that reads worse for certain than the one before the"
            " first round, while the reward rises (reward hacking); a later start with false goes"
            " on."
        ),
    )


class TrackingParams(Section):
    """Who else shows what `metrics.jsonl` holds."""

    backends: list[str] = Field(
        ["mlflow"],
        description=(
            "Trackers: mlflow, tensorboard (event files in the run's folder), wandb; any of them"
            " can be filled later (`calligrapher sync RUN --to NAME`)."
        ),
    )
    uri: str | None = Field(None, description="MLflow store; null = sqlite:///RUNS_DIR/mlflow.db.")
    experiment: str = Field(
        "calligrapher-rl", min_length=1, description="MLflow's experiment; W&B's project."
    )
    enabled: bool = Field(True, description="false = `metrics.jsonl` alone.")

    @property
    def used(self) -> list[str]:
        """The trackers that a run feeds, each once."""
        return list(dict.fromkeys(self.backends)) if self.enabled else []


class RetentionParams(Section):
    """Which rounds keep their checkpoints."""

    keep_last: Positive = Field(2, description="The newest rounds that keep their files.")
    keep_every: Count = Field(0, description="Also every n-th round; 0 = none.")
    keep_best: bool = Field(True, description="Also the round with the best held-out OCR accuracy.")


def _listed(ids: Any) -> Any:
    """Return GPUs written as `0,1,2,3`, or as one number, as a list."""
    if isinstance(ids, str):
        return [part.strip() for part in ids.split(",") if part.strip()]
    return [ids] if isinstance(ids, int) else ids


GpuIds = Annotated[list[Count], BeforeValidator(_listed)]


class LaunchParams(Section):
    """Where a run works and how fast: no result depends on it, and a run may go on with another."""

    gpu_ids: GpuIds = Field(
        [], description="GPUs of this machine to train on, one rank each; empty = one process."
    )
    num_processes: Positive | None = Field(
        None, description="Ranks; null = one for each of gpu_ids, or one."
    )
    rollout_processes: Count = Field(
        0,
        description=(
            "With rollout.staleness: so many of the ranks, the first ones, only sample and score,"
            " the next round's images while the others update on this one's; 0 = all do all."
        ),
    )
    backend: Literal["inline", "accelerate", "ray"] | None = Field(
        None,
        description=(
            "inline: this process; accelerate: processes of this machine; ray: actors on all"
            " machines of RAY_ADDRESS, or of a local Ray. null = inline for one rank, accelerate"
            " for more."
        ),
    )
    strategy: Literal["ddp", "fsdp2", "deepspeed"] = Field(
        "ddp", description="ddp: the whole model on each rank; fsdp2: a share of it on each."
    )
    reward_gpu_ids: GpuIds = Field(
        [], description="GPUs of this machine for reward servers that the run starts and stops."
    )
    allow_fewer_servers: bool = Field(
        False, description="Let several ranks share a reward server, and scoring take longer."
    )
    timeout_s: Annotated[float, Field(gt=0)] = Field(
        300.0,
        description="Seconds after which a rank without a sign of life is taken for hung, and so"
        " are ranks of which none computes anything.",
    )
    wait_s: Weight = Field(
        600.0, description="Seconds that Ray may take to find places for all ranks."
    )

    @property
    def size(self) -> int:
        """How many ranks the params ask for."""
        return self.num_processes or len(self.gpu_ids) or 1

    @property
    def chosen_backend(self) -> str:
        """The backend, or the one that the number of ranks stands for."""
        return self.backend or ("inline" if self.size == 1 else "accelerate")
