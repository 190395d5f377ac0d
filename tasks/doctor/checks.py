"""The checks of `calligrapher doctor` that need no orchestrator: each says what it found.

A check returns a line about what is right; an exception of it is the line about what is not, with
what to do. None is asked of what another has already found wrong.
"""

import importlib.metadata
import json
import os
import shutil
import socket
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import psutil
from packaging.requirements import Requirement

from calligrapher.errors import CalligrapherError, CheckpointError, ParamsError
from calligrapher.model.loading import pick_device
from tasks.launch.places import check_places, named_servers
from tasks.params.run_params import RunParams
from tasks.planning import work
from tasks.planning.gpu_fit import GIB, needed
from tasks.planning.memory import memory
from tasks.runs.preflight import preflight
from tasks.weights.model_files import model_files


@dataclass(frozen=True)
class Check:
    """A question about this machine. after: names of checks that must be right before it."""

    name: str
    ask: Callable[[], str]
    after: tuple[str, ...] = ()


@dataclass(frozen=True)
class Finding:
    """What a check found: `ok`, and one line."""

    check: str
    ok: bool
    says: str

    def line(self) -> str:
        """Return `ok NAME: ...` or `FAIL NAME: ...`."""
        return f"{'ok' if self.ok else 'FAIL'} {self.check}: {self.says}"


def examine(checks: Sequence[Check]) -> Iterator[Finding]:
    """Yield the finding of each check, in order."""
    wrong: set[str] = set()
    for check in checks:
        first = [name for name in check.after if name in wrong]
        try:
            if first:
                raise CalligrapherError(f"not tried: mend {' and '.join(first)} first.")
            found = Finding(check.name, True, check.ask())
        except Exception as error:  # whatever it is, the other checks are still worth their answer
            kind = "" if isinstance(error, CalligrapherError) else f"{type(error).__name__}: "
            found = Finding(check.name, False, kind + " ".join(str(error).split()))
        if not found.ok:
            wrong.add(check.name)
        yield found


