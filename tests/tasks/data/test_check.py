"""Checking a dataset: all that is broken in one pass, numbers of what is sound, a sheet that shows
both."""

import numpy as np
import pytest
from PIL import Image

from calligrapher.data.canvas import Canvas
from calligrapher.data.dataset import load_cases
from calligrapher.errors import DataError
from calligrapher.tiny.world import write_bench
from reward_server.service.schema import MAX_TEXT_CHARS
from tasks.data.check import check, detect
from tasks.data.demands import MAX_TEXT, Demands
from tasks.data.sheet import ROWS, outlined, write_sheets

CANVAS = Canvas(96, 32, True)


@pytest.fixture
def folder(tmp_path):
    """Five tiny cases."""
    return write_bench(tmp_path / "cases", num_cases=5, split="evaluation", seed=3)


def checked(folder, canvas=CANVAS, kind=None, **demands):
    return check(folder, kind, demands=Demands(canvas, **demands), cache_dir=folder / "cache")


def test_a_sound_dataset_is_measured(folder):
    found = checked(folder)
    assert found.problems == []
    assert found.title == f"{folder} (kind self): 5 samples, 0 broken"
    said = dict(line.split(maxsplit=1) for line in found.text().splitlines()[1:])
    texts = [case.text for case in load_cases(folder)]
    low, _, middle, _, high = sorted(map(len, texts))
    assert said["texts"] == (
        f"{len(set(texts))} different, characters per text: {low} to {high} (median {middle})"
    )
    assert said["sources"] == said["references"] == "1 different: 96x32 5"
    assert said["targets"] == "5 of 5"
    letters = "".join(texts)
    assert f"{max(set(letters), key=letters.count)} " in said["characters"]
    shares = sorted(
        (np.asarray(Image.open(folder / f"test{n}_mask.png")) == 255).mean() for n in range(1, 6)
    )
    assert said["masks"].endswith(f"{shares[0]:.1%} to {shares[-1]:.1%} (median {shares[2]:.1%})")


def test_every_broken_sample_is_told_and_left_out_of_the_numbers(folder):
    (folder / "test2_source.png").unlink()
    with (folder / "self_bench.txt").open("a") as listing:
        listing.write("nonsense\n")
    found = checked(folder)
    assert found.title.endswith("6 samples, 2 broken")
    assert [problem.split(" must")[0].split()[2] for problem in found.problems] == ["2", "6:"]
    assert "sources      1 different: 96x32 4" in found.text()


def test_a_mask_that_vanishes_on_the_canvas_is_broken(folder):
    mask = Image.new("L", (96, 32))
    mask.putpixel((0, 1), 255)
    mask.save(folder / "test1_mask.png")
    assert checked(folder).problems == []
    (problem,) = checked(folder, Canvas(32, 16)).problems
    assert "test1_mask.png must have a white pixel left on a 32x16 canvas" in problem


def test_a_case_without_a_target_is_broken_for_the_warm_up_alone(folder):
    (folder / "test2_target.png").unlink()
    assert checked(folder).problems == []
    assert "4 of 5; without all of them warmup.steps must be 0" in checked(folder).text()
    found = checked(folder, warmup=True)
    (problem,) = found.problems
    assert problem.startswith("self_bench.txt line 2 (test2-")
    assert "test2_source.png must have a target" in problem
    assert found.text().count("set warmup.steps to 0") == 1


def test_a_text_longer_than_a_reward_server_takes_is_broken_where_it_is_scored(folder):
    assert MAX_TEXT == MAX_TEXT_CHARS
    listing = folder / "self_bench.txt"
    rest = listing.read_text().splitlines()
    listing.write_text("\n".join([f"1-{'W' * 256}", f"2-{'W' * 257}", *rest[2:]]) + "\n")
    (problem,) = checked(folder).problems
    assert "line 2" in problem
    assert "text must have at most 256 characters" in problem
    assert checked(folder, scored=False).problems == []


