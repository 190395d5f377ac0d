"""The launcher of a run in several processes: one call goes to all ranks, one answer comes back.

The first ranks may be set apart to sample: a rollout that was begun goes on in them while the
others do what comes before it. The parent, which keeps lock, tracker and commits, holds no model. A
rank that dies, hangs or raises ends the group; what it has finished stays in the work folder, and
the next start goes on from there.
"""

import contextlib
import logging
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import torch
from torch.distributed import TCPStore

from calligrapher.errors import RankError, RankLostError
from calligrapher.threads import compute_in
from tasks.launch.calls import StageAnswer, StageCall
from tasks.launch.channel import Invitation, Message, Switchboard
from tasks.launch.dispatch import do
from tasks.launch.failures import log_of, restored, tail
from tasks.launch.places import threads_of_a_rank
from tasks.pipeline import SAMPLED, STAGES, stage_of
from tasks.progress import Progress
from tasks.resources.resources import Resources

logger = logging.getLogger(__name__)

_POLL_S = 0.2
_GRACE_S = 2.0  # after the first failure: whoever caused it may be heard of a little later
_END_S = 5.0  # for ranks that are told to end
_IMPORTS_S = 120.0
_ARRIVAL_S = 600.0  # until all have come, where nothing else limits it


class Backend(Protocol):
    """Starts the processes of a group and knows how they ended.

    host: address of this process for them. everywhere: they may be on other machines.
    """

    host: str
    everywhere: bool
    replaces: int
    """How many times in a row the group may be started anew for a call that lost a rank."""

    def start(self, invitations: list[Invitation], switchboard: Switchboard) -> None:
        """Start a process for each; raises RankError where there is no place for one."""

    def ended(self, rank: int) -> str | None:
        """Return how the process of `rank` ended (`was killed by SIGKILL`); None while it runs."""

    def stop(self, patience_s: float) -> None:
        """Return when no process is left; those that do not end in time are killed."""

    def close(self) -> None:
        """Give back what outlives the processes."""


