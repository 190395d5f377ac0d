"""Scores of the page's pictures; a server that does not answer costs numbers only."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from PIL import Image

from calligrapher.data.case import Case
from calligrapher.data.images import load_mask, load_rgb
from reward_server.client import RewardClient, RewardClientError, RewardItem, RewardResult
from reward_server.components import NAMES
from reward_server.processes.launch import ServerStartError, local_server

DEADLINE_S = 30.0  # Longer than any answer takes; somebody waits in front of the page.


class PictureScorer:
    """Scores pictures on the servers that `urls` gives, which is called at the first picture."""

    def __init__(self, urls: Callable[[], Sequence[str]], deadline_s: float = DEADLINE_S):
        self._urls, self._deadline_s = urls, deadline_s
        self._client: RewardClient | None = None

    def close(self) -> None:
        """Close the connections, if there are any."""
        if self._client is not None:
            self._client.close()

    def score(self, pictures: Sequence[Image.Image], case: Case) -> list[RewardResult]:
        """Return one result per picture; an unmeasured value is None, and `errors` says why."""
        mask, reference = load_mask(case.mask), load_rgb(case.reference)
        items = [
            RewardItem(picture, case.prompt, mask=mask, text=case.text, reference=reference)
            for picture in pictures
        ]
        try:
            results = self._connected().score_batch(items)
        except (RewardClientError, ServerStartError) as error:
            return [_unscored(str(error)) for _ in pictures]
        return [
            _unscored(MADE_UP) if result.reward_model_disabled else result for result in results
        ]

    def _connected(self) -> RewardClient:
        if self._client is None:
            self._client = RewardClient(
                self._urls(),
                request_timeout_s=self._deadline_s,
                deadline_s=self._deadline_s,
                max_pause_s=2.0,
                needed=(),  # somebody sits there: what is missing now is told, not waited for
            )
        return self._client


MADE_UP = "the reward server runs with --disable-reward-model: its numbers are made up"


def _unscored(reason: str) -> RewardResult:
    return RewardResult(errors=dict.fromkeys(NAMES, reason))


@contextmanager
def picture_scorer(
    urls: Sequence[str], folder: Path, flags: Sequence[str] = ()
) -> Iterator[PictureScorer]:
    """Yield a scorer on the servers given; without any, on one that the first picture starts.

    flags: of that one.
    """
    with ExitStack() as stack:

        def own() -> list[str]:
            log = folder / "reward-server.log"
            return [stack.enter_context(local_server(flags=flags, log_path=log))]

        scorer = PictureScorer((lambda: urls) if urls else own)
        try:
            yield scorer
        finally:
            scorer.close()
