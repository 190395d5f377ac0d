"""How parent and ranks talk: JSON messages over one authenticated connection for each rank.

Messages go out at once. By default TCP holds a small one back until the one before is acknowledged,
and the other end waits 40 ms before it acknowledges what it has no answer to: progress, and then
the answer of a short stage, would take so long.

The end of a connection is the end of a process, and is seen at once: a parent knows that a rank
died, and a rank that its parent did.
"""

import contextlib
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, Listener, Pipe, wait
from typing import Any, Self

Message = dict[str, Any]


@dataclass(frozen=True)
class Invitation:
    """What a process needs to know to become rank `rank`: where its parent listens, and the key."""

    host: str
    port: int
    key: str
    rank: int

    def to_json(self) -> str:
        """Return the invitation as JSON."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """Return what `to_json` wrote."""
        return cls(**json.loads(text))

    def accept(self) -> "Channel":
        """Connect to the parent."""
        channel = Channel(Client((self.host, self.port), authkey=bytes.fromhex(self.key)))
        channel.send({"hello": self.rank, "host": socket.gethostname()})
        return channel


class Channel:
    """One end of a connection. Any thread may send; one receives."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection
        _send_at_once(connection)
        self._lock = threading.Lock()

    def send(self, message: Message) -> None:
        """Raise OSError when the other end is gone."""
        with self._lock:
            self.connection.send_bytes(json.dumps(message).encode())

    def receive(self) -> Message:
        """Return the next message. Raises EOFError or OSError when the other end is gone."""
        return json.loads(self.connection.recv_bytes())

    def close(self) -> None:
        """End the connection; the other end sees it."""
        self.connection.close()


class Switchboard:
    """The parent's end: who has come so far, and their messages in the order in which they come."""

    def __init__(self, host: str, *, everywhere: bool = False) -> None:
        """Listen on a free port of `host`, or, with `everywhere`, of all addresses."""
        key = secrets.token_bytes(32)
        self._listener = Listener(("0.0.0.0" if everywhere else host, 0), backlog=1024, authkey=key)
        self._host, self._key = host, key.hex()
        self.channels: dict[int, Channel] = {}
        self.hosts: dict[int, str] = {}
        self._closing = threading.Event()
        threading.Thread(target=self._welcome, name="rank-welcome", daemon=True).start()

    def invitation(self, rank: int) -> Invitation:
        """Return the invitation of `rank`."""
        return Invitation(self._host, self._listener.address[1], self._key, rank)

    def local(self, rank: int) -> Channel:
        """Let a thread of this process be `rank`; return its end."""
        here, there = Pipe()
        self._enter(rank, socket.gethostname(), Channel(here))
        return Channel(there)

    def messages(self, timeout_s: float) -> Iterator[tuple[int, Message | None]]:
        """Yield (rank, message) for all that has come, waiting `timeout_s` for the first at most.

        The message None says that the rank is gone; it is heard of once.
        """
        ranks = {channel.connection: rank for rank, channel in self.channels.items()}
        if not ranks:
            time.sleep(timeout_s)
        for connection in wait(list(ranks), timeout_s):
            rank = ranks[connection]
            try:
                message = self.channels[rank].receive()
            except (EOFError, OSError):
                self.channels.pop(rank).close()
                yield rank, None
            else:
                yield rank, message

    def close(self) -> None:
        """Hang up."""
        self._closing.set()
        with contextlib.suppress(OSError):  # wakes `_welcome`
            socket.create_connection((self._host, self._listener.address[1]), 1.0).close()
        for channel in list(self.channels.values()):
            with contextlib.suppress(OSError):
                channel.close()

    def _welcome(self) -> None:
        with self._listener:
            while not self._closing.is_set():
                # A stranger's knock, or that of a rank which died on the doorstep, is not heard.
                with contextlib.suppress(AuthenticationError, EOFError, OSError, ValueError):
                    channel = Channel(self._listener.accept())
                    hello = channel.receive()
                    self._enter(int(hello["hello"]), str(hello["host"]), channel)

    def _enter(self, rank: int, host: str, channel: Channel) -> None:
        self.hosts[rank] = host
        self.channels[rank] = channel


def _send_at_once(connection: Connection) -> None:
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        if same.family != socket.AF_UNIX:
            same.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
