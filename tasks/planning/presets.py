"""A params file for a machine: a production file, changed until `plan` says that it fits.

```
write_preset(Path("mine.yaml"), machine="48", algorithm="nft")
```
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from calligrapher.durable import atomic_write
from calligrapher.errors import ParamsError
from tasks.params.files import find_params_file
from tasks.params.run_params import RunParams, load_params
from tasks.planning.gpu_fit import GPUS, changes_to_fit, needed

ALGORITHMS = {"nft": "DiffusionNFT", "grpo": "Flow-GRPO"}
BOARDS = {"24": "4090", "40": "a100-40", "48": "l40s", "80": "h100", "141": "h200"}  # of `GPUS`
MOST = 16  # GPUs of a machine
_COMMENT = 36  # the column where comments begin
Setting = tuple[str, str, str]  # key, value, why

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
)
_WHY = {
    "launch.strategy=fsdp2": "no GPU of these holds the model alone",
    "warmup.use_8bit_adam=false": "fsdp2 shares out moments in 32 bits",
    "update.use_8bit_adam=false": "fsdp2 shares out moments in 32 bits",
    "model.train_adapter=false": "its gradients and moments would not fit; a LoRA is trained",
    "model.lora={}": "of the default rank, on the default layers",
}


@dataclass(frozen=True)
class Machine:
    """So many GPUs of so many GB, a key of `BOARDS`."""

    count: int
    gb: str

    @classmethod
    def named(cls, name: str) -> "Machine":
        """Read `80` or `8x80`; raise ParamsError for what is neither."""
        match = re.fullmatch(r"(?:(\d{1,2})x)?(\d+)", name)
        machine = cls(int(match[1] or 1), match[2]) if match else cls(0, "")
        if not 1 <= machine.count <= MOST or machine.gb not in BOARDS:
            raise ParamsError(
                f"--gpu must be the GB of a GPU, one of {', '.join(BOARDS)}, or how many x GB, at"
                f" most {MOST}. Got {name!r}. Give such as 80 or 8x80."
            )
        return machine

    def __str__(self) -> str:
        return self.gb if self.count == 1 else f"{self.count}x{self.gb}"

    @property
    def words(self) -> str:
        return (
            f"one GPU of {self.gb} GB" if self.count == 1 else f"{self.count} GPUs of {self.gb} GB"
        )

    @property
    def gib(self) -> float:
        return GPUS[BOARDS[self.gb]]

    @property
    def half_scores(self) -> list[Setting]:
        """Settings with which the first half of the GPUs train, or one more, and the rest score."""
        ids = list(range(self.count))
        train, score = ids[: -(self.count // 2)], ids[-(self.count // 2) :]
        fewer = ("launch.allow_fewer_servers", "true", "two ranks share one")
        return [
            *_SERVERS_BESIDE,
            ("launch.gpu_ids", str(train), "one rank on each"),
            ("launch.reward_gpu_ids", str(score), "servers that the run starts and stops itself"),
            *([fewer] if len(score) < len(train) else []),
        ]

    @property
    def all_train(self) -> list[Setting]:
        """Settings with which each GPU trains, beside a reward server on the CPU."""
        ids = ("launch.gpu_ids", str(list(range(self.count))), "one rank on each")
        return [*_OWN_SERVER, *([ids] if self.count > 1 else [])]


def write_preset(file: Path, machine: str, algorithm: str) -> str:
    """Write a commented params file for a machine; return what it needs, in a sentence.

    Raises ParamsError where `file` is there already, and where no change that is known makes the
    model fit.
    """
    if file.exists():
        raise ParamsError(f"{file} must not be there yet. It is: choose another name.")
    chosen, shipped = Machine.named(machine), find_params_file(algorithm)

    def load(settings: Sequence[str]) -> RunParams:
        return load_params(shipped, settings)

    settings, after = _settings(load, chosen)
    if after > chosen.gib:
        given = [f"{key}={value}" for key, value, _ in settings if not key.startswith("reward.")]
        raise ParamsError(
            f"--gpu must name a machine that holds the model. Got {chosen}, of which a GPU has"
            f" {chosen.gib:.1f} GiB; {after:.1f} are the least that is known, with"
            f" {' '.join(given)}. Nearest: {' or '.join(_nearest(load, chosen))}."
        )
    told = f"{needed(load(_overrides(settings))):.1f} GiB of a GPU's {chosen.gib:.1f}"
    lines = _without_header(shipped.read_text()).splitlines()
    for key, value, why in settings:
        lines = _replaced(lines, key, value, why)
    header = (
        f"# {ALGORITHMS[algorithm]} on FLUX.1-Fill-dev with the released Calligrapher adapter, for"
        f" {chosen.words}.\n#\n# `calligrapher plan {file.name} --gpu {BOARDS[chosen.gb]}` reckons"
        f" {told}. Set the paths of model and data first,\n# then ask `calligrapher doctor"
        f" {file.name}`, then `calligrapher train {file.name}`.\n"
    )
    atomic_write(file, (header + "\n".join(lines) + "\n").encode())
    return f"{file} is for {chosen.words}: it needs {told}, by `calligrapher plan`."


def _settings(
    load: Callable[[Sequence[str]], RunParams], machine: Machine
) -> tuple[list[Setting], float]:
    """What a params file for a machine says, and the GiB of a GPU that it then needs.

    Half of the GPUs score where the other half can train as the file stands; otherwise all train,
    with what else must change.
    """
    if machine.count > 1:
        beside = machine.half_scores
        if (gib := needed(load(_overrides(beside)))) <= machine.gib:
            return beside, gib
    settings = machine.all_train
    changes, gib = changes_to_fit(load, _overrides(settings), machine.gib)
    for change in changes:
        key, _, value = change.partition("=")
        settings.append((key, value, _WHY.get(change, f"so that it fits {machine.words}")))
    if "model.train_adapter=false" in changes and "update.use_8bit_adam=false" not in changes:
        settings.append(("update.use_8bit_adam", "false", "a LoRA's moments are small"))
    return settings, gib


def _nearest(load: Callable[[Sequence[str]], RunParams], machine: Machine) -> list[str]:
    """Names of the machines that hold the model: with more GPUs of this kind, with larger ones."""
    doubled = (2**n * machine.count for n in range(1, MOST.bit_length()))
    more = (Machine(count, machine.gb) for count in doubled if count <= MOST)
    larger = (Machine(machine.count, gb) for gb in BOARDS if int(gb) > int(machine.gb))
    found = (next((m for m in ms if _settings(load, m)[1] <= m.gib), None) for ms in (more, larger))
    return [str(machine) for machine in found if machine]


def _overrides(settings: Sequence[Setting]) -> list[str]:
    return [f"{key}={value}" for key, value, _ in settings]


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
