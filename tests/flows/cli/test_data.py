"""The commands on datasets, as a person calls them."""

import os

import pytest

from calligrapher.tiny.world import write_bench
from flows.cli.main import main


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
