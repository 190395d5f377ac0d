import numpy as np
import pytest
from PIL import Image

from calligrapher.errors import ArtifactError
from calligrapher.tables.parquet import decode_png, read_shard, read_table
from flows.cli.main import main
from tasks.pictures.sheets import GAP, MARGIN, shown
from tasks.reports import best_rewarded
from tasks.reports.best_rewarded import best_of_round


@pytest.fixture
def run(train):
    return train("one", rounds=1)[0]


def rows_of(run):
    rows = []
    for scores in sorted((run / "round-0000/score").glob("scores-*.parquet")):
        rewards = read_table(scores, ["reward"])["reward"]
        shard = run / "round-0000/rollout" / scores.name.replace("scores-", "shard-")
        rows += zip(rewards, read_shard(shard, ["image"])["image"], strict=True)
    return sorted(rows, key=lambda row: row[0], reverse=True)


def test_the_best_paid_image_stands_first_and_no_more_than_asked_for(run):
    sheet, name = best_of_round(run, None, num=8)
    assert name == "round-0000"
    best = np.asarray(shown(decode_png(rows_of(run)[0][1]), best_rewarded._SIDE))
    height, width = best.shape[:2]
    left, top = MARGIN + 1, MARGIN + 1
    drawn = np.asarray(sheet)[top : top + height, left : left + width]
    assert np.array_equal(drawn, best)
    narrow, _ = best_of_round(run, "round-0000", num=3)
    assert narrow.width < sheet.width == 2 * MARGIN + 6 * (width + 2) + 5 * GAP


def test_what_each_component_counted_stands_below_its_image(run, monkeypatch):
    written = []
    real = best_rewarded.cell

    def noted(image, lines, width):
        written.append(["".join(s.text for side in line for s in side) for line in lines])
        return real(image, lines, width)

    monkeypatch.setattr(best_rewarded, "cell", noted)
    best_of_round(run, None, num=2)
    rewards = [reward for reward, _ in rows_of(run)[:2]]
    assert [lines[1].split("reward ")[1] for lines in written] == [f"{r:.2f}" for r in rewards]
    assert [lines[2] for lines in written] == [f"accuracy {r:.2f}" for r in rewards]


def test_a_round_without_scores_is_named(run):
    with pytest.raises(ArtifactError, match="round-0007"):
        best_of_round(run, "round-0007", num=4)
    with pytest.raises(ArtifactError, match="must have a round with scores"):
        best_of_round(run.parent / "none", None, num=4)


def test_the_command_writes_the_sheet_and_says_where(run, capsys):
    assert main(["best", str(run), "--num", "2"]) == 0
    path = run / "report" / "best" / "round-0000.png"
    assert capsys.readouterr().out.strip() == str(path)
    with Image.open(path) as sheet:
        assert sheet.size[0] > 2 * best_rewarded._SIDE
