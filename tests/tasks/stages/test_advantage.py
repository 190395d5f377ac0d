"""The stage `advantage` on small score tables."""

from types import SimpleNamespace

import pytest
from pydantic import ValidationError

from calligrapher.errors import RewardError
from calligrapher.tables.parquet import read_table, write_scores
from calligrapher.tables.schema import SCORE_COLUMNS
from tasks.params.run_params import RunParams
from tasks.pipeline import reads
from tasks.resources.rewards import reward_of
from tasks.stages.advantage import ADVANTAGES_FILE, advantage

ACCURACY = [0.0, 0.5, 1.0, 1.0, 0.75, 0.5]
SEEN = [1.0, 1.0, 0.0, None, 1.0, 0.5]  # nobody can see what was read best in the first group
VLM = [0.2, 0.4, 0.6, 0.5, 0.1, 0.9]


def params(combine="standardized", **reward) -> RunParams:
    return RunParams.model_validate(
        {
            "rounds": 1,
            "model": {"base": "b", "siglip": "s"},
            "data": {"train": "t", "kind": "self"},
            "warmup": {"steps": 0},
            "nft": {},
            "evaluate": {"every": 0},
            "rollout": {"num_cases": 2, "num_images_per_prompt": 3},
            "advantage": {"combine": combine, "global_std": False},
            "reward": {"ocr_weight": 0.5, "vlm_weight": 0.5, "vlm": "v", **reward},
        }
    )


@pytest.fixture
def compared(tmp_path):
    """Return params -> the advantages of two groups of three, in two score files; made_up: the
    reward of all, as where no server is asked."""

    def run(chosen, made_up=None):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        rows = [
            {"ocr_accuracy": accuracy, "ocr_visibility": seen, "vlm_score": vlm}
            for accuracy, seen, vlm in zip(ACCURACY, SEEN, VLM, strict=True)
        ]
        rows = [
            dict.fromkeys(SCORE_COLUMNS.names)
            | row
            | reward_of(chosen.reward, row, {})
            | {"sample_id": f"s{i}"}
            for i, row in enumerate(rows)
        ]
        if made_up is not None:
            rows = [
                dict.fromkeys(row) | {"sample_id": row["sample_id"], "reward": made_up}
                for row in rows
            ]
        files = {"scores-0000.parquet": rows[:2], "scores-0001.parquet": rows[2:]}
        for name, part in files.items():
            write_scores(folder / name, {key: [row[key] for row in part] for key in part[0]})
        scores = SimpleNamespace(files=dict.fromkeys(files), file=lambda name: folder / name)
        advantage(chosen, 0, folder, scores=scores)
        return read_table(folder / ADVANTAGES_FILE)["advantage"]

    return run


def test_factors_lessen_what_ocr_read_before_components_are_compared(compared):
    found = compared(params(factors=["ocr_visibility"]))
    # First group: accuracy 0, 0.5, 0 (deviations -1/6, 1/3, -1/6; std 0.2887 with Bessel's
    # correction) and judge 0.2, 0.4, 0.6 (-1, 0, 1), each by half.
    assert found[:3] == pytest.approx([-0.7887, 0.5774, 0.2113], abs=2e-3)
    # Second: the first image lacks its factor and is left out; 0.75 and 0.25, 0.1 and 0.9.
    assert found[3] is None
    assert found[4:] == pytest.approx([0.0, 0.0], abs=2e-3)


def test_without_factors_components_are_compared_as_measured(compared):
    found = compared(params())
    assert found[:3] == pytest.approx([-1.0, 0.0, 1.0], abs=2e-3)
    assert None not in found


@pytest.mark.parametrize("factors", [[], ["ocr_visibility"]])
def test_made_up_rewards_have_no_component_to_compare_and_teach_nothing(compared, factors):
    assert compared(params(factors=factors), made_up=0.5) == [0.0] * 6


def test_factors_are_part_of_what_made_an_advantage_only_where_they_are_set():
    assert "factors" not in reads(params(), "advantage")
    assert reads(params(factors=["ocr_visibility"]), "advantage")["factors"] == ["ocr_visibility"]
    summed = params(combine="sum", factors=["ocr_visibility"])
    assert "factors" not in reads(summed, "advantage")


def letter(likelihood, left):
    return {"likelihood": likelihood, "left": left, "top": 2.0, "right": left + 4.0, "bottom": 9.0}


SPELLED = [
    [letter(0.9, 0.0), letter(0.2, 8.0)],
    [letter(0.1, 1.0), letter(0.2, 9.0)],
    [letter(0.5, 2.0), letter(0.2, 7.0)],
]


