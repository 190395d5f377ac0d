"""Making cases from pictures: read as any list, what was left out is counted, a kill does no
harm."""

import json
import multiprocessing
import os
import signal

import numpy as np
import pytest
from PIL import Image

from calligrapher.data import cutting as scenes
from calligrapher.data.cutting import Rules, TextPlace
from calligrapher.data.dataset import load_cases
from calligrapher.errors import DataError, ParamsError
from tasks.data import make as data_make
from tasks.data.make import make_cases

SIZE = (120, 90)
WITH = {"reader": "red rows"}


def read(rgb):
    """A text for each red bar of the picture; its colour's green is what it says."""
    bars = []
    for top in range(0, rgb.shape[0], 30):
        red, green, _ = rgb[top + 15, 60].tolist()
        if red == 255:
            box = ((10, top + 5), (100, top + 5), (100, top + 23), (10, top + 23))
            bars.append(TextPlace(f"text {green}", 0.95, box))
    return bars


def draw(path, *greens):
    image = Image.new("RGB", SIZE, "white" if not greens else "grey")
    for number, green in enumerate(greens):
        image.paste((255, green, 0), (10, 30 * number + 5, 100, 30 * number + 24))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


@pytest.fixture
def pictures(tmp_path):
    """Pictures with 3, 2, 1 and 0 texts, one that cannot be read, and a file that is none."""
    folder = tmp_path / "pictures"
    draw(folder / "a.png", 1, 2, 3)
    draw(folder / "sub" / "a.png", 4, 5)
    draw(folder / "b b.PNG", 6)
    Image.new("RGB", SIZE).save(folder / "empty.png")
    (folder / "broken.jpg").write_text("<html>")
    (folder / "notes.txt").write_text("no picture")
    return folder


def make(pictures, out, rules=None, reader=read, **options):
    rules = rules or Rules()
    return make_cases(pictures, out, read=reader, reads_with=WITH, rules=rules, **options)


def tree(folder):
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != ".lock"
    }


def test_the_cases_are_read_as_jsonl_and_their_target_is_their_source(pictures, tmp_path):
    made = make(pictures, tmp_path / "out")
    cases = load_cases(made.path, "jsonl")
    assert (made.cases, made.pictures) == (5, 5)
    assert [case.text for case in cases] == ["text 1", "text 2", "text 3", "text 4", "text 5"]
    for case in cases:
        assert case.target == case.source
        green = int(case.text.split()[1])
        painted = np.asarray(Image.open(case.source))[np.asarray(Image.open(case.mask)) > 0]
        reference = np.asarray(Image.open(case.reference))
        assert (painted == (255, green, 0)).all(
            -1
        ).sum() == 90 * 19  # The whole bar, and nothing of it
        assert not (reference == (255, green, 0)).all(-1).any()  # in the reference,
        assert (reference[..., 0] == 255).any()  # which shows another one.


def test_what_gave_no_case_is_counted_with_why(pictures, tmp_path):
    made = make(pictures, tmp_path / "out", Rules(pattern="text [^2]"))
    assert made.skipped == {
        "no text": 1,
        "not a readable picture": 1,
        "one text only, and that made no case": 1,
    }
    assert made.left_out == {"does not match the pattern": 1, "no other text for the reference": 1}
    lines = made.text().splitlines()
    assert lines[1:3] == ["pictures that gave no case: 3", "       1  no text"]
    assert lines[-1] == "not a readable picture: broken.jpg"


def test_an_unreadable_picture_is_told_when_it_is_met(pictures, tmp_path, caplog):
    make(pictures, tmp_path / "out")
    (told,) = [r.getMessage() for r in caplog.records if r.levelname == "WARNING"]
    assert "broken.jpg must be an image" in told


def test_a_name_that_is_no_utf_8_makes_cases_like_any_other(tmp_path):
    draw(tmp_path / "pictures" / os.fsdecode(b"caf\xe9.png"), 1, 2)
    (tmp_path / "pictures" / os.fsdecode(b"\xff.png")).touch()
    made = make(tmp_path / "pictures", tmp_path / "out")
    assert len(load_cases(made.path, "jsonl")) == 2
    assert made.unreadable == (r"\xff.png",)
    assert make(tmp_path / "pictures", tmp_path / "out") == made


def test_pictures_behind_a_linked_folder_make_the_cases_that_they_make_in_it(pictures, tmp_path):
    (pictures / "sub").rename(tmp_path / "elsewhere")
    (pictures / "sub").symlink_to(tmp_path / "elsewhere")
    linked = make(pictures, tmp_path / "out")
    (pictures / "sub").unlink()
    (tmp_path / "elsewhere").rename(pictures / "sub")
    assert linked.cases == 5
    assert tree(tmp_path / "out") == tree(make(pictures, tmp_path / "again").path.parent)


