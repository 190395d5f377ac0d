"""Which values of a params file do not go together, and what to do about it.

Each check takes the loaded params and raises a ValueError in words; `check_all` runs them in turn.
"""

from typing import Protocol, get_args

from pydantic import BaseModel

from calligrapher.model.sharding import check_strategy
from calligrapher.rl.advantage import AdvantageParams
from calligrapher.rl.algorithm import Algorithm
from reward_server.components import FACTORS, NAMES, WEIGHABLE
from tasks.params.sections import (
    DataParams,
    EvaluateParams,
    LaunchParams,
    ModelParams,
    RetentionParams,
    RewardParams,
    RolloutParams,
    TrackingParams,
    UpdateParams,
    WarmupParams,
)


class Sections(Protocol):
    """What the checks read of a run's params."""

    model: ModelParams
    data: DataParams
    warmup: WarmupParams
    rollout: RolloutParams
    reward: RewardParams
    advantage: AdvantageParams
    update: UpdateParams
    evaluate: EvaluateParams
    tracking: TrackingParams
    retention: RetentionParams
    launch: LaunchParams

    @property
    def rl(self) -> Algorithm: ...

    @property
    def images_per_round(self) -> int: ...


MLFLOW_SCHEMES = (
    "sqlite",
    "file",
    "http",
    "https",
    "postgresql",
    "mysql",
    "mssql",
    "databricks",
    "databricks-uc",
    "uc",
)


def check_all(params: Sections) -> None:
    """Raise the ValueError of the first check that fails."""
    one_algorithm(params)
    trains_something(params)
    has_a_signal(params)
    steps_suffice(params)
    solver_fits(params)
    refill_can_be_judged(params)
    trunk_is_shared(params)
    stale_images_are_weighed(params)
    stale_policies_are_kept(params)
    compares_equal_batches(params)
    letters_have_a_share(params)
    reward_answers(params)
    evaluates(params)
    learning_rate_rises(params)
    adapter_learns(params)
    tracking_has_a_store(params)
    ranks_have_places(params)
    ranks_are_set_apart(params)
    servers_have_places(params)


def algorithms(params: type[BaseModel]) -> dict[str, type[Algorithm]]:
    """Return the fields of `params` that hold an algorithm's section, and the section's class."""
    return {
        name: candidate
        for name, field in params.model_fields.items()
        for candidate in get_args(field.annotation)
        if isinstance(candidate, type) and issubclass(candidate, Algorithm)
    }


def one_algorithm(params: Sections) -> None:
    known = list(algorithms(type(params)))
    given = [name for name in known if getattr(params, name) is not None]
    if len(given) != 1:
        raise ValueError(
            f"exactly one of the sections {', '.join(known)} must be given. Got"
            f" {' and '.join(given) or 'none'}. To switch off the one of a file, override it with"
            f" null: `{(given or known)[-1]}=null {known[0]}={{}}`."
        )


def trains_something(params: Sections) -> None:
    if not params.model.train_adapter and params.model.lora is None:
        raise ValueError(
            "model.train_adapter must be true when model.lora is null: nothing would train. Got"
            " false."
        )
    lora = params.model.lora
    if lora is not None and not (lora.targets or lora.adapter_targets):
        raise ValueError(
            "model.lora must name layers in targets or adapter_targets, or be null. Both are empty."
        )
    if params.model.base != "tiny" and params.model.siglip is None:
        raise ValueError(
            f"model.siglip must name the SigLIP folder of model.base {params.model.base!r}. Got"
            " None: only the embedded model 'tiny' has one of its own."
        )


def has_a_signal(params: Sections) -> None:
    if params.rollout.num_images_per_prompt == 1 and params.advantage.baseline == "group":
        raise ValueError(
            "rollout.num_images_per_prompt must be at least 2 with advantage.baseline 'group'. Got"
            " 1: an image is its group's mean, so every advantage would be 0. Use 4 to 8, or set"
            " advantage.baseline to 'round'."
        )
    if params.images_per_round == 1:
        raise ValueError(
            "rollout.num_cases must be at least 2 with one image per case and one batch per round."
            " Got 1: an image is its round's mean, so every advantage would be 0."
        )