def table_of(tmp_path, chosen, letters=SPELLED, seen=(1.0, 1.0, 1.0)):
    rows = [
        {"ocr_likelihood": 0.5, "ocr_visibility": visible, "style_score": style}
        for visible, style in zip(seen, (0.1, 0.2, 0.3), strict=True)
    ]
    rows = [
        dict.fromkeys(SCORE_COLUMNS.names)
        | row
        | reward_of(chosen.reward, row, {})
        | {"sample_id": f"s{i}", "ocr_letters": spelled}
        for i, (row, spelled) in enumerate(zip(rows, letters, strict=True))
    ]
    write_scores(tmp_path / "scores.parquet", {key: [row[key] for row in rows] for key in rows[0]})
    scores = SimpleNamespace(files=["scores.parquet"], file=lambda name: tmp_path / name)
    advantage(chosen, 0, tmp_path, scores=scores)
    return read_table(tmp_path / ADVANTAGES_FILE)


def lettered(**reward) -> RunParams:
    values = params().model_dump()
    weights = {"ocr_weight": 0.0, "vlm_weight": 0.0, "likelihood_weight": 2.0, "style_weight": 1.0}
    values["reward"] |= weights | reward
    values["advantage"] |= {"per_letter": True}
    values["grpo"] = values["awm"] = None
    return RunParams.model_validate(values)


def test_each_letter_has_the_advantage_of_its_own_and_of_the_picture(tmp_path):
    table = table_of(tmp_path, lettered())
    a = 2.0 * 0.4 / 0.45  # std 0.4 and the floor of 0.05
    style = [-1.0, 0.0, 1.0]
    for row, (first, own) in enumerate(zip((a, -a, 0.0), style, strict=True)):
        one, other = table["letters"][row]
        assert one["advantage"] == pytest.approx(first + own, abs=1e-2)
        assert other["advantage"] == pytest.approx(own, abs=1e-2)  # the second is alike in all
        assert table["advantage"][row] == pytest.approx(first / 2 + own, abs=1e-2)
        place = SPELLED[row][1]
        assert {side: other[side] for side in ("left", "top", "right", "bottom")} == {
            side: place[side] for side in ("left", "top", "right", "bottom")
        }


def test_made_up_rewards_have_no_letters_to_compare_and_teach_nothing(compared):
    assert compared(lettered(disable_reward_model=True), made_up=0.5) == [0.0] * 6


def test_factors_lessen_letters_as_they_lessen_what_was_read(tmp_path):
    table = table_of(tmp_path, lettered(factors=["ocr_visibility"]), seen=(0.0, 1.0, 1.0))
    # 0, 0.1, 0.5: mean 0.2, std 0.2646
    first = [letters[0]["advantage"] for letters in table["letters"]]
    style = [-1.0, 0.0, 1.0]
    wanted = [2.0 * (v - 0.2) / 0.3146 + s for v, s in zip((0, 0.1, 0.5), style, strict=True)]
    assert first == pytest.approx(wanted, abs=1e-2)


@pytest.mark.parametrize("lacking", [None, [], SPELLED[0][:1]])
def test_an_image_that_lacks_a_letter_is_an_error_and_no_number(tmp_path, lacking):
    with pytest.raises(RewardError, match="a letter for every one of its text"):
        table_of(tmp_path, lettered(), letters=[*SPELLED[:2], lacking])


def test_scores_of_before_letters_were_asked_about_say_what_to_rerun(tmp_path):
    chosen = lettered()
    table_of(tmp_path, chosen)
    table = read_table(tmp_path / "scores.parquet")
    write_scores(tmp_path / "old.parquet", {k: v for k, v in table.items() if k != "ocr_letters"})
    scores = SimpleNamespace(files=["old.parquet"], file=lambda name: tmp_path / name)
    with pytest.raises(RewardError, match="Rerun from the score of that round on"):
        advantage(chosen, 0, tmp_path, scores=scores)


def test_letters_are_compared_only_where_they_count_and_the_losses_heed_them():
    with pytest.raises(ValidationError, match=r"reward\.likelihood_weight must be above 0"):
        lettered(likelihood_weight=0.0)
    values = lettered().model_dump() | {"nft": None, "grpo": {"guard": True}}
    with pytest.raises(ValidationError, match="per_letter must be false with grpo"):
        RunParams.model_validate(values)
    assert reads(lettered(), "score")["letters"] is True
    made_up = lettered(disable_reward_model=True, likelihood_weight=0.0)
    assert "letters" not in reads(made_up, "score")
    assert "letters" not in reads(params(), "score")
    assert "per_letter" not in reads(params(), "advantage")["advantage"]
