"""The commands on datasets, as a person calls them."""

import json
import os
from collections import Counter
from pathlib import Path

import matplotlib
import pytest

from calligrapher.tiny.world import write_bench
from flows.cli.main import main
from flows.cli.output import show
from tasks.data.make import MadeCases


@pytest.fixture
def folder(tmp_path):
    return write_bench(tmp_path / "cases", num_cases=3, split="train", seed=1)


def test_check_says_what_there_is_and_draws_it(folder, tmp_path, capsys):
    arguments = ["data", "check", str(folder), "--sheet", str(tmp_path / "sheet.png")]
    assert main([*arguments, "--width", "96", "--height", "32"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{folder} (kind self): 3 samples, 0 broken\n")
    assert said.endswith(f"The sheet is {tmp_path / 'sheet.png'}.\n")
    assert (tmp_path / "sheet.png").is_file()


def test_a_folder_whose_name_is_no_utf_8_is_told_and_drawn(folder, tmp_path, capsys):
    odd = folder.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    (odd / "test2_ref.png").write_bytes(b"")
    assert main(["data", "check", str(odd), "--sheet", str(odd / "sheet.png")]) == 1
    assert r"caf\udce9/test2_ref.png must be an image" in capsys.readouterr().out


def test_check_for_a_warm_up_ends_with_1_when_a_target_is_missing(folder, capsys):
    (folder / "test3_target.png").unlink()
    assert main(["data", "check", str(folder)]) == 0
    assert main(["data", "check", str(folder), "--warmup"]) == 1
    assert "set warmup.steps to 0" in capsys.readouterr().out


def test_check_ends_with_1_when_a_sample_is_broken(folder, capsys):
    (folder / "test2_ref.png").write_bytes(b"")
    assert main(["data", "check", str(folder)]) == 1
    assert "\nbroken: self_bench.txt line 2 (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--width", "100"], "--width must be a multiple of 16. Got 100. Nearest: 96, 112."),
        (
            ["--kind", "csv"],
            "kind must be one of self, cross, jsonl, parquet, huggingface. Got 'csv'.",
        ),
        (["--kind", "jsonl"], "must be a JSONL file. Found a folder there."),
    ],
)
def test_a_mistake_is_one_line_and_status_2(folder, capsys, options, said):
    assert main(["data", "check", str(folder), *options]) == 2
    assert said in capsys.readouterr().err


def test_check_tells_programs_what_it_tells_people(folder, tmp_path, capsys):
    (folder / "test2_ref.png").write_bytes(b"")
    arguments = ["data", "check", str(folder), "--json", "--sheet", str(tmp_path / "sheet.png")]
    assert main(arguments) == 1
    found = json.loads(capsys.readouterr().out)
    assert (found["kind"], found["samples"], len(found["broken"])) == ("self", 3, 1)
    assert found["broken"][0]["where"] == "self_bench.txt line 2"
    assert found["statistics"]["sources"] == "1 different: 96x32 2"
    assert found["sheets"] == [str(tmp_path / "sheet.png")]


def test_drawn_cases_are_split_and_checked(tmp_path, capsys):
    (tmp_path / "words.txt").write_text("\n".join(f"WORD{i}" for i in range(9)))
    font = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    drawn, lists = tmp_path / "drawn", tmp_path / "lists"
    assert (
        main(["data", "draw", str(font), f"{tmp_path}/words.txt", str(drawn), "--num", "12"]) == 0
    )
    assert capsys.readouterr().out == f"12 cases of 9 words in 1 fonts are in {drawn}.\n"
    assert main(["data", "split", str(drawn), str(lists), "--held-out", "0.4"]) == 0
    assert capsys.readouterr().out.startswith("8 cases to train on are in")
    assert main(["data", "check", str(lists / "train.jsonl"), "--warmup", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["samples"] == 8
    assert main(["data", "split", str(drawn), str(lists), "--held-out", "1"]) == 2
    assert "--held-out must lie between 0 and 1. Got 1." in capsys.readouterr().err


def test_programs_get_json_of_what_was_made_drawn_and_split(tmp_path, capsys):
    made = MadeCases(tmp_path, 3, 2, Counter({"no text": 1}), Counter(), ("a.png",))
    show(made, made.text, as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["cases"], found["skipped"]) == (str(tmp_path), 2, {"no text": 1})
    assert (found["left_out"], found["unreadable"]) == ({}, ["a.png"])
    (tmp_path / "words.txt").write_text("\n".join(f"WORD{i}" for i in range(9)))
    font = Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf"
    drawn, lists = str(tmp_path / "drawn"), str(tmp_path / "lists")
    assert (
        main(["data", "draw", str(font), f"{tmp_path}/words.txt", drawn, "--num", "12", "--json"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["path"], found["cases"], found["words"]) == (drawn, 12, 9)
    assert main(["data", "split", drawn, lists, "--held-out", "0.4", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["train_cases"], found["evaluation_cases"]) == (8, 4)


def test_columns_are_named_on_the_command_line(folder, capsys):
    record = {"caption": "A", "mask": "test1_mask.png", "reference": "test1_ref.png"}
    line = json.dumps(record | {"source": "test1_source.png", "more": 1})
    (folder / "list.jsonl").write_text(line)
    arguments = ["data", "check", str(folder / "list.jsonl")]
    assert main(arguments) == 1
    assert main([*arguments, "--columns", "text=caption"]) == 0
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main([*arguments, "--columns", "caption=text"])
    assert "must be FIELD=NAME,..., the fields source, mask," in capsys.readouterr().err