def steps_suffice(params: Sections) -> None:
    params.rl.fits(params.rollout.num_inference_steps)


def solver_fits(params: Sections) -> None:
    if params.rollout.solver != "euler" and params.rl.exploration is not None:
        raise ValueError(
            f"rollout.solver must be euler with {params.rl.name}. Got {params.rollout.solver}, a"
            " solver of several steps: the noise of a window would lie between them. Set it to"
            " euler, or train with an algorithm that does not explore."
        )


def refill_can_be_judged(params: Sections) -> None:
    refill = params.rollout.refill
    if refill and params.advantage.baseline == "round":
        raise ValueError(
            "advantage.baseline must be 'group' with rollout.refill. Got 'round': an image is"
            " compared with all of the round, so no group lacks a spread. Set rollout.refill to 0."
        )
    if refill and params.reward.disable_reward_model:
        raise ValueError(
            "rollout.refill must be 0 with reward.disable_reward_model. Got"
            f" {refill}: equal rewards leave every group without a spread."
        )


def trunk_is_shared(params: Sections) -> None:
    rollout, explores = params.rollout, params.rl.exploration
    if not rollout.shared_trunk:
        return
    if explores is None or explores.noise != "group":
        found = "none" if explores is None else f"{params.rl.name}.noise: {explores.noise}"
        raise ValueError(
            "rollout.shared_trunk must be false unless the images of a group start from one noise"
            f" (grpo.noise: group). Got {found}: they have no steps in common."
        )
    size, group = rollout.batch_size, rollout.num_images_per_prompt
    mixed = group % size or rollout.shard_size % size
    if params.launch.strategy == "fsdp2" and explores.window == "random" and mixed:
        raise ValueError(
            "rollout.batch_size must divide rollout.num_images_per_prompt and rollout.shard_size"
            f" with rollout.shared_trunk and launch.strategy fsdp2. Got {size}, {group} and"
            f" {rollout.shard_size}: a batch of several groups has more calls where their windows"
            " lie apart, and ranks that share the weights out must make equally many."
        )


def letters_have_a_share(params: Sections) -> None:
    if not params.advantage.per_letter or params.reward.disable_reward_model:
        return
    if "ocr_likelihood" not in params.reward.component_weights:
        raise ValueError(
            "reward.likelihood_weight must be above 0 where advantage.per_letter is true, for it is"
            " ocr_likelihood that each letter has for itself. Got"
            f" {params.reward.component_weights or 'no reward'}."
        )
    if not params.rl.credits_places:
        raise ValueError(
            f"advantage.per_letter must be false with {params.rl.name} where the guard bounds an"
            " update: its exponent has a gradient beside the log-probability's. Got true. Set"
            " trust_region to clip or dppo."
        )


def stale_images_are_weighed(params: Sections) -> None:
    key = params.rl.lacks_for_stale
    if params.rollout.staleness and key is not None:
        raise ValueError(
            f"{params.rl.name}.{key} must be a number with rollout.staleness"
            f" {params.rollout.staleness}. Got null: the loss would take images of an older policy"
            " for the newest one's (docs/algorithms.md). Set it, or rollout.staleness to 0."
        )


def stale_policies_are_kept(params: Sections) -> None:
    least = 1 + params.rollout.staleness
    if params.retention.keep_last < least:
        raise ValueError(
            f"retention.keep_last must be at least {least} with rollout.staleness"
            f" {params.rollout.staleness}. Got {params.retention.keep_last}: the policy that"
            " samples the next round would be deleted before."
        )


