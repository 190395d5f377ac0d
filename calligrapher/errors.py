"""The exceptions of this project.

```
CalligrapherError
├── InputError (ValueError)      the user can mend it: what must hold, what was found, what to do
│   ├── ParamsError              a params file or an override
│   ├── DataError                a dataset folder, an image, a line of a list
│   └── CheckpointError          a weights file: missing, unexpected or wrongly shaped keys
├── ArtifactError                an artifact is damaged, missing, or not the one that was asked for
├── RewardError                  a reward could not be had: servers down, too many unscored images
├── RankError                    a process of the rank group failed in a way that nobody foresaw
│   └── RankLostError            it died or hung: what it did can be done again
└── RunLockedError               another process works on the same run
```

Mistakes of our own are `assert`s, not exceptions of this tree.
"""


class CalligrapherError(Exception):
    """Root of the tree: catch this to catch all that the project raises on purpose."""


class InputError(CalligrapherError, ValueError):
    """What the user gave cannot be used."""


class ParamsError(InputError):
    """A params file or an override cannot be used."""


class DataError(InputError):
    """A dataset folder, an image or a line of a list cannot be used."""


class CheckpointError(InputError):
    """A weights file cannot be used."""


class ArtifactError(CalligrapherError):
    """An artifact is damaged, missing, or not the one that was asked for."""


class RewardError(CalligrapherError):
    """A reward could not be had."""


class RankError(CalligrapherError):
    """A process of the rank group failed in a way that nobody foresaw."""


class RankLostError(RankError):
    """A process of the rank group died or hung."""


class RunLockedError(CalligrapherError):
    """Another process works on the same run."""
