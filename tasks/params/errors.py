"""What is wrong with a params file, in words: the key, what must hold, what was found."""

import difflib
from typing import Any, TypeVar, get_args

from pydantic import BaseModel, ValidationError

from calligrapher.errors import ParamsError

Checked = TypeVar("Checked", bound=BaseModel)

# The names of the old command line, where likeness of spelling would not find the new key.
_OLD_FLAGS = {
    "method": ["a section nft or grpo"],
    "resolution": ["model.width", "model.height"],
    "train_batch_size": ["update.batch_size", "warmup.batch_size"],
    "initial_ip_adapter_path": ["model.initial_adapter"],
    "pretrained_model_name_or_path": ["model.base"],
    "siglip_path": ["model.siglip"],
    "reward_server_url": ["reward.server_urls"],
    "per_prompt_stat_tracking": ["advantage.baseline", "advantage.global_std"],
    "grpo_clip_range": ["grpo.clip_range"],
    "kl_beta": ["nft.kl_coef", "grpo.kl_coef"],
    "nft_adv_mode": ["nft.adv_mode"],
    "nft_decay_type": ["nft.old_policy"],
    "warmup_steps": ["warmup.steps"],
}
_KINDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text",
    "list": "a list",
    "tuple": "a list",
    "finite_number": "a finite number",
}
_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}


def checked(root: type[Checked], values: dict[str, Any]) -> Checked:
    """`values` as a `root`. Raises one ParamsError that names every problem."""
    try:
        return root.model_validate(values)
    except ValidationError as error:
        raise ParamsError("; ".join(describe(error, root))) from None


def describe(error: ValidationError, root: type[BaseModel]) -> list[str]:
    """One sentence for each problem, in the file's order: `section.key must ... Got ...`."""
    return [_sentence(problem, root) for problem in error.errors()]


def valid_keys(model: type[BaseModel], prefix: str = "") -> dict[str, type[BaseModel] | None]:
    """Every dotted key below `model` -> the section that it is, or None for a value."""
    keys: dict[str, type[BaseModel] | None] = {}
    for name, field in model.model_fields.items():
        section = section_of(field.annotation)
        keys[prefix + name] = section
        if section is not None:
            keys |= valid_keys(section, f"{prefix}{name}.")
    return keys


def nearest(key: str, root: type[BaseModel]) -> list[str]:
    """The valid keys that `key` may have meant: a slip, or the right name in the wrong place."""
    keys = list(valid_keys(root))
    name = key.rpartition(".")[2].removeprefix("rl_")
    if name in _OLD_FLAGS:
        return _OLD_FLAGS[name]
    same_name = [valid for valid in keys if valid.rpartition(".")[2] == name]
    if same_name:
        return same_name[:2]
    close = difflib.get_close_matches(key, keys, n=2, cutoff=0.75)
    return close or difflib.get_close_matches(name.replace("_", "."), keys, n=1, cutoff=0.6)


def section_of(annotation: Any) -> type[BaseModel] | None:
    """Return the section that a field with `annotation` is, or None for a value."""
    for candidate in (annotation, *get_args(annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _sentence(problem: Any, root: type[BaseModel]) -> str:
    key = ".".join(str(part) for part in problem["loc"])
    kind, found, context = problem["type"], problem["input"], problem.get("ctx", {})
    got = f"Got {found!r}."
    if kind == "extra_forbidden":
        hint = " or ".join(nearest(key, root))
        return f"unknown key {key!r}." + (
            f" Nearest: {hint}." if hint else f" {_keys_beside(key, root)}"
        )
    if kind == "missing":
        return f"{key} must be given. It is missing."
    if kind in _BOUNDS:
        words, bound = _BOUNDS[kind]
        return f"{key} must be {words} {context[bound]}. {got}"
    if kind == "literal_error":
        return f"{key} must be {context['expected']}. {got}"
    if kind == "model_type" or kind == "dict_type":
        return f"{key} must be a section with keys of its own. {got}"
    if kind == "too_short":
        return f"{key} must have at least {context['min_length']} entries. {got}"
    if kind == "string_too_short":
        return f"{key} must not be empty. {got}"
    if kind == "value_error":
        return _prefixed(key, str(context["error"]), root)
    if kind == "int_parsing_size":
        return f"{key} must be a whole number of fewer digits. {got}"
    family = kind.removesuffix("_type").removesuffix("_parsing").removesuffix("_from_float")
    if family in _KINDS:
        return f"{key} must be {_KINDS[family]}. {got}"
    return f"{key} must be valid: {problem['msg']}. {got}"


def _prefixed(key: str, message: str, root: type[BaseModel]) -> str:
    """A section's own check speaks of its fields by their bare names: write them as in the file."""
    section = valid_keys(root).get(key)
    if section is not None and message.split(maxsplit=1)[0] in section.model_fields:
        return f"{key}.{message}"
    return message


def _keys_beside(key: str, root: type[BaseModel]) -> str:
    parent = key.rpartition(".")[0]
    section = valid_keys(root).get(parent) or root
    return (
        f"Valid keys {'of ' + parent if parent else 'at the top'}:"
        f" {', '.join(section.model_fields)}."
    )