def compares_equal_batches(params: Sections) -> None:
    """Raise where half precision would compare log-probabilities out of unlike batches.

    Sums in half precision depend on the shape of a batch. The update of an algorithm that explores
    takes the rollout's log-probabilities for its own, so both must work on batches of one size;
    unless it reckons them anew, under the policy that sampled.
    """
    precision, rollout = params.model.mixed_precision, params.rollout
    if precision == "no" or params.rl.exploration is None or params.rl.needs_old:
        return
    if params.update.batch_size != rollout.batch_size:
        raise ValueError(
            f"update.batch_size must be rollout.batch_size, {rollout.batch_size}, with"
            f" {params.rl.name} and model.mixed_precision {precision!r}. Got"
            f" {params.update.batch_size}: half-precision results depend on the size of a batch, so"
            " the ratio would not be 1 before the first step, but off by 2e-5 to 1e-4. Set both to"
            " one value; update.gradient_accumulation_steps decides how many images a step has. Or"
            " set grpo.recompute_log_prob, at its cost."
        )
    if rollout.shard_size % rollout.batch_size:
        raise ValueError(
            f"rollout.shard_size must be a multiple of rollout.batch_size, {rollout.batch_size},"
            f" with {params.rl.name} and model.mixed_precision {precision!r}. Got"
            f" {rollout.shard_size}: the last batch of a shard would be smaller than any of the"
            " update, so the ratio would not be 1 before the first step."
        )


def reward_answers(params: Sections) -> None:
    reward = params.reward
    if reward.disable_reward_model:
        return
    strange = [url for url in reward.server_urls if not url.startswith(("http://", "https://"))]
    if strange:
        raise ValueError(
            f"reward.server_urls must begin with http:// or https://. Got {strange[0]!r}."
        )
    if reward.vlm_weight > 0 and reward.vlm is None and not reward.server_urls:
        raise ValueError(
            "reward.vlm_weight must be 0 when no VLM answers (reward.vlm is null and"
            f" reward.server_urls is empty). Got {reward.vlm_weight}. Set it to 0, or name a VLM."
        )
    for name in reward.weights:
        if name not in (*NAMES, *FACTORS, *reward.scorers) and not reward.server_urls:
            raise ValueError(
                f"reward.weights.{name} must name what is measured: a component of the reward"
                f" server ({', '.join(WEIGHABLE)}), or one of reward.scorers. Got"
                f" {reward.weights[name]:g} and no such scorer. Add it there, or name servers that"
                " measure it."
            )
    if not reward.component_weights:
        raise ValueError(
            "reward.ocr_weight, or another weight of the reward, must be greater than 0. All are 0."
        )


def evaluates(params: Sections) -> None:
    evaluate = params.evaluate
    if evaluate.every > 0 and params.data.evaluation is None:
        raise ValueError(
            f"data.evaluation must name held-out cases when evaluate.every is {evaluate.every}. Got"
            " None. Name them, or set evaluate.every to 0."
        )
    if evaluate.stop_on_alarm and evaluate.every == 0:
        raise ValueError(
            "evaluate.every must be at least 1 with evaluate.stop_on_alarm. Got 0: without"
            " evaluations nothing raises the alarm. Set it to a number of rounds, or stop_on_alarm"
            " to false."
        )
    if evaluate.grid_cases > evaluate.num_cases:
        raise ValueError(
            f"evaluate.grid_cases must be at most evaluate.num_cases, {evaluate.num_cases}. Got "
            f"{evaluate.grid_cases}."
        )


def learning_rate_rises(params: Sections) -> None:
    for name, section in (("warmup", params.warmup), ("update", params.update)):
        if section.lr_scheduler == "constant" and section.lr_warmup_steps:
            raise ValueError(
                f"{name}.lr_warmup_steps must be 0 with {name}.lr_scheduler 'constant', which has"
                f" no rise. Got {section.lr_warmup_steps}. Set {name}.lr_scheduler to"
                " 'constant_with_warmup'."
            )


def adapter_learns(params: Sections) -> None:
    model, rate = params.model, params.update.adapter_learning_rate
    trained = model.train_adapter or (model.lora is not None and model.lora.adapter_targets)
    if rate is not None and not trained:
        raise ValueError(
            "update.adapter_learning_rate must be null where the adapter is not trained. Got"
            f" {rate}. Set model.train_adapter to true, or name layers in"
            " model.lora.adapter_targets."
        )


