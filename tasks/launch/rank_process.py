"""What a rank runs: `python -m tasks.launch.rank_process`, started by its parent.

It joins the group, then does one stage call after the other until its parent hangs up. It imports
neither Prefect nor MLflow, and of a run it knows the paths of the call alone.
"""

import contextlib
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from calligrapher.threads import wait_asleep
from tasks.launch.channel import Channel, Invitation, Message
from tasks.launch.failures import describe
from tasks.launch.pulse import Pulse

if TYPE_CHECKING:
    from calligrapher.ranks import Ranks
    from tasks.resources.resources import Resources

logger = logging.getLogger("tasks.launch")  # not by `__name__`, which is that of the program
INVITATION = "CALLIGRAPHER_RANK"
LOG = "CALLIGRAPHER_RANK_LOG"
_BEAT_S = 1.0
_COLLECTIVE_PATIENCE = 10.0
"""Times `launch.timeout_s`: others may have a shard more to sample. The parent knows of a rank that
hangs much sooner; this is for what it cannot see, as a GPU that never ends a kernel."""


class RankProgress:
    """A stage's progress, sent to the parent, which shows that of all ranks in one line."""

    def __init__(
        self, send: Callable[[Message], None], label: str, total: int, unit: str, *, done: int = 0
    ) -> None:
        self._send = send
        send({"bar": {"label": label, "total": total, "unit": unit, "done": done}})

    def advance(self, count: int = 1, **values: float) -> None:
        """Count `count` more as done and show `values`."""
        self._send({"advance": count, "values": {key: float(v) for key, v in values.items()}})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        pass


class RankServer:
    """Does the calls that come over `channel` as rank `rank` of the group.

    hung_up: called when the parent is gone, from a thread of its own.
    """

    def __init__(self, channel: Channel, rank: int, *, hung_up: Callable[[], None]) -> None:
        self.channel, self.rank, self._hung_up = channel, rank, hung_up
        self._calls: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._servers: queue.SimpleQueue[list[str]] = queue.SimpleQueue()
        self._at_work = threading.Event()
        self._pulse: Pulse | None = None
        self._resources: Resources | None = None

    def serve(self) -> None:
        """Answer until the parent says that it is enough, or an error ended this rank's part."""
        self._pulse = Pulse()
        for work in (self._listen, self._beat):
            threading.Thread(target=work, name=f"rank-{work.__name__}", daemon=True).start()
        try:
            setup = self._calls.get()["setup"]
            self._at_work.set()
            with joined(setup, self.rank) as ranks:
                self._work(setup, ranks)
        except Exception as error:
            self._tell(error)

    def _work(self, setup: dict[str, Any], ranks: "Ranks") -> None:
        try:
            resources = resources_of_rank(setup, ranks, self.channel.send, self._ask_servers)
            self._resources = resources
            self.channel.send({"ready": True})
            self._at_work.clear()
            while "end" not in (message := self._calls.get()):
                self._do(message, resources)
        except Exception as error:  # told here: leaving the group may take long
            self._tell(error)

    def _do(self, message: Message, resources: "Resources") -> None:
        from tasks.artifacts.artifact import Artifact
        from tasks.launch.calls import StageAnswer, StageCall
        from tasks.launch.in_process import InProcess
        from tasks.launch.rank_check import check_rank

        if "committed" in message:
            resources.mark_loaded(Artifact.load(Path(message["committed"])))
            return
        self._at_work.set()
        if "check" in message:
            answer = StageAnswer(check_rank(resources))
        else:
            call = StageCall.from_json(message["call"])
            logger.info("%s", call.name)
            answer = InProcess(resources).run(call, Path(message["out"]))
        self._at_work.clear()
        self.channel.send({"answer": answer.meta, "cost": answer.cost})

    def _tell(self, error: Exception) -> None:
        logger.exception("this rank's part ended")
        with contextlib.suppress(OSError):
            self.channel.send({"error": describe(error)})
        self._at_work.clear()
        while "end" not in self._calls.get():  # the parent ends this process
            pass

    def _listen(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                message = self.channel.receive()
                if "servers" in message:
                    self._servers.put(message["servers"])
                else:
                    self._calls.put(message)
        self._hung_up()

    def _beat(self) -> None:
        """Give a sign of life while at work; an idle parent listens to nobody."""
        assert self._pulse is not None
        with contextlib.suppress(OSError):
            while True:
                self._at_work.wait()
                # Waiting for a reward server has a limit of its own.
                moves = self._pulse.has_moved() or self._asks_for_rewards()
                self.channel.send({"alive": True, "moves": moves, "at": self._pulse.place()})
                time.sleep(_BEAT_S)

    def _asks_for_rewards(self) -> bool:
        return self._resources is not None and self._resources.scorer.is_asking

    def _ask_servers(self) -> list[str]:
        """Return the addresses of the reward servers; the parent starts them if they are its."""
        self.channel.send({"servers?": True})
        return self._servers.get()


@contextlib.contextmanager
def joined(setup: dict[str, Any], rank: int):
    """Join the process group that `setup` describes until the block ends.

    It has `size` ranks from `first` on, which count from 0 among themselves.
    """
    import torch
    from torch.distributed import PrefixStore, TCPStore

    from calligrapher.ranks import Ranks

    device = torch.device("cpu")
    if setup["device"] != "cpu" and torch.cuda.is_available():
        local = int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count()
        device = torch.device("cuda", local)
        torch.cuda.set_device(device)
    timeout_s = _COLLECTIVE_PATIENCE * setup["timeout_s"]
    host, port = setup["store"]
    first, size = setup["first"], setup["size"]
    store = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s))
    store = PrefixStore(f"from-{first}", store)
    with Ranks.join(rank - first, size, store, device=device, timeout_s=timeout_s) as ranks:
        yield ranks


