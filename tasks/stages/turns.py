"""Which rank samples which piece of a stage's work, and when."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from calligrapher.data.case import Case
from tasks.resources.resources import Resources
from tasks.stages.sampling import batches_of_cases


@dataclass(frozen=True)
class Turn:
    """A rank's turn at the piece of work `number` (a shard, a batch).

    Where each forward is the work of all ranks, they take turns side by side: all go through
    `at_least` batches, and a rank without a piece of its own through another one's (`own` is
    False), for nothing.
    """

    number: int
    own: bool = True
    at_least: int = 0


def turns(resources: Resources, pieces: Mapping[int, Sequence[Case]]) -> list[Turn]:
    """Return this rank's turns at `pieces`: number of a piece -> the cases of its images.

    Piece k is rank k mod N's. The same pieces on all ranks give turns that fit together.
    """
    ranks = resources.ranks
    if not resources.model.policy.sharded:
        return [Turn(number) for number in sorted(pieces) if ranks.owns(number)]
    found = []
    for first in range(0, max(pieces, default=-1) + 1, ranks.size):
        abreast = [number for number in range(first, first + ranks.size) if number in pieces]
        if abreast:
            most = max(len(batches_of_cases(resources, pieces[number])) for number in abreast)
            own = first + ranks.rank
            number = own if own in pieces else abreast[0]
            found.append(Turn(number, own=own in pieces, at_least=most))
    return found