class RankGroup:
    """Does the stages of a run in `size` ranks, which start with the first stage that needs them.

    resources: the parent's own, whose model is never loaded. samplers: so many ranks do rollouts
    and scores alone, and the others all else; 0: all do all. servers: the addresses of the reward
    servers, asked for when a rank first scores. logs: folder with the log of each rank.
    """

    def __init__(
        self,
        resources: Resources,
        backend: Backend,
        *,
        size: int,
        samplers: int = 0,
        servers: Callable[[], list[str]],
        runs_dir: Path,
        logs: Path,
    ) -> None:
        self.resources, self.backend, self.size = resources, backend, size
        self.samplers, self.logs = samplers, logs
        self._servers, self._runs_dir = servers, runs_dir
        self._timeout_s = resources.params.launch.timeout_s
        self._switchboard: Switchboard | None = None
        self._store: Any = None
        self._begun: dict[str, _Asked] = {}
        self._at_work: dict[int, _Asked] = {}
        self._heard: dict[int, float] = {}
        self._moved: dict[int, float] = {}
        self._places: dict[int, str] = {}
        self._polled = 0.0
        self._threads = torch.get_num_threads()
        compute_in(size, threads_of_a_rank(size))  # artifacts note what made them

    def run(self, call: StageCall, out: Path) -> StageAnswer:
        """Do `call` with its ranks; meta is the first one's, each cost that of the rank with the
        most.

        What `begin` began is waited for. Raises what a rank raised, or RankError.
        """
        if STAGES[stage_of(call.name)].done_by != "ranks":
            return StageAnswer(do(call, self.resources, out))
        for left in reversed(range(self.backend.replaces + 1)):
            try:
                return self._run(call, out)
            except RankLostError as error:
                if not left:
                    raise
                logger.warning("%s\nThe ranks are started again.", error)
        raise AssertionError("the last attempt returns or raises")

    def begin(self, call: StageCall, out: Path) -> None:
        """Let the ranks that do `call` begin with it while others are asked for something else."""
        with self._none_left_on_error():
            self._begun[call.name] = self._put(call.name, *self._of(call, out))

    def committed(self, path: Path) -> None:
        """Tell the ranks that made them that files of theirs are the artifact in `path` now."""
        if self._switchboard is not None:
            self._send({"committed": str(path.absolute())}, self._ranks_of(path.name))

    def close(self) -> None:
        """Let the ranks end; returns when no process is left. What was begun is given up."""
        if self._switchboard is not None:
            self._send({"end": True}, range(self.size))
            self._stop(0.0 if self._begun else _END_S)
        self.backend.close()
        compute_in(1, self._threads)

    def check(self) -> list[dict[str, float]]:
        """Return what each rank finds when it does a case: `rank_check.check_rank`.

        Raises what a rank raised, or RankError.
        """
        answers = self._ask("check", {"check": True}, range(self.size))
        return [message["answer"] for message in answers]

    def _ranks_of(self, name: str) -> range:
        """Return the ranks that make the artifact `name`."""
        if not self.samplers:
            return range(self.size)
        samples = stage_of(name) in SAMPLED
        return range(self.samplers) if samples else range(self.samplers, self.size)

    def _of(self, call: StageCall, out: Path) -> tuple[Message, range]:
        message = {"call": _absolute(call).to_json(), "out": str(out.absolute())}
        return message, self._ranks_of(call.name)

    def _run(self, call: StageCall, out: Path) -> StageAnswer:
        answers = self._ask(call.name, *self._of(call, out))
        costs = [answer["cost"] for answer in answers]
        cost = {key: max(c.get(key, 0.0) for c in costs) for key in {k for c in costs for k in c}}
        return StageAnswer(answers[0]["answer"], cost)

    def _ask(self, stage: str, message: Message, ranks: range) -> list[Message]:
        """Return the answer of each of `ranks` to `message`; where there is none, no rank is
        left."""
        with self._none_left_on_error(), ExitStack() as stack:
            asked = self._begun.get(stage) or self._put(stage, message, ranks)
            bar = _Bar(self.resources.progress, stack, ranks)
            while True:
                while asked.progress:
                    bar.tell(*asked.progress.pop(0))
                if len(asked.answers) == len(ranks):
                    break
                self._hear(stage)
        self._begun.pop(stage, None)
        return [asked.answers[rank] for rank in ranks]

    def _put(self, stage: str, message: Message, ranks: range) -> "_Asked":
        """Send `message` to `ranks`, which are idle, and say what they are at."""
        self._start(stage)
        asked = self._expect(stage, ranks, self._timeout_s)
        self._send(message, ranks)
        return asked

    def _expect(self, stage: str, ranks: range, timeout_s: float) -> "_Asked":
        asked = _Asked(stage, ranks, timeout_s)
        self._at_work |= dict.fromkeys(ranks, asked)
        self._heard |= dict.fromkeys(ranks, time.monotonic())
        self._moved |= dict.fromkeys(ranks, time.monotonic())
        self._places |= dict.fromkeys(ranks, "an unknown place")
        return asked

    @contextlib.contextmanager
    def _none_left_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:  # also Ctrl-C: nobody must go on with a stage that has no parent
            self._stop(0.0)
            raise

    def _start(self, stage: str) -> None:
        """Start the ranks unless they are there, and wait until all have joined the group."""
        if self._switchboard is not None:
            return
        self._store = TCPStore(
            self.backend.host,
            0,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=_ARRIVAL_S),
        )
        switchboard = Switchboard(self.backend.host, everywhere=self.backend.everywhere)
        self._switchboard = switchboard
        invitations = [switchboard.invitation(rank) for rank in range(self.size)]
        self.backend.start(invitations, switchboard)
        self._await_arrival(switchboard)
        params = self.resources.params
        setup = {
            "params": params.model_dump_json(),
            "runs_dir": str(self._runs_dir.absolute()),
            "model_digest": self.resources.files.digest,
            "store": [self.backend.host, self._store.port],
            "device": params.model.device,
            "timeout_s": self._timeout_s,
        }
        # While modules are imported a process may say nothing for long.
        asked = self._expect(stage, range(self.size), max(self._timeout_s, _IMPORTS_S))
        for ranks in dict.fromkeys(self._ranks_of(name) for name in STAGES):
            group = {"first": ranks.start, "size": len(ranks)}
            self._send({"setup": setup | group}, ranks)
        while len(asked.answers) < self.size:
            self._hear(stage)
        hosts = sorted(set(switchboard.hosts.values()))
        logger.info("%d ranks on %s; their logs: %s", self.size, ", ".join(hosts), self.logs)

    def _await_arrival(self, switchboard: Switchboard) -> None:
        stop_at = time.monotonic() + _ARRIVAL_S
        while missing := [rank for rank in range(self.size) if rank not in switchboard.channels]:
            for rank in missing:
                if (how := self.backend.ended(rank)) is not None:
                    raise RankError(f"Rank {rank} must start. It {how}.\n{tail(self._log(rank))}")
            if time.monotonic() > stop_at:
                raise RankError(
                    f"All {self.size} ranks must start within {_ARRIVAL_S:g} s. Missing:"
                    f" {', '.join(map(str, missing))}.\n{tail(self._log(missing[0]))}"
                )
            time.sleep(0.02)

    def _hear(self, stage: str) -> None:
        """Note what ranks have said while `stage` is waited for and all are alive; raise what ended
        the first that is not."""
        for rank, message in self._messages(_POLL_S):
            if message is None or "error" in message:
                raise self._cause(rank, message, stage)
            if "servers?" in message:
                self._send({"servers": self._servers()}, [rank])
            elif "log" in message:
                level, name, text = message["log"]
                logging.getLogger(name).log(level, "rank %d: %s", rank, text)
            elif not {"answer", "ready"}.isdisjoint(message):
                self._at_work.pop(rank).answers[rank] = message
            elif "alive" not in message:
                self._at_work[rank].progress.append((rank, message))
        self._refuse_silence()
        for asked in dict.fromkeys(self._at_work.values()):
            self._refuse_standstill(asked)

    def _messages(self, timeout_s: float) -> Iterator[tuple[int, Message | None]]:
        assert self._switchboard is not None
        for rank, message in self._switchboard.messages(timeout_s):
            self._heard[rank] = time.monotonic()
            if message is not None:
                self._places[rank] = message.get("at", self._places[rank])
                if message.get("moves", True):
                    self._moved[rank] = self._heard[rank]
            yield rank, message

    def _refuse_silence(self) -> None:
        now, before = time.monotonic(), self._polled
        self._polled = now
        if now - before > self._timeout_s / 4:
            # This process was elsewhere (it started servers, or stood still): what the ranks sent
            # meanwhile is to be read first.
            self._heard = dict.fromkeys(self._heard, now)
            self._moved = dict.fromkeys(self._moved, now)
        for rank, asked in self._at_work.items():
            if now - self._heard[rank] > asked.timeout_s:
                raise RankLostError(
                    f"{self._name(rank)} has given no sign of life for {asked.timeout_s:g} s"
                    f" (launch.timeout_s) in {asked.stage}: its process stands still.\n"
                    f"{tail(self._log(rank))}\nThe same command goes on from here."
                )

    def _refuse_standstill(self, asked: "_Asked") -> None:
        """Raise where all ranks are alive and none computes: one hangs, the others wait for it."""
        if time.monotonic() - max(self._moved[rank] for rank in asked.ranks) <= asked.timeout_s:
            return
        places = "\n".join(
            f"{self._name(rank)} is in {self._places[rank]}; its log: {self._log(rank)}"
            for rank in asked.ranks
        )
        raise RankLostError(
            f"The ranks are alive, but none has computed anything for {asked.timeout_s:g} s"
            f" (launch.timeout_s) in {asked.stage}: one hangs, and the others wait for it.\n"
            f"{places}\n"
            "The same command goes on from here; raise launch.timeout_s if a disk is that slow."
        )

    def _cause(self, rank: int, message: Message | None, stage: str) -> Exception:
        """Return what ended the group; `message` of `rank` was the first that was heard of it.

        stage: what was waited for; a rank may die while it has nothing to do.

        A rank that dies makes the collectives of the others fail, and they may be heard first.
        """
        events = [(rank, message)]
        stop_at = time.monotonic() + _GRACE_S
        while all(m is not None and m["error"]["lost"] for _, m in events):
            if (left := stop_at - time.monotonic()) <= 0:
                break
            for other, later in self._messages(min(left, _POLL_S)):
                if later is None or "error" in later:
                    events.append((other, later))
        own = [(r, m) for r, m in events if m is None or not m["error"]["lost"]]
        rank, message = own[0] if own else min(events, key=lambda event: event[0])
        stage = self._at_work[rank].stage if rank in self._at_work else stage
        if message is None:
            return self._death(rank, stage)
        where = f"({self._name(rank)}, in {stage}; its log: {self._log(rank)})"
        return restored(message["error"], where)

    def _death(self, rank: int, stage: str) -> RankLostError:
        stop_at = time.monotonic() + _GRACE_S
        while (how := self.backend.ended(rank)) is None and time.monotonic() < stop_at:
            time.sleep(0.02)
        how = how or "closed its connection"
        memory = " If nobody killed it, the machine may have had too little memory (`dmesg`)."
        return RankLostError(
            f"{self._name(rank)} {how} in {stage}.{memory if 'SIGKILL' in how else ''}\n"
            f"{tail(self._log(rank))}\nThe same command goes on from here."
        )

    def _name(self, rank: int) -> str:
        assert self._switchboard is not None
        host = self._switchboard.hosts.get(rank, socket.gethostname())
        return f"Rank {rank} of {self.size} on {host}"

    def _log(self, rank: int) -> Path:
        return log_of(self.logs, rank)

    def _send(self, message: Message, ranks: Sequence[int]) -> None:
        """Send to `ranks`; who is gone is heard of when the answers are awaited."""
        assert self._switchboard is not None
        for rank, channel in list(self._switchboard.channels.items()):
            if rank in ranks:
                with contextlib.suppress(OSError):
                    channel.send(message)

    def _stop(self, patience_s: float) -> None:
        if self._switchboard is None:
            return
        try:
            self.backend.stop(patience_s)
        finally:
            self._switchboard.close()
            self._switchboard = self._store = None
            self._begun, self._at_work = {}, {}


