"""The alarm of reward hacking inside a run: from the pictures of the run's own evaluations.

Nothing is painted and no model is loaded for it. `evaluate.stop_on_alarm` lets it end the run.
"""

from collections.abc import Sequence

from calligrapher.data.canvas import Canvas
from calligrapher.tables.parquet import read_table
from tasks.artifacts.artifact import Artifact
from tasks.evaluation import second_ocr
from tasks.evaluation.measures import Columns, minus, per_case, per_image
from tasks.evaluation.verdict import reward_hacking
from tasks.resources.cases import Cases
from tasks.stages.evaluate import SCORES

START = "the start"
_WATCHED = ("reward", "ocr_accuracy", "second_ocr_accuracy", "background_error")


class Alarm:
    """Compares the evaluations of one run; each is measured once.

    Watched are OCR accuracy, Tesseract's where it is installed, the background, and the style where
    the reward servers measure it.
    """

    def __init__(self, cases: Cases) -> None:
        self.cases = cases
        self._measured: dict[str, Columns] = {}

    def raised(
        self, now: Artifact, first: Artifact, training_rewards: Sequence[float]
    ) -> list[str]:
        """Return what falls for certain since the evaluation `first` while the reward rises.

        As `verdict.reward_hacking` says it: `style_match since the start`; [] when all is well.
        """
        since_start = minus(self._of(now), self._of(first))
        return reward_hacking({START: since_start}, training_rewards)

    def _of(self, evaluation: Artifact) -> Columns:
        if evaluation.digest not in self._measured:
            model = self.cases.params.model
            second = second_ocr.version() is not None
            found, _ = per_image(
                evaluation.path,
                self.cases.evaluation,
                Canvas(model.width, model.height),
                second=second,
            )
            found["style_match"] = read_table(evaluation.path / SCORES)["style_score"]
            self._measured[evaluation.digest] = per_case(found, (*_WATCHED, "style_match"))
        return self._measured[evaluation.digest]