def resources_of_rank(
    setup: dict[str, Any],
    ranks: "Ranks",
    send: Callable[[Message], None],
    servers: Callable[[], list[str]],
) -> "Resources":
    """Return what this rank's stages work with; nothing is loaded yet."""
    import torch

    from calligrapher.data.canvas import Canvas
    from tasks.artifacts.layout import RunsDir
    from tasks.params.run_params import RunParams
    from tasks.resources.cases import Cases
    from tasks.resources.resources import Resources
    from tasks.resources.rewards import RewardScorer
    from tasks.weights.model_files import model_files

    params = RunParams.model_validate_json(setup["params"])
    m = params.model
    if m.device in ("auto", "cuda") and torch.cuda.is_available():
        device = f"cuda:{torch.cuda.current_device()}"
        params = params.model_copy(update={"model": m.model_copy(update={"device": device})})
    runs = RunsDir(Path(setup["runs_dir"]))
    files, cases = model_files(params.model, runs.path), Cases(params, runs.data)
    vars(files)["digest"] = setup["model_digest"]  # hashed once, by the parent
    canvas = Canvas(m.width, m.height, m.reference_context)
    scorer = RewardScorer(params.reward, servers, canvas, rank=setup["first"] + ranks.rank)

    def progress(label: str, total: int, unit: str, *, done: int = 0) -> RankProgress:
        return RankProgress(send, label, total, unit, done=done)

    return Resources(
        params,
        files,
        cases,
        scorer,
        progress=progress,
        ranks=ranks,
        strategy=params.launch.strategy,
    )


class _ToParent(logging.Handler):
    """Sends warnings to the parent, whose terminal shows them."""

    def __init__(self, send: Callable[[Message], None]) -> None:
        super().__init__(logging.WARNING)
        self._to = send

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(OSError):
            self._to({"log": [record.levelno, record.name, record.getMessage()]})


def main() -> int:
    """Be the rank that the environment variable of the invitation names."""
    log = os.environ.get(LOG)
    if log:
        write_to(Path(log))
    wait_asleep()
    return serve(Invitation.from_json(os.environ[INVITATION]))


def serve(invitation: Invitation, *, status_without_parent: int = 1) -> int:
    """Accept `invitation` and do what the parent asks for until it says that it is enough.

    status_without_parent: with which this process ends where the parent does not say so, but is
    gone.
    """
    os.environ["TQDM_DISABLE"] = "1"  # the bars of libraries: nobody watches a log
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(name)s: %(message)s", force=True)
    channel = invitation.accept()
    for name in ("calligrapher", "tasks", "reward_server"):
        logging.getLogger(name).addHandler(_ToParent(channel.send))
    for noisy in ("diffusers", "transformers"):
        logging.getLogger(noisy).setLevel(logging.WARNING)

    def hung_up() -> None:
        sys.stderr.write("The parent is gone.\n")
        os._exit(status_without_parent)  # whatever the other threads wait for

    RankServer(channel, invitation.rank, hung_up=hung_up).serve()
    return 0


def write_to(log: Path) -> None:
    """Let all that this process and its libraries print be appended to `log`."""
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for stream in (1, 2):
        os.dup2(file, stream)
    os.close(file)
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)


if __name__ == "__main__":
    sys.exit(main())