def versions(package: str = "calligrapher") -> str:
    """Say that the packages which `package` was tested with are installed."""
    wrong, count = [], 0
    for text in importlib.metadata.requires(package) or []:
        wanted = Requirement(text)
        if wanted.marker is not None and not wanted.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            have = importlib.metadata.version(wanted.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{wanted} (got none)")
            continue
        # A build's own mark, as in 2.13.0+cpu, is no other version.
        if not wanted.specifier.contains(have.partition("+")[0], prereleases=True):
            wrong.append(f"{wanted} (got {have})")
    if wrong:
        raise CalligrapherError(
            f"the packages must be those that were tested together. Wanted: {', '.join(wrong)}."
            " Install them: pip install -e . in the checkout."
        )
    return f"{count} packages as they were tested"


def devices(params: RunParams, size: int) -> str:
    """Say that each rank's device is there and has the memory that the plan reckons."""
    device = pick_device(params.model.device)
    if device.type != "cuda":
        wanted = size * max(stage.total for stage in memory(params)) / GIB
        free = psutil.virtual_memory().available / GIB
        if wanted > free:
            raise ParamsError(
                f"{size} ranks on {device.type} must have {wanted:.1f} GiB of memory. Got"
                f" {free:.1f}. Free some, or take fewer ranks."
            )
        return f"{size} x {device.type}, {wanted:.2f} GiB needed, {free:.1f} GiB free"
    import torch

    ids = gpu_ids(params, size)
    if missing := [i for i in ids if i >= torch.cuda.device_count()]:
        raise ParamsError(
            f"each rank must have a GPU. Got {torch.cuda.device_count()} GPUs for the numbers"
            f" {missing}. Take fewer ranks, or model.device=cpu."
        )
    wanted, free_of = needed(params), {i: torch.cuda.mem_get_info(i)[0] / GIB for i in ids}
    if full := {i: free for i, free in free_of.items() if free < wanted}:
        found = ", ".join(f"{free:.1f} on GPU {i}" for i, free in full.items())
        raise ParamsError(
            f"each GPU must have {wanted:.1f} GiB free. Got {found}. End what holds them"
            " (nvidia-smi shows it), or make the run smaller: calligrapher plan says how."
        )
    return ", ".join(
        f"GPU {i} {torch.cuda.get_device_name(i)} {free:.1f} GiB free"
        for i, free in free_of.items()
    )


def gpu_ids(params: RunParams, size: int) -> list[int]:
    """Return the numbers of the ranks' GPUs: those that the params choose, else the first."""
    return list(params.launch.gpu_ids or range(size))


def weights(params: RunParams, runs_dir: Path) -> str:
    """Say that all files of weights are there and whole, as far as their headers tell."""
    from safetensors import SafetensorError, safe_open

    from calligrapher.model.adapter_files import adapter_state, config_of

    found = model_files(params.model, runs_dir)
    tensors = 0
    for folder in (found.base, found.siglip):
        for index in sorted(folder.rglob("*.safetensors.index.json")):
            for name in sorted(set(json.loads(index.read_text())["weight_map"].values())):
                if not (index.parent / name).is_file():
                    raise CheckpointError(
                        f"{index} must find all its files. {name} is missing: copy it there."
                    )
        parts = sorted(folder.rglob("*.safetensors"))
        if not parts:
            raise CheckpointError(
                f"{folder} must hold *.safetensors. It holds none: name the folder of the weights."
            )
        for part in parts:
            try:
                with safe_open(part, framework="pt") as content:
                    tensors += len(list(content.keys()))
            except SafetensorError as error:
                raise CheckpointError(
                    f"{part} must be whole. Got {error}. Copy it again."
                ) from error
    if found.adapter is None:
        return f"{tensors} tensors of the base and SigLIP; a new adapter"
    state = adapter_state(found.adapter)
    return (
        f"{tensors} tensors of the base and SigLIP, {len(state)} of {found.adapter.name} with"
        f" {config_of(state).num_tokens} style tokens"
    )


def data(params: RunParams, runs_dir: Path) -> str:
    """Say that every case can be read and fits the model."""
    preflight(params, runs_dir / "data")
    return f"{params.data.train} and the canvas {params.model.width} x {params.model.height} fit"


def disk(params: RunParams, runs_dir: Path) -> str:
    """Say that the folder of runs can be written to and has room."""
    place = runs_dir.absolute()
    while not place.exists():
        place = place.parent
    if not place.is_dir() or not os.access(place, os.W_OK):
        raise ParamsError(f"runs_dir must be a folder to write to. Got {place}. Name another.")
    wanted, free = sum(work.disk(params).values()) / GIB, shutil.disk_usage(place).free / GIB
    if wanted > free:
        raise ParamsError(
            f"{place} must have {wanted:.1f} GiB free. Got {free:.1f}. Name another runs_dir, or"
            " keep fewer rounds (retention.keep_last, keep_every)."
        )
    return f"{wanted:.2f} GiB needed, {free:.1f} GiB free in {place}"


def rewards(params: RunParams, size: int) -> str:
    """Say that the reward servers answer and measure what is weighed, or that some will start."""
    reward = params.reward
    if reward.disable_reward_model:
        return "switched off (reward.disable_reward_model)"
    check_places(params)
    weighed = ", ".join(reward.component_weights)
    if servers := named_servers(params, size):
        return f"{len(servers)} servers measure {weighed}"
    by_own = {"vlm_score": reward.vlm is not None, "style_score": True}
    if lacks := [name for name in reward.component_weights if not by_own.get(name, True)]:
        raise ParamsError(
            f"the run's own server must measure {lacks[0]}. Set reward.vlm to a model's folder, its"
            " weight to 0, or name servers in reward.server_urls."
        )
    where = (
        f"GPUs {params.launch.reward_gpu_ids}" if params.launch.reward_gpu_ids else "a free port"
    )
    return f"the run starts its own on {where}, for {weighed}"


def ports() -> str:
    """Say that a port can be opened here, as ranks and servers of a run do.

    Whether those of `launch.reward_gpu_ids` are free is asked with the reward servers.
    """
    try:
        socket.create_server(("127.0.0.1", 0)).close()
    except OSError as error:
        raise CalligrapherError(
            f"a port of 127.0.0.1 must be free. Got: {error.strerror}."
        ) from error
    return "a free one can be opened"
