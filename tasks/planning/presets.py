"""A params file for a machine: a production file, changed until `plan` says that it fits.

```
write_preset(Path("mine.yaml"), machine="48", algorithm="nft")
```
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from calligrapher.durable import atomic_write
from calligrapher.errors import ParamsError
from tasks.params.files import find_params_file
from tasks.params.run_params import RunParams, load_params
from tasks.planning.gpu_fit import GPUS, changes_to_fit, needed

ALGORITHMS = {"nft": "DiffusionNFT", "grpo": "Flow-GRPO"}
_COMMENT = 36  # the column where comments begin
Setting = tuple[str, str, str]  # key, value, why


@dataclass(frozen=True)
class Machine:
    """GPUs of one kind, a name of `GPUS`, and what a params file for them says besides."""

    words: str
    gpu: str
    settings: tuple[Setting, ...]


_OWN_SERVER: tuple[Setting, ...] = (
    ("reward.server_urls", "[]", "none: the run starts a server of its own, on the CPU"),
    ("reward.vlm_weight", "0.0", "a judge needs a GPU that does not train"),
    ("reward.ocr_mode", "null", "as that server reads by itself"),
    ("reward.vlm", "null", "a folder, where vlm_weight is above 0"),
)
_SERVERS_BESIDE: tuple[Setting, ...] = (
    ("reward.server_urls", "[]", "none: the run starts one on each of launch.reward_gpu_ids"),
    ("reward.ocr_mode", "null", "as those servers read by themselves"),
    ("reward.vlm", "/models/Qwen2.5-VL-7B-Instruct", "the judge, a folder"),
    ("launch.gpu_ids", "[0, 1, 2, 3]", "one rank on each"),
    ("launch.reward_gpu_ids", "[4, 5, 6, 7]", "servers that the run starts and stops itself"),
)
_SHARDED: tuple[Setting, ...] = (
    ("launch.gpu_ids", "[0, 1, 2, 3, 4, 5, 6, 7]", "one rank on each"),
    ("launch.strategy", "fsdp2", "no GPU of these holds the model alone"),
    ("warmup.use_8bit_adam", "false", "fsdp2 shares out moments in 32 bits"),
    ("update.use_8bit_adam", "false", "fsdp2 shares out moments in 32 bits"),
)
_WHY = {
    "model.train_adapter=false": "its gradients and moments would not fit; a LoRA is trained",
    "model.lora={}": "of the default rank, on the default layers",
}
MACHINES = {
    "24": Machine("one GPU of 24 GB", "4090", _OWN_SERVER),
    "48": Machine("one GPU of 48 GB", "l40s", _OWN_SERVER),
    "80": Machine("one GPU of 80 GB", "h100", _OWN_SERVER),
    "8x24": Machine("eight GPUs of 24 GB", "4090", _OWN_SERVER + _SHARDED),
    "8x80": Machine("eight GPUs of 80 GB", "h100", _SERVERS_BESIDE),
}


def write_preset(file: Path, machine: str, algorithm: str) -> str:
    """Write a commented params file for a machine; return what it needs, in a sentence.

    Raises ParamsError where `file` is there already, and where no change that is known makes the
    model fit.
    """
    if file.exists():
        raise ParamsError(f"{file} must not be there yet. It is: choose another name.")
    chosen, shipped = MACHINES[machine], find_params_file(algorithm)
    gib = GPUS[chosen.gpu]

    def load(settings: Sequence[str]) -> RunParams:
        return load_params(shipped, settings)

    given = [f"{key}={value}" for key, value, _ in chosen.settings]
    changes, after = changes_to_fit(load, given, gib)
    if after > gib:
        raise ParamsError(
            f"--gpu must name a machine that holds the model. Got {machine}, of which a GPU has"
            f" {gib:.1f} GiB; {after:.1f} are the least that is known, with {' '.join(changes)}."
            " Nearest: 48, or 8x24 with the model shared out."
        )
    settings = [*chosen.settings, *(_to_fit(change, chosen.words) for change in changes)]
    if "model.train_adapter=false" in changes:
        settings.append(("update.use_8bit_adam", "false", "a LoRA's moments are small"))
    gib_needed = needed(load([f"{key}={value}" for key, value, _ in settings]))
    told = f"{gib_needed:.1f} GiB of a GPU's {gib:.1f}"
    lines = _without_header(shipped.read_text()).splitlines()
    for key, value, why in settings:
        lines = _replaced(lines, key, value, why)
    header = (
        f"# {ALGORITHMS[algorithm]} on FLUX.1-Fill-dev with the released Calligrapher adapter, for"
        f" {chosen.words}.\n#\n# `calligrapher plan {file.name} --gpu {chosen.gpu}` reckons {told}."
        " Set the paths of model and data first,\n# then ask `calligrapher doctor"
        f" {file.name}`, then `calligrapher train {file.name}`.\n"
    )
    atomic_write(file, (header + "\n".join(lines) + "\n").encode())
    return f"{file} is for {chosen.words}: it needs {told}, by `calligrapher plan`."


def _to_fit(change: str, words: str) -> Setting:
    key, _, value = change.partition("=")
    return key, value, _WHY.get(change, f"so that it fits {words}")


def _without_header(text: str) -> str:
    return re.sub(r"\A(?:#.*\n)+", "", text)


def _replaced(lines: list[str], key: str, value: str, why: str) -> list[str]:
    """Return the lines of a params file with another value, and its reason, in the line of a key;
    a list that stands on lines of its own goes."""
    section, _, name = key.partition(".")
    at = next(i for i, line in enumerate(lines) if line.startswith(f"{section}:"))
    at = next(i for i in range(at + 1, len(lines)) if lines[i].startswith(f"  {name}:"))
    end = next(
        (i for i in range(at + 1, len(lines)) if not lines[i].startswith("    ")), len(lines)
    )
    line = f"{f'  {name}: {value}':<{_COMMENT - 1}} # {why}"
    return [*lines[:at], line, *lines[end:]]
