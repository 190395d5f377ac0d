"""What is known to be wrong before a model is loaded: all cases are looked at, all are named."""

import shutil

import pytest
from PIL import Image
from scripted import Script

from calligrapher.errors import DataError
from tasks.params.run_params import RunParams
from tasks.runs.preflight import preflight


@pytest.fixture
def check(values, cases, tmp_path):
    """Check a run whose held-out cases were changed by `damage(folder)`."""

    def check(damage, **changes):
        folder = shutil.copytree(cases / "evaluation", tmp_path / "held")
        damage(folder)
        given = values("nft", **{"evaluate": {"every": 1}, **changes})
        given["data"]["evaluation"] = str(folder)
        preflight(RunParams.model_validate(given), tmp_path / "data")

    return check


def test_masks_that_vanish_on_the_canvas_are_all_named(check):
    def damage(folder):
        for number in (1, 2):
            mask = Image.new("L", (96, 32))
            mask.putpixel((0, 1), 255)
            mask.save(folder / f"test{number}_mask.png")

    with pytest.raises(DataError, match=r"^data.evaluation .*held has 2 problem") as error:
        check(damage)
    for number in (1, 2):
        vanished = f"test{number}_mask.png must have a white pixel left on a 48x32 canvas"
        assert vanished in str(error.value)


def test_a_text_that_no_reward_server_takes_is_refused_unless_none_is_asked(check, tmp_path):
    def damage(folder):
        (folder / "self_bench.txt").write_text(f"1-{'W ' * 128}W\n2-short\n")

    longer = {"model": {"max_sequence_length": 512}}
    with pytest.raises(DataError, match=r"test1-W_.*: text must have at most 256 .* Found 257"):
        check(damage, **longer)
    shutil.rmtree(tmp_path / "held")
    check(damage, **longer, reward={"disable_reward_model": True})


def test_training_texts_beyond_the_alphabet_are_refused_above_the_share_and_warned_of_below(
    values, cases, tmp_path, caplog
):
    folder = shutil.copytree(cases / "train", tmp_path / "train")
    listed = folder / "self_bench.txt"
    lines = listed.read_text().splitlines()
    listed.write_text("\n".join(["1-Привет", *lines[1:]]) + "\n", encoding="utf-8")
    share, letters = 1 / len(lines), f"({' '.join('привет')})"

    def run(**reward):
        given = values("nft", reward={"server_urls": [], "ocr_weight": 1, **reward})
        given["data"]["train"] = str(folder)
        preflight(RunParams.model_validate(given), tmp_path / "data")

    with pytest.raises(DataError, match=r"1 of \d+ texts have letters") as error:
        run(max_unscored_share=share - 0.01)
    assert letters in str(error.value)
    assert "reward.max_unscored_share" in str(error.value)
    assert "reward.server_urls" in str(error.value)
    run(max_unscored_share=share)
    assert letters in caplog.text
    caplog.clear()
    run(max_unscored_share=0, disable_reward_model=True)
    assert "letters" not in caplog.text


def test_named_servers_are_asked_for_their_letters_and_older_ones_are_passed_over(
    values, cases, tmp_path, caplog
):
    folder = shutil.copytree(cases / "train", tmp_path / "train")
    listed = folder / "self_bench.txt"
    lines = listed.read_text().splitlines()
    listed.write_text("\n".join(["1-Привет", *lines[1:]]) + "\n", encoding="utf-8")

    def run(url: str, seed: int) -> None:
        given = values("nft", reward={"server_urls": [url], "ocr_weight": 1}, seed=seed)
        given["data"]["train"] = str(folder)
        given["reward"]["max_unscored_share"] = 0
        preflight(RunParams.model_validate(given), tmp_path / "data")

    server = Script()
    try:
        run(server.url, 1)
        assert "no reward server tells its letters" in caplog.text
        server.info, server.characters = {"alphabet": "digest"}, ["blank", *"привет"]
        run(server.url, 2)
        server.characters = ["blank", *"прив"]
        with pytest.raises(
            DataError, match=r"texts have letters that the reward servers' OCR"
        ) as error:
            run(server.url, 3)
        assert f"({' '.join('привет'[4:])})" in str(error.value)
    finally:
        server.close()
    caplog.clear()
    run("http://127.0.0.1:1", 4)
    assert "not known" in caplog.text