def tracking_has_a_store(params: Sections) -> None:
    uri = params.tracking.uri or ""
    scheme, separator, _ = uri.partition("://")
    if separator and scheme.partition("+")[0] not in MLFLOW_SCHEMES:
        raise ValueError(
            "tracking.uri must be a folder, or a URI that begins with one of"
            f" {', '.join(MLFLOW_SCHEMES)}. Got {scheme}://, which MLflow cannot open."
        )


def ranks_have_places(params: Sections) -> None:
    launch = params.launch
    if launch.num_processes and launch.gpu_ids and launch.num_processes != len(launch.gpu_ids):
        raise ValueError(
            "launch.num_processes must be the number of launch.gpu_ids, or null. Got"
            f" {launch.num_processes} for {len(launch.gpu_ids)} GPUs."
        )
    if launch.backend == "inline" and launch.size > 1:
        raise ValueError(
            f"launch.backend must be accelerate or ray for {launch.size} ranks. Got inline, which"
            " is this process alone. Set it to null."
        )
    if launch.backend == "ray" and launch.gpu_ids:
        raise ValueError(
            f"launch.gpu_ids must be empty with launch.backend ray. Got {launch.gpu_ids}: Ray"
            " chooses machines and GPUs. Set launch.num_processes."
        )
    eight_bit = params.warmup.use_8bit_adam or params.update.use_8bit_adam
    check_strategy(launch.strategy, use_8bit_adam=eight_bit, compiled=params.model.compile)
    device = params.model.device
    if launch.size > 1 and device not in ("auto", "cpu", "cuda"):
        raise ValueError(
            f"model.device must be auto, cpu or cuda for {launch.size} ranks. Got {device!r}, which"
            " is one device. Choose GPUs with launch.gpu_ids."
        )


def ranks_are_set_apart(params: Sections) -> None:
    launch = params.launch
    if not launch.rollout_processes:
        return
    if not params.rollout.staleness:
        raise ValueError(
            "launch.rollout_processes must be 0 with rollout.staleness 0. Got"
            f" {launch.rollout_processes}: a round's images are sampled after the update of the"
            " round before, so these ranks or the others would always wait. Set one of the two."
        )
    if launch.rollout_processes >= launch.size:
        raise ValueError(
            "launch.rollout_processes must be less than the number of ranks that the params start,"
            f" {launch.size}. Got {launch.rollout_processes}: none would be left for the update."
            " Set launch.num_processes or gpu_ids (a launcher of your own cannot divide its ranks),"
            " or launch.rollout_processes to 0."
        )
    if launch.strategy != "ddp":
        raise ValueError(
            f"launch.strategy must be ddp with launch.rollout_processes. Got {launch.strategy},"
            " which shares the model out among all ranks."
        )


def servers_have_places(params: Sections) -> None:
    launch, reward = params.launch, params.reward
    for key, ids in (("gpu_ids", launch.gpu_ids), ("reward_gpu_ids", launch.reward_gpu_ids)):
        if len(set(ids)) != len(ids):
            raise ValueError(f"launch.{key} must name each GPU once. Got {ids}.")
    if both := sorted(set(launch.gpu_ids) & set(launch.reward_gpu_ids)):
        raise ValueError(
            "launch.gpu_ids and launch.reward_gpu_ids must be different GPUs. Got"
            f" {', '.join(map(str, both))} in both: a model and a reward server would share its"
            " memory."
        )
    if launch.reward_gpu_ids and reward.server_urls:
        raise ValueError(
            "launch.reward_gpu_ids must be empty where reward.server_urls names servers. Got"
            f" {launch.reward_gpu_ids}. Give one of the two."
        )
    if launch.reward_gpu_ids and reward.server_host not in (None, "127.0.0.1", "localhost"):
        raise ValueError(
            "reward.server_host must be null with launch.reward_gpu_ids, which are of this machine."
            f" Got {reward.server_host!r}. Start the servers there, and set"
            " launch.reward_gpu_ids=[]."
        )
    last = (reward.server_port or 8000) + max(launch.size, len(launch.reward_gpu_ids)) - 1
    if last > 65535:
        raise ValueError(
            "reward.server_port must leave room for a port of each rank. Got"
            f" {reward.server_port}, which would end at {last}."
        )