class _Asked:
    """What `ranks` were asked for, and what they have said of it so far.

    timeout_s: of a silence.
    """

    def __init__(self, stage: str, ranks: range, timeout_s: float) -> None:
        self.stage, self.ranks, self.timeout_s = stage, ranks, timeout_s
        self.answers: dict[int, Message] = {}
        self.progress: list[tuple[int, Message]] = []


class _Bar:
    """One progress line for `ranks`: images and shards add up, steps are the same on each."""

    def __init__(self, progress: Callable[..., Progress], stack: ExitStack, ranks: range) -> None:
        self._progress, self._stack, self._ranks = progress, stack, ranks
        self._begun: dict[int, Message] = {}
        self._early: list[Message] = []
        self._bar: Progress | None = None

    def tell(self, rank: int, message: Message) -> None:
        """Show what `rank` says of its progress, once all have said how much there is to do."""
        if "bar" in message:
            self._begun[rank] = message["bar"]
            if len(self._begun) == len(self._ranks):
                self._open()
        elif self._counts(rank):
            self._early.append(message)
        while self._bar is not None and self._early:
            early = self._early.pop(0)
            self._bar.advance(early["advance"], **early["values"])

    def _open(self) -> None:
        counted = [bar for rank, bar in self._begun.items() if self._counts(rank)]
        sums = {key: sum(bar[key] for bar in counted) for key in ("total", "done")}
        self._bar = self._stack.enter_context(
            self._progress(**(self._begun[self._ranks[0]] | sums))
        )

    def _counts(self, rank: int) -> bool:
        return rank == self._ranks[0] or self._begun[rank]["unit"] != "step"


def _absolute(call: StageCall) -> StageCall:
    """Return `call` with paths that mean the same in every process of the machine."""
    return replace(
        call,
        inputs={key: path.absolute() for key, path in call.inputs.items()},
        ahead=call.ahead and call.ahead.absolute(),
        earlier=call.earlier and call.earlier.absolute(),
    )
