"""Ranks as actors of Ray, on one machine or several.

Ray finds the places, starts the processes and sees machines leave; what the ranks do and how they
talk to their parent is the same as everywhere. All machines must see the folder of the runs.
"""

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

from calligrapher.errors import ParamsError, RankError
from tasks.launch.channel import Invitation, Switchboard
from tasks.launch.failures import log_of
from tasks.launch.places import threads_of_a_rank

_ATTEMPTS = 3
_PROBE_S = 5.0


class RayActors:
    """The backend `ray`: an actor for each rank, in one placement group.

    Connects to the Ray that RAY_ADDRESS names, else starts a local one, which ends with the run.
    wait_s: how long Ray may look for places, at the start and after a machine has left.
    """

    replaces = _ATTEMPTS

    def __init__(self, logs: Path, *, device: str, wait_s: float) -> None:
        ray = _ray()
        self._logs, self._device, self._wait_s = logs, device, wait_s
        address = os.environ.get("RAY_ADDRESS")
        if not ray.is_initialized():
            ray.init(
                address=address or "local",
                log_to_driver=False,
                include_dashboard=False,
                configure_logging=False,
            )
        self.everywhere = bool(address)
        self.host = ray.util.get_node_ip_address() if address else "127.0.0.1"
        self._group: Any = None
        self._actors: dict[int, Any] = {}
        self._done: dict[int, Any] = {}

    def start(self, invitations: list[Invitation], switchboard: Switchboard) -> None:
        ray = _ray()
        size = len(invitations)
        needs = {"CPU": 1.0} | ({"GPU": 1.0} if self._takes_gpus() else {})
        nodes = [node for node in ray.nodes() if node["Alive"]]
        spread = 1 < size <= len(nodes)
        self._group = ray.util.placement_group(
            [needs] * size, strategy="STRICT_SPREAD" if spread else "PACK"
        )
        if not self._group.wait(self._wait_s):
            there = {key: ray.cluster_resources().get(key, 0) for key in needs}
            raise RankError(
                f"Ray must have places for {size} ranks with {needs} each. Got {there} on"
                f" {len(nodes)} machines after {self._wait_s:g} s (launch.wait_s). Add machines, or"
                " lower launch.num_processes."
            )
        strategy = ray.util.scheduling_strategies.PlacementGroupSchedulingStrategy
        for invitation in invitations:
            rank = invitation.rank
            environment = {
                "OMP_NUM_THREADS": str(threads_of_a_rank(-(-size // len(nodes)))),
                "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
            }
            actor = ray.remote(_Rank).options(
                num_cpus=needs["CPU"],
                num_gpus=needs.get("GPU", 0),
                max_concurrency=2,
                scheduling_strategy=strategy(self._group, placement_group_bundle_index=rank),
                runtime_env={"env_vars": environment},
            )
            self._actors[rank] = actor.remote()
            log = str(log_of(self._logs, rank).absolute())
            self._done[rank] = self._actors[rank].serve.remote(invitation.to_json(), log)

    def ended(self, rank: int) -> str | None:
        ray = _ray()
        ready, _ = ray.wait([self._done[rank]], timeout=0)
        if not ready:
            return None
        try:
            ray.get(ready[0])
        except ray.exceptions.RayError as error:
            return f"was lost by Ray ({type(error).__name__}: {_first_sentence(error)})"
        return "ended"

    def stop(self, patience_s: float) -> None:
        ray = _ray()
        if self._done:
            ray.wait(list(self._done.values()), num_returns=len(self._done), timeout=patience_s)
        for actor in self._actors.values():
            with contextlib.suppress(ray.exceptions.RayError):
                ray.kill(actor)
        if self._done:
            ray.wait(list(self._done.values()), num_returns=len(self._done), timeout=_PROBE_S)
        self._actors, self._done = {}, {}
        if self._group is not None:
            with contextlib.suppress(ray.exceptions.RayError):
                ray.util.remove_placement_group(self._group)
            self._group = None

    def close(self) -> None:
        """Leave Ray; a local one ends."""
        _ray().shutdown()

    def _takes_gpus(self) -> bool:
        return self._device != "cpu" and _ray().cluster_resources().get("GPU", 0) > 0


class _Rank:
    """The actor: its method is the rank's whole life."""

    def serve(self, invitation: str, log: str) -> None:
        from tasks.launch.rank_process import serve, write_to

        write_to(Path(log))
        serve(Invitation.from_json(invitation))


def _ray() -> Any:
    try:
        import ray
        import ray.util.scheduling_strategies
    except ImportError:
        raise ParamsError(
            "launch.backend ray needs the extra of that name. Install it (`pip install"
            " 'calligrapher[ray]'`), or choose accelerate."
        ) from None
    return ray


def _first_sentence(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else ""