def test_a_dataset_with_nothing_sound_is_still_told(folder):
    (folder / "self_bench.txt").write_text("")
    assert checked(folder).text().splitlines()[1:] == [
        "broken: self_bench.txt: must list at least one case. Found none."
    ]


def test_the_kind_is_told_by_what_lies_there(folder, tmp_path):
    assert detect(folder) == (folder, "self")
    (folder / "self_bench.txt").rename(folder / "cross_bench.txt")
    assert detect(folder) == (folder, "cross")
    (tmp_path / "made").mkdir()
    for name, kind in (("cases.jsonl", "jsonl"), ("cases.parquet", "parquet")):
        path = tmp_path / "made" / name
        path.touch()
        assert detect(path) == (path, kind)
        assert detect(path.parent) == (path if kind == "jsonl" else path.parent, kind)
        path.unlink()
    (tmp_path / "made" / "state.json").touch()
    assert detect(tmp_path / "made") == (tmp_path / "made", "huggingface")
    assert detect(tmp_path / "made#train") == (tmp_path / "made#train", "huggingface")


def test_a_folder_with_two_lists_or_none_needs_a_kind(folder, tmp_path):
    (folder / "cross_bench.txt").write_text("1-2-word\n")
    with pytest.raises(
        DataError, match=r"one kind of list\. Found self \(cases\), cross \(cases\)\."
    ):
        detect(folder)
    assert checked(folder, kind="cross").title.endswith("1 samples, 0 broken")
    for path in (tmp_path, tmp_path / "nowhere", folder / "test1_mask.png"):
        with pytest.raises(DataError, match="Name the kind with --kind"):
            detect(path)


# --- the sheet ---


def test_a_sheet_has_pages_and_shows_broken_samples_first(folder, tmp_path):
    write_bench(folder, num_cases=ROWS + 2, split="evaluation", seed=3)
    (folder / f"test{ROWS + 2}_mask.png").unlink()
    files = write_sheets(checked(folder), tmp_path / "new" / "sheet.png", limit=50)
    assert [file.name for file in files] == ["sheet.png", "sheet-2.png"]
    first, second = (np.asarray(Image.open(file)) for file in files)
    red = (first == (0xFD, 0xE8, 0xE4)).all(-1).any(1).nonzero()[0]
    assert red.size
    assert red.max() < 250
    assert not (second == (0xFD, 0xE8, 0xE4)).all(-1).any()
    assert len(write_sheets(checked(folder), tmp_path / "one.png", limit=1)) == 1


def test_a_sheet_of_an_empty_dataset_shows_why(folder, tmp_path):
    (folder / "self_bench.txt").write_text("")
    (sheet,) = write_sheets(checked(folder), tmp_path / "sheet.png", limit=5)
    assert Image.open(sheet).height > 100


def test_the_outline_runs_along_the_edge_of_the_mask():
    mask = Image.new("L", (262, 131))
    mask.paste(255, (50, 40, 200, 90))
    drawn = np.asarray(outlined(Image.new("RGB", mask.size), mask)).any(-1)
    rows, columns = drawn.nonzero()
    assert (columns.min(), rows.min(), columns.max(), rows.max()) == (49, 39, 200, 90)
    assert not drawn[42:88, 52:198].any()


def test_texts_with_letters_that_the_bundled_ocr_lacks_are_named_and_not_broken(folder):
    listed = folder / "self_bench.txt"
    lines = listed.read_text(encoding="utf-8").splitlines()
    lines[1:3] = ["2-Cafe Москва", "3-Málaga 東京"]
    listed.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = checked(folder)
    assert found.problems == []
    (said,) = [line for line in found.text().splitlines() if line.startswith("unreadable")]
    assert "1 of 5 texts have letters" in said
    assert f"({' '.join('москва')})" in said
    assert "--ocr-model-dir" in said
