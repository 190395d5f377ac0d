"""A user's scorer as a Scorer: whatever it does costs its own component and nothing else.

```python
class Legible:                                     # my_rewards.py
    def score(self, items):                        # Item of scorers/base.py; None = no number
        return [float((item.crop < 90).mean()) for item in items]
```

Further members, all optional: `lowest` (the smallest number it may give, 0.0; the largest is always
1), `sees_reference` (False; True: items come with their `reference`, and one whose reference cannot
be used is not asked about), `max_batch` (16 items of a call), `parallel` (1 call at a time),
`timeout_s` (30 seconds of a call), `info` (a dict of what else decides its numbers: a model's
digest), `close()`.
"""

import math
import sys
import threading
import types
from collections.abc import Sequence
from dataclasses import replace
from numbers import Real
from typing import Any

from reward_server.scorer_files import ScorerFile
from reward_server.scorers.base import Item, Outcome, ScorerUnavailableError, failed


class OwnScorer:
    """Calls `score` of `scorer` in a thread of its own, and checks what comes back.

    What raises, takes too long, gives too few or what is no number in range is null with a reason.
    """

    remote = True  # nothing that fails there says that this process is broken
    max_wait_s = 0.005

    def __init__(self, name: str, scorer: Any, identity: dict[str, str] | None = None):
        self.name, self.fields, self._scorer = name, (name,), scorer
        self.lowest = float(_member(scorer, name, "lowest", 0.0, lambda n: -math.inf < n < 1))
        self.max_batch = int(_member(scorer, name, "max_batch", 16, lambda n: n >= 1))
        self.parallel = int(_member(scorer, name, "parallel", 1, lambda n: 1 <= n <= 64))
        self.timeout_s = float(_member(scorer, name, "timeout_s", 30.0, lambda n: 0 < n < math.inf))
        self.sees_reference = bool(getattr(scorer, "sees_reference", False))
        told = getattr(scorer, "info", {})
        if not callable(getattr(scorer, "score", None)) or not isinstance(told, dict):
            raise TypeError(
                f"scorer {name} must have a method score(items), and info, if any, must be a dict."
                f" Got {type(scorer).__name__}."
            )
        self.info = {str(key): str(value) for key, value in told.items()} | (identity or {})
        self.info |= {"lowest": f"{self.lowest:g}"}
        self._late: list[threading.Thread] = []  # calls that took too long and still go on

    def score_items(self, items: Sequence[Item]) -> list[Outcome]:
        """See Scorer; never raises."""
        unusable = [item.reference_error if self.sees_reference else None for item in items]
        if not self.sees_reference:  # nor does what others look at decide its numbers
            items = [replace(item, reference=None) for item in items]
        asked = iter(self._score([i for i, no in zip(items, unusable, strict=True) if no is None]))
        return [next(asked) if no is None else failed(self.fields, no) for no in unusable]

    def close(self) -> None:
        """Close the scorer, if it can be; a call that still goes on ends with the process."""
        if callable(close := getattr(self._scorer, "close", None)):
            close()

    def _score(self, items: list[Item]) -> list[Outcome]:
        if not items:
            return []
        self._late = [thread for thread in self._late if thread.is_alive()]
        if len(self._late) >= self.parallel:
            reason = f"{self.name} still works on a call that took longer than {self.timeout_s:g} s"
            return [failed(self.fields, reason, "timeout")] * len(items)
        answer: list[Any] = []
        thread = threading.Thread(
            target=self._call, args=(items, answer), name=f"{self.name}-call", daemon=True
        )
        thread.start()
        thread.join(self.timeout_s)
        if not answer:
            self._late.append(thread)
            reason = f"{self.name} took longer than {self.timeout_s:g} s"
            return [failed(self.fields, reason, "timeout")] * len(items)
        (numbers,) = answer
        if isinstance(numbers, ScorerUnavailableError):
            reason = f"{self.name} is unavailable: {numbers}"
            return [failed(self.fields, reason, "unavailable")] * len(items)
        if isinstance(numbers, BaseException):
            if len(items) > 1:  # one bad item fails only itself
                return [self._score([item])[0] for item in items]
            reason = f"{self.name} raised {type(numbers).__name__}: {numbers}"[:500]
            return [failed(self.fields, reason, "exception")]
        return [self._outcome(number) for number in numbers]

    def _call(self, items: list[Item], answer: list[Any]) -> None:
        """Put what `score` gives, or raises, into `answer`."""
        try:
            numbers = list(self._scorer.score(items))
            if len(numbers) != len(items):
                raise ValueError(f"score must give {len(items)} numbers. Got {len(numbers)}.")
            answer.append(numbers)
        except BaseException as error:  # `exit()` in a scorer ends no server
            answer.append(error)

    def _outcome(self, number: Any) -> Outcome:
        if number is None:
            return failed(self.fields, f"{self.name} gave none")
        value = _real(number)
        if value is None or not self.lowest <= value <= 1:
            reason = f"{self.name} gave {str(number)[:80]}, which is no number in"
            return failed(self.fields, f"{reason} {self.lowest:g}..1", "no_number")
        return Outcome({self.name: value})


def load_own(file: ScorerFile) -> OwnScorer:
    """Run the file and return its scorer. Raises ValueError, and RuntimeError in one sentence."""
    file.check()
    identity = file.identity()
    module = types.ModuleType(f"reward_scorer_{file.name}")
    module.__file__ = str(file.path)
    sys.modules[module.__name__] = module  # dataclasses and pickle look a class's module up there
    try:
        # Not imported: bytecode that was kept of the file may be older than the bytes hashed.
        exec(compile(file.path.read_bytes(), file.path, "exec"), module.__dict__)
        scorer = getattr(module, file.cls)(**file.arguments)
        return OwnScorer(file.name, scorer, identity)
    except Exception as error:
        raise RuntimeError(
            f"scorer {file.name} must load from {file.text()}. It raised"
            f" {type(error).__name__}: {error}"
        ) from error


def _real(number: Any) -> float | None:
    """Return a number (also of numpy or torch) as a float; None for anything else."""
    if isinstance(number, bool | str | bytes):
        return None
    try:
        return float(number if isinstance(number, Real) else number.item())
    except Exception:
        return None


def _member(scorer: Any, name: str, member: str, default: Any, holds: Any) -> Any:
    value = getattr(scorer, member, default)
    if not isinstance(value, Real) or isinstance(value, bool) or not holds(value):
        raise ValueError(f"{member} of scorer {name} must be a number that fits. Got {value!r}.")
    return value
