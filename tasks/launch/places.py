"""Where a run's ranks and their reward servers are, checked before anything is started.

One process; processes started by the run; or processes that the user's own launcher started
(torchrun, accelerate launch, srun), of which rank 0 is the parent.
"""

import os
import socket
from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Self
from urllib.parse import urlsplit

from calligrapher.errors import ParamsError, RewardError
from reward_server.client import RewardUnavailableError, server_urls
from tasks.params.run_params import RunParams
from tasks.resources.rewards import check_servers

DEFAULT_HOST, DEFAULT_PORT = "127.0.0.1", 8000
# Rank, number of ranks, rank on this machine: as torchrun and accelerate tell them, and Slurm.
_TORCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
_SLURM = ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID")


@dataclass(frozen=True)
class Launched:
    """What the user's launcher says of this process; address, port: where all can meet."""

    rank: int
    size: int
    local_rank: int
    address: str
    port: int

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> Self | None:
        """Return None where no launcher started this process, or it started only one.

        Raises ParamsError where Slurm started several and nobody said where they meet.
        """
        for names in (_TORCH, _SLURM):
            rank, size, local = (environment.get(name, "") for name in names)
            if not (rank.isdigit() and size.isdigit() and int(size) > 1):
                continue
            if names is _SLURM and "SLURM_STEP_NODELIST" not in environment:
                continue  # a batch script itself, not one of the tasks that srun starts
            address, port = environment.get("MASTER_ADDR"), environment.get("MASTER_PORT", "")
            if not address or not port.isdigit() or int(port) == 0:
                raise ParamsError(
                    "MASTER_ADDR and MASTER_PORT must say where the ranks meet. Got"
                    f" {address!r} and {port!r} for rank {rank} of {size}. Export the first host"
                    " of the job and a free port of it (docs/operations.md)."
                )
            return cls(int(rank), int(size), int(local or 0), address, int(port))
        return None

    @property
    def host(self) -> str:
        """Return the address at which the others reach rank 0."""
        return "127.0.0.1" if self.one_machine else self.address

    @property
    def one_machine(self) -> bool:
        """Whether the meeting place is loopback: then nobody comes from elsewhere."""
        try:
            return socket.gethostbyname(self.address).startswith("127.")
        except OSError:
            return False


def size_of(params: RunParams, launched: Launched | None) -> int:
    """Return the number of ranks of a run."""
    return params.launch.size if launched is None else launched.size


def named_servers(params: RunParams, size: int) -> list[str]:
    """Return the addresses of the reward servers that are there already; empty = the run's own.

    `reward.server_urls`, or one for each rank from `reward.server_host` and `server_port` on where
    one of them is given or GPUs are chosen. With `launch.reward_gpu_ids` they are the run's own.
    """
    reward, launch = params.reward, params.launch
    if reward.disable_reward_model or launch.reward_gpu_ids:
        return []
    if reward.server_urls:
        return list(reward.server_urls)
    if launch.gpu_ids or reward.server_host or reward.server_port:
        host, port = reward.server_host or DEFAULT_HOST, reward.server_port or DEFAULT_PORT
        return server_urls(f"[{host}]" if ":" in host else host, port, size)
    return []


def visible(gpu_ids: list[int], environment: Mapping[str, str]) -> str:
    """Return CUDA_VISIBLE_DEVICES for `gpu_ids`, which count what this process sees."""
    seen = environment.get("CUDA_VISIBLE_DEVICES")
    names = seen.split(",") if seen else None
    return ",".join(names[i] if names else str(i) for i in gpu_ids)


