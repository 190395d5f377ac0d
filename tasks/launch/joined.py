"""Ranks that the user's own launcher started: torchrun, accelerate launch, srun.

Rank 0 is the parent and does its share in a thread; the other processes call `serve_parent`.
"""

import os
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

from tasks.launch.channel import Invitation, Switchboard
from tasks.launch.places import Launched

_MEETING_S = 1800.0  # rank 0 looks at every picture of the data before it invites the others


class Joined:
    """The processes that are there; they end with this one."""

    replaces = 0

    def __init__(self, launched: Launched) -> None:
        self._launched = launched
        self.host, self.everywhere = launched.host, not launched.one_machine
        self._rank_0: threading.Thread | None = None
        self._store: Any = None

    def start(self, invitations: list[Invitation], switchboard: Switchboard) -> None:
        from tasks.launch.rank_process import RankServer

        channel = switchboard.local(0)
        server = RankServer(channel, 0, hung_up=lambda: None)
        self._rank_0 = threading.Thread(target=server.serve, name="rank-0", daemon=True)
        self._rank_0.start()
        self._store = meeting(self._launched)
        for invitation in invitations[1:]:
            self._store.set(_key(invitation.rank), invitation.to_json())

    def ended(self, rank: int) -> str | None:
        return None

    def stop(self, patience_s: float) -> None:
        if self._rank_0 is not None:
            self._rank_0.join(patience_s)

    def close(self) -> None:
        pass


def serve_parent(launched: Launched, log: Path) -> int:
    """Be the rank that `launched` says, for the parent that is rank 0; return when it is done.

    What is printed goes to `log`. The status is 0 also where the parent is gone: its own status is
    the run's, and a launcher would take another one for the cause.
    """
    from tasks.launch.rank_process import serve, write_to

    write_to(log)
    text = meeting(launched).get(_key(launched.rank)).decode()
    return serve(Invitation.from_json(text), status_without_parent=0)


def meeting(launched: Launched) -> Any:
    """Return the store in which rank 0 leaves the invitations: the launcher's, or rank 0's own."""
    from torch.distributed import PrefixStore, TCPStore

    of_agent = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    store = TCPStore(
        launched.address,
        launched.port,
        is_master=launched.rank == 0 and not of_agent,
        wait_for_workers=False,
        timeout=timedelta(seconds=_MEETING_S),
    )
    attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return PrefixStore(f"calligrapher/{attempt}", store)


def _key(rank: int) -> str:
    return f"invitation/{rank}"
