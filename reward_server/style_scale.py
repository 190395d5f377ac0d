"""What a cosine of a SigLIP's embeddings says of style: a share of the way from other to same.

The cosine alone says little: of a public SigLIP unrelated pictures of text already have a high one,
and a right picture's is far from 1, for paper and words are in the embedding too. So a SigLIP's
folder may hold `style_scale.json`: the mean cosine with a reference of pictures in another style,
and of pictures in its own. `python -m tasks.measures --write` makes it from cases with targets.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path

STYLE_SCALE = "style_scale.json"
LEAST_SPAN = 0.02  # of cosines: a scale that tells less apart turns noise into scores


@dataclass(frozen=True)
class StyleScale:
    """The cosines that count as 0 and as 1; without a file a cosine counts as it is."""

    other: float = 0.0
    same: float = 1.0

    def __post_init__(self):
        if not -1 <= self.other <= self.same - LEAST_SPAN <= 1:
            raise ValueError(
                f"{STYLE_SCALE} must hold cosines, `same` at least {LEAST_SPAN} above `other`. Got"
                f" other {self.other}, same {self.same}: this SigLIP does not tell the styles of"
                " these cases apart."
            )

    @classmethod
    def read(cls, folder: Path) -> "StyleScale":
        """Return the scale of a SigLIP's folder; raises ValueError for a file that is none."""
        path = folder / STYLE_SCALE
        if not path.is_file():
            return cls()
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            return cls(float(found["other"]), float(found["same"]))
        except (KeyError, TypeError, json.JSONDecodeError) as error:
            raise ValueError(
                f"{path} must be JSON with the numbers `other` and `same`. Got {error!r}."
            ) from error

    def text(self) -> str:
        """Return what the file holds."""
        return json.dumps(asdict(self)) + "\n"

    def score(self, cosine: float) -> float:
        """Return the share of the way from `other` to `same`, in [0, 1]."""
        return min(max((cosine - self.other) / (self.same - self.other), 0.0), 1.0)