def test_the_results_may_not_lie_among_the_pictures_through_a_link_either(pictures, tmp_path):
    (tmp_path / "link").symlink_to(pictures)
    with pytest.raises(ParamsError, match="OUT must not lie in the folder of pictures"):
        make(pictures, tmp_path / "link" / "out")


def test_with_itself_as_reference_one_text_is_enough(pictures, tmp_path):
    made = make(pictures, tmp_path / "out", Rules(self_reference=True))
    assert made.cases == 6
    assert "one text only, and that made no case" not in made.skipped


def test_at_most_so_many_cases_and_more_of_them_later(pictures, tmp_path):
    whole = make(pictures, tmp_path / "whole")
    assert make(pictures, tmp_path / "out", max_cases=1).cases == 1
    assert make(pictures, tmp_path / "out", max_cases=4).cases == 4
    assert make(pictures, tmp_path / "out").cases == 5
    assert tree(tmp_path / "out") == tree(whole.path.parent)


def test_finished_pictures_are_not_read_again_but_changed_ones_are(pictures, tmp_path):
    make(pictures, tmp_path / "out")
    asked = []

    def counting(rgb):
        asked.append(rgb)
        return read(rgb)

    before = tree(tmp_path / "out")
    make(pictures, tmp_path / "out", reader=counting)
    assert (len(asked), tree(tmp_path / "out")) == (0, before)
    draw(pictures / "a.png", 7, 8)
    make(pictures, tmp_path / "out", reader=counting)
    assert len(asked) == 1
    make(pictures, tmp_path / "fresh")
    assert tree(tmp_path / "out") == tree(tmp_path / "fresh")


def test_other_settings_need_another_folder(pictures, tmp_path):
    make(pictures, tmp_path / "out")
    with pytest.raises(ParamsError, match="must be made with the settings that it was begun with"):
        make(pictures, tmp_path / "out", Rules(min_height=10))
    with pytest.raises(ParamsError, match="settings"):
        make_cases(
            pictures, tmp_path / "out", read=read, reads_with={"reader": "other"}, rules=Rules()
        )


def test_a_folder_without_pictures_or_with_the_cases_in_it_is_refused(pictures, tmp_path):
    with pytest.raises(ParamsError, match="OUT must not lie in the folder of pictures"):
        make(pictures, pictures / "out")
    for name in ("nowhere", "pictures/notes.txt"):
        with pytest.raises(DataError, match="must be a folder that holds pictures"):
            make(tmp_path / name, tmp_path / "out")


# --- kill -9 ---


def killed_at(step, pictures, out):
    """Run in a process that kills itself at its `step`-th write, which it leaves half done."""
    left = [step]

    def dying(write, half):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if left[0] == 0:
                half(*args)
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args, **kwargs)

        return wrapped

    def nothing(*args):
        pass

    Image.Image.save = dying(
        Image.Image.save, lambda image, path, *_: path.write_bytes(b"\x89PNG half")
    )
    data_make.Path.write_text = dying(
        data_make.Path.write_text, lambda path, text: path.write_bytes(b'{"ca')
    )
    data_make.os.rename = dying(os.rename, nothing)
    data_make.fsync_path = dying(data_make.fsync_path, nothing)
    data_make.atomic_write = dying(data_make.atomic_write, nothing)
    make(pictures, out)
    os._exit(0)  # What other tests left to be done at the parent's exit is not ours.


@pytest.mark.parametrize("stride", [7, pytest.param(1, marks=pytest.mark.slow)])
def test_a_kill_at_any_write_leaves_nothing_half_and_the_same_command_goes_on(
    pictures, tmp_path, stride
):
    (pictures / "broken.jpg").unlink()
    make(pictures, tmp_path / "whole")
    wanted = tree(tmp_path / "whole")
    fork = multiprocessing.get_context("fork")
    kills = 0
    for step in range(1, 200, stride):
        out = tmp_path / f"out{step}"
        process = fork.Process(target=killed_at, args=(step, pictures, out))
        process.start()
        process.join()
        # What is visible after the kill is what the whole run has,
        visible = {name: data for name, data in tree(out).items() if ".writing-" not in name}
        assert visible.items() <= wanted.items()
        if process.exitcode == 0:
            break
        assert process.exitcode == -signal.SIGKILL
        kills += 1
        done = sum(name.endswith("record.json") for name in visible)
        asked = []
        make(pictures, out, reader=lambda rgb, asked=asked: asked.append(1) or read(rgb))
        assert len(asked) == 4 - done  # no finished picture is read again,
        assert tree(out) == wanted  # and the result is the same to the bit.
    assert kills * stride > 40
    assert visible == wanted


def test_the_rules_are_noted_beside_the_cases(pictures, tmp_path):
    make(pictures, tmp_path / "out", Rules(grow=0.2))
    noted = json.loads((tmp_path / "out" / "settings.json").read_text())
    assert noted["rules"]["grow"] == 0.2
    assert noted["reads_with"] == WITH
    assert set(noted["rules"]) == set(scenes.Rules.model_fields)