def threads_of_a_rank(size: int) -> int:
    """Return the threads of each of `size` ranks here: a share of the cores, or as it is said."""
    if said := os.environ.get("OMP_NUM_THREADS"):
        return int(said)
    return max(1, len(os.sched_getaffinity(0)) // size)


def check_places(params: RunParams, launched: Launched | None = None) -> None:
    """Raise ParamsError or RewardError where ranks or reward servers cannot be as they are asked.

    Asks each named server once. Loads nothing.
    """
    size, launch = size_of(params, launched), params.launch
    if launched is not None and (launch.size > 1 or launch.gpu_ids or launch.backend):
        raise ParamsError(
            "launch.gpu_ids, num_processes and backend must be left out under a launcher of your"
            f" own. Got {launch.size} ranks here, and WORLD_SIZE {size}. Leave out one of the two."
        )
    _gpus_are_there(params)
    _servers_suffice(params, size)
    servers = named_servers(params, size)
    if servers:
        try:
            _servers_answer(params, servers, size)
        except RewardError as error:
            if params.reward.server_urls:
                raise
            error.add_note(
                "Their addresses come from reward.server_host and reward.server_port, one for each"
                f" of {size} ranks. Start them with `calligrapher reward-server --gpu-ids ..."
                f" --port {params.reward.server_port or DEFAULT_PORT}`, or let the run do so:"
                " launch.reward_gpu_ids."
            )
            raise
    _ports_are_free(params)
    if launch.backend == "ray" and not (servers or params.reward.disable_reward_model):
        _ray_reaches_own_servers()


def _gpus_are_there(params: RunParams) -> None:
    launch = params.launch
    asked = {"gpu_ids": launch.gpu_ids, "reward_gpu_ids": launch.reward_gpu_ids}
    if not any(asked.values()) and launch.size == 1:
        return
    import torch

    there = torch.cuda.device_count()
    for key, ids in asked.items():
        if strange := [i for i in ids if i >= there]:
            seen = ", ".join(map(str, range(there))) or "none"
            raise ParamsError(
                f"launch.{key} must name GPUs of this machine. Got {strange[0]}; there are: {seen}."
                " On CPUs set launch.num_processes and leave the ids out."
            )
    if launch.gpu_ids and params.model.device == "cpu":
        raise ParamsError(
            f"model.device must be auto or cuda with launch.gpu_ids. Got cpu for {launch.gpu_ids}."
        )
    on_gpus = params.model.device != "cpu" and there > 0
    if launch.chosen_backend == "accelerate" and on_gpus and launch.size > there:
        raise ParamsError(
            f"launch.num_processes must be at most the number of GPUs, {there}: ranks cannot share"
            f" one. Got {launch.size}. Or set model.device=cpu."
        )


def _servers_suffice(params: RunParams, size: int) -> None:
    """Several ranks share a server only where that was asked for, or the server is a run's own."""
    given = len(params.reward.server_urls) or len(params.launch.reward_gpu_ids)
    if params.reward.disable_reward_model or params.launch.allow_fewer_servers or not given:
        return
    if given < size:
        key = "reward.server_urls" if params.reward.server_urls else "launch.reward_gpu_ids"
        raise ParamsError(
            f"{key} must name a reward server for each of {size} ranks. Got {given}: a server would"
            f" score for up to {ceil(size / given)} ranks, and scoring, which else goes on while"
            f" the next images are sampled, would take up to {ceil(size / given)} times as long."
            " Name more, or set launch.allow_fewer_servers=true."
        )


def _servers_answer(params: RunParams, servers: list[str], size: int) -> None:
    """Raise RewardError unless there is a reward server for each rank, and nothing else."""
    reward = params.reward.model_copy(update={"server_urls": servers})
    letters = params.compares_letters
    missing = []
    for url in servers if size > 1 else ():
        try:
            check_servers(reward.model_copy(update={"server_urls": [url]}), letters=letters)
        except RewardError as error:
            if isinstance(error.__cause__, RewardUnavailableError) and not _listens(url):
                missing.append(url)
            else:
                raise
    if missing and len(servers) - len(missing) < size and not params.launch.allow_fewer_servers:
        raise RewardError(
            f"A reward server must answer for each of {size} ranks. Nothing listens at"
            f" {', '.join(missing)}. Start what is missing, or set launch.allow_fewer_servers=true:"
            " the others then score for the ranks without one, and take longer."
        )
    check_servers(reward, letters=letters)  # also that they are set up alike


def _listens(url: str) -> bool:
    """Whether anything takes connections at `url`."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        socket.create_connection((parts.hostname or "", port), 2.0).close()
    except OSError:
        return False
    return True


def _ports_are_free(params: RunParams) -> None:
    """Raise RewardError where somebody listens on a port of the servers that the run will start."""
    first = params.reward.server_port or DEFAULT_PORT
    for number, gpu in enumerate(params.launch.reward_gpu_ids):
        if _listens(f"http://{DEFAULT_HOST}:{first + number}"):
            raise RewardError(
                f"Port {first + number} must be free for the reward server of GPU {gpu}"
                " (launch.reward_gpu_ids). Something listens there: stop it, set"
                " reward.server_port to another first port, or, if they are your reward servers,"
                " leave launch.reward_gpu_ids out."
            )


def _ray_reaches_own_servers() -> None:
    if os.environ.get("RAY_ADDRESS", "local") not in ("", "local"):
        raise ParamsError(
            "reward.server_urls, or reward.server_host, must name reward servers with"
            " launch.backend ray on several machines (RAY_ADDRESS is set). Got none: the run's own"
            " server would be reached from this machine alone."
        )
