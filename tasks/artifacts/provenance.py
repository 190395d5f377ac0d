"""What an artifact is made from; equal provenance means equal work.

```
asked = Provenance("update", 1, {"seed": 0}, {"old": "3fa1..."}, {"round": 3})
asked.fingerprint                                # one sha256 of all five
list(differences(there.as_dict(), asked.as_dict()))    # ["params.seed: 1 -> 0"]
```
"""

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

from tasks.artifacts.digests import canonical_json


@dataclass(frozen=True)
class Provenance:
    """All that a fingerprint covers; the fields are the manifest's.

    params: only what the stage reads. inputs: name -> digest. extra: anything else that decides the
    result (the round, who scored). Devices, addresses, worker counts and folders stay out: they do
    not.
    """

    stage: str
    stage_version: int = 1
    params: Mapping[str, Any] = field(default_factory=dict)
    inputs: Mapping[str, str] = field(default_factory=dict)
    extra: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def fingerprint(self) -> str:
        """Return the sha256 of all of it. Raises ValueError for NaN and infinities."""
        reads = {
            "stage": self.stage,
            "stage_version": self.stage_version,
            "params": self.params,
            "inputs": self.inputs,
            **self.extra,
        }
        return hashlib.sha256(canonical_json(reads)).hexdigest()

    def as_dict(self) -> dict[str, Any]:
        """Return the fields as plain JSON, as a manifest gives them back: tuples are lists."""
        return json.loads(json.dumps(asdict(self)))


def fingerprint(
    stage: str,
    stage_version: int,
    params: Mapping[str, Any],
    inputs: Mapping[str, str],
    **extra: Any,
) -> str:
    """Return the fingerprint of what is no artifact, but is found again by what it is made from."""
    return Provenance(stage, stage_version, params, inputs, extra).fingerprint


def differences(then: Any, now: Any, key: str = "") -> Iterator[str]:
    """Yield `dotted.key: then -> now` for each leaf that differs between two nested dicts."""
    if isinstance(then, dict) and isinstance(now, dict):
        for name in sorted(then.keys() | now.keys()):
            yield from differences(
                then.get(name, "(absent)"),
                now.get(name, "(absent)"),
                f"{key}.{name}".lstrip("."),
            )
    elif then != now:
        yield f"{key}: {_short(then)} -> {_short(now)}"


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 80 else text[:12] + "..."
