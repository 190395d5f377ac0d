"""What the rest of the program asks of an algorithm; a params section that answers it is one.

A new algorithm is one file beside this one, with a section derived from `Algorithm`, and one
field of `RunParams` that holds the section.

An objective is a generator of (loss, metrics): the caller runs `backward` on a loss before it
asks for the next one, so that one forward's activations are in memory at a time. The losses of a
batch add up to its mean loss.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any, ClassVar

from torch import Tensor

from calligrapher.model.policy import Policy, Weights
from calligrapher.params import Section
from calligrapher.rl.rows import TrainRows
from calligrapher.sampling.exploration import Exploration

Losses = Iterator[tuple[Tensor, dict[str, Tensor]]]


class Algorithm(Section, ABC):
    """The settings of an algorithm, and what stages and planning need to know about it."""

    name: ClassVar[str]  # the section's key in a params file
    default_ema_decay: ClassVar[float]
    usual: ClassVar[dict[str, Any]] = {}  # what a plan assumes where it shows the algorithm
    update_version: ClassVar[int] = 1  # raise it when an update learns otherwise from the same

    @property
    @abstractmethod
    def exploration(self) -> Exploration | None:
        """Return how the rollout explores; None: its steps are deterministic."""

    @property
    @abstractmethod
    def needs_old(self) -> bool:
        """Return whether the update also runs under the policy that sampled."""

    @property
    @abstractmethod
    def needs_reference(self) -> bool:
        """Return whether the update also runs under the policy that RL started from."""

    @property
    @abstractmethod
    def old_is_start(self) -> bool:
        """Return whether the policy that samples stays the one that RL started from."""

    @property
    def credits_places(self) -> bool:
        """Return whether the losses heed `TrainRows.credit`."""
        return True

    @property
    def compares_images(self) -> bool:
        """Return whether the losses need `TrainRows.deviation`."""
        return False

    @property
    def old_is_trained(self) -> bool:
        """Return whether a loss has for `old` the trained policy as the update begins, whichever
        policy sampled."""
        return False

    @property
    def lacks_for_stale(self) -> str | None:
        """Return the key to set where an older policy than the newest samples; None: none."""
        return None

    @abstractmethod
    def losses(
        self,
        policy: Policy,
        rows: TrainRows,
        key: str,
        *,
        num_steps: int,
        old: Weights | None,
        reference: Weights | None,
    ) -> Losses:
        """Yield the losses of a batch, under the trained weights of `policy`.

        key: names this pass over the round. What is drawn for a row derives from it and the row's
        place (`TrainRows.places`), so that no draw depends on which rows share a batch.
        num_steps: of the rollout's schedule. old: the weights that sampled, or with
        `old_is_trained` those that the update begins with, where `needs_old`.
        reference: those RL started from, where `needs_reference`; None says that they are the same
        as `old`, so that one forward serves as both.
        """

    @property
    def holds_background(self) -> bool:
        """Return whether rows come with their `background`, for a loss of its own."""
        return False

    @property
    def decides_old(self) -> dict[str, Any]:
        """Return the settings that decide how the sampling policy follows; read by `refresh`."""
        return {}

    def kl_coef_of_round(self, before: float | None, kl: float | None) -> float | None:
        """Return the weight of a round's KL where it follows a target; None: `kl_coef`, if any.

        before: its weight in the round before; None in the first. kl: the mean KL measured there;
        None where no step was taken.
        """
        return None

    @abstractmethod
    def old_policy_decay(self, step: int, round_index: int) -> float:
        """Return the share of the sampling policy that stays after a round.

        step: optimizer steps so far.
        """

    @abstractmethod
    def forwards_per_image(self, num_steps: int) -> int:
        """Return how many noise levels of an image a pass of the update trains on."""

    def background_rows_of(self, batch_size: int) -> int:
        """Return how many rows of a batch run once more, for the background's loss alone."""
        return 0

    @abstractmethod
    def fits(self, num_steps: int) -> None:
        """Raise a ValueError, in words, when rollouts of `num_steps` steps are not for it."""
