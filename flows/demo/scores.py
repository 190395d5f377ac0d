"""What the reward servers read in pictures of the page; a server that does not answer costs numbers
only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cached_property
from pathlib import Path

from PIL import Image

from calligrapher.data.case import Case
from calligrapher.data.images import load_mask, load_rgb
from reward_server.client import RewardClient, RewardClientError, RewardItem, RewardResult
from reward_server.components import NAMES
from reward_server.processes.launch import ServerStartError, local_server

DEADLINE_S = 30.0  # Longer than any answer takes; somebody waits in front of the page.


class Reader:
    """Scores pictures on the servers that `urls` gives; it is asked when there is something to
    score."""

    def __init__(self, urls: Callable[[], Sequence[str]], deadline_s: float = DEADLINE_S):
        self._urls, self._deadline_s = urls, deadline_s

    @cached_property
    def client(self) -> RewardClient:
        return RewardClient(
            self._urls(),
            request_timeout_s=self._deadline_s,
            deadline_s=self._deadline_s,
            max_pause_s=2.0,
        )

    def read(self, pictures: Sequence[Image.Image], case: Case) -> list[RewardResult]:
        """One result per picture. What nobody could measure is None there, and `errors` says
        why."""
        mask, reference = load_mask(case.mask), load_rgb(case.reference)
        items = [
            RewardItem(picture, case.prompt, mask=mask, text=case.text, reference=reference)
            for picture in pictures
        ]
        try:
            results = self.client.score_batch(items)
        except (RewardClientError, ServerStartError) as error:
            return [_unscored(str(error)) for _ in pictures]
        return [
            _unscored(MADE_UP) if result.reward_model_disabled else result for result in results
        ]


MADE_UP = "the reward server runs with --disable-reward-model: its numbers are made up"


def _unscored(reason: str) -> RewardResult:
    return RewardResult(errors=dict.fromkeys(NAMES, reason))


@contextmanager
def reader(urls: Sequence[str], folder: Path) -> Iterator[Reader]:
    """A reader on the servers given or, when none is, on one of our own, started for the first
    picture."""
    with ExitStack() as stack:

        def own() -> list[str]:
            return [stack.enter_context(local_server(log_path=folder / "reward-server.log"))]

        found = Reader((lambda: urls) if urls else own)
        try:
            yield found
        finally:
            if "client" in found.__dict__:
                found.client.close()
