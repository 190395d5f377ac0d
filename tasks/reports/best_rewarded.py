"""The images that a round rewarded most, with what each was paid for: is the reward being gamed?"""

from pathlib import Path
from typing import Any

from PIL import Image

from calligrapher.data.case import Case
from calligrapher.data.images import load_rgb
from calligrapher.errors import ArtifactError
from calligrapher.tables.parquet import decode_png, read_shard, read_table
from tasks.artifacts.artifact import Artifact
from tasks.artifacts.layout import PARAMS, ROUNDS, RunsDir
from tasks.artifacts.run_dir import RunDir
from tasks.params.run_params import RewardParams, RunParams
from tasks.pictures.grids import CaptionedImage
from tasks.pictures.sheets import MUTED, SMALL, Line, Span, cell, shown, stacked
from tasks.resources.cases import Cases
from tasks.resources.rewards import reward_parts

ROLLOUT, SCORE = "rollout", "score"
COLUMNS = 6
_SIDE = 288  # of a picture


def best_of_round(run: Path, round_folder: str | None, *, num: int) -> tuple[Image.Image, str]:
    """Draw the best rewarded images of a run's round, as `round-0003`; and name the round.

    None stands for the newest round with scores. Raises ArtifactError when there is none, or when
    retention has taken the round's pictures.
    """
    if round_folder is None:
        scored = sorted(run.glob(f"{ROUNDS}/{SCORE}"))
        if not scored:
            raise ArtifactError(f"{run} must have a round with scores. It has none yet.")
        round_folder = scored[-1].parent.name
    folder, params = RunDir(run), RunParams.model_validate_json((run / PARAMS).read_bytes())
    rollout, scores = (folder.load(f"{round_folder}/{stage}") for stage in (ROLLOUT, SCORE))
    cases = Cases(params, RunsDir(run.parent).data).train
    by_id = {case.case_id: case for case in cases}
    return best_rewarded(params.reward, by_id, rollout, scores, num), round_folder


def best_rewarded(
    params: RewardParams, cases: dict[str, Case], rollout: Artifact, scores: Artifact, num: int
) -> Image.Image:
    """Draw the `num` images of a round with the highest rewards, best first.

    Below each stand the reference it was to follow, what was to be written and read, and what each
    weighed component counted (`reward_parts`; nothing where rewards are made up). cases: those of
    the round, by id. Raises ArtifactError when no image of the round has a reward.
    """
    rows = [row for row in _rows(rollout, scores) if row["reward"] is not None]
    if not rows:
        raise ArtifactError(f"{scores.path} must hold a reward. It holds none.")
    best = sorted(rows, key=lambda row: row["reward"], reverse=True)[:num]
    cells = [_cell(params, cases[row["case_id"]], row) for row in best]
    return stacked([cells[i : i + COLUMNS] for i in range(0, len(cells), COLUMNS)])


def _rows(rollout: Artifact, scores: Artifact) -> list[dict[str, Any]]:
    found = []
    for name in sorted(scores.files):
        table = read_table(scores.file(name))
        shard = rollout.file(name.replace("scores-", "shard-"))
        table |= read_shard(shard, ["case_id", "text", "image"])
        found += [dict(zip(table, row, strict=True)) for row in zip(*table.values(), strict=True)]
    return found


def _cell(params: RewardParams, case: Case, row: dict[str, Any]) -> Image.Image:
    painted = shown(decode_png(row["image"]), _SIDE)
    reference = shown(load_rgb(case.reference), _SIDE)
    both = Image.new("RGB", (_SIDE, painted.height + reference.height + 2), "white")
    both.paste(painted, (0, 0))
    both.paste(reference, (0, painted.height + 2))
    made_up = params.disable_reward_model  # of no component
    parts = {} if made_up else reward_parts(params, row)
    counted = "  ".join(f"{short(name)} {value:.2f}" for name, value in parts.items())
    lines: list[Line] = [
        *CaptionedImage(both, row["text"], row["ocr_text"], row["reward"]).lines(),
        ([Span(counted, MUTED, size=SMALL)], []),
    ]
    return cell(both, lines, _SIDE + 2)


def short(name: str) -> str:
    """Return a component's name as a caption has room for it: `accuracy`, `style`."""
    return name.removeprefix("ocr_").removesuffix("_score")
