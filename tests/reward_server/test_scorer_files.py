"""How a scorer of one's own is named, and what of it counts."""

import subprocess
import sys

import pytest

from reward_server.scorer_files import ScorerFile, check_own_name, content_digest

SOURCE = "class Legible:\n    def score(self, items):\n        return [0.5] * len(items)\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return path


def test_a_file_a_class_and_its_arguments_are_read_and_written_the_same():
    url = "http://[::1]:80/score?a=1%26b=2+3"
    one = ScorerFile.parse("legible", f"a b/x.py:Legible?url={url}&darker_than=90&empty=")
    assert (str(one.path), one.cls) == ("a b/x.py", "Legible")
    assert one.arguments == {
        "url": "http://[::1]:80/score?a=1&b=2+3",
        "darker_than": "90",
        "empty": "",
    }
    assert ScorerFile.parse("legible", one.text()) == one
    there = one.text(lambda text: f"/{text}" if text == "90" or ".py" in text else text)
    assert there.startswith("/a b/x.py:Legible?url=")
    assert "darker_than=/90" in there


@pytest.mark.parametrize(
    "text",
    ["", "x.py", "x.py:", ":Legible", "x.py:a-b", "x.py:A?b", "x.py:A?=1", "x.py:A?1=b"],
)
def test_what_is_no_file_and_class_is_told(text):
    with pytest.raises(ValueError, match="scorer legible must be FILE:CLASS"):
        ScorerFile.parse("legible", text)


def test_an_argument_is_given_once():
    with pytest.raises(ValueError, match="each argument once"):
        ScorerFile.parse("legible", "x.py:A?b=1&b=2")


@pytest.mark.parametrize(
    "name",
    ["", "Legible", "1st", "a-b", "a.b", "ocr_accuracy", "reward", "ocr", "errors", "a" * 41],
)
def test_a_name_that_is_taken_or_no_name_is_refused(name):
    with pytest.raises(ValueError, match="scorer's name must be"):
        check_own_name(name)


def test_a_class_that_is_not_there_is_told_before_anything_runs(file):
    ScorerFile.parse("legible", f"{file}:Legible").check()
    with pytest.raises(ValueError, match=r"Got Legibel; there are: Legible"):
        ScorerFile.parse("legible", f"{file}:Legibel").check()
    file.write_text("raise SystemExit\nclass A(:\n")
    with pytest.raises(ValueError, match="readable Python file"):
        ScorerFile.parse("legible", f"{file}:A").check()
    with pytest.raises(ValueError, match="readable Python file"):
        ScorerFile.parse("legible", f"{file.parent / 'no.py'}:A").check()


def test_bytes_and_arguments_count_and_places_do_not(file, tmp_path):
    def identity(path=file, query=""):
        return ScorerFile.parse("legible", f"{path}:Legible{query}").identity()

    other = tmp_path / "elsewhere" / "renamed.py"
    other.parent.mkdir()
    other.write_text(SOURCE)
    before = identity()
    assert identity(other) == before
    assert identity(query="?darker_than=90") != before
    other.write_text(SOURCE + "\n")
    assert identity(other) != before


def test_an_argument_that_names_a_folder_counts_by_what_is_in_it(file, tmp_path):
    folder, copy = tmp_path / "model", tmp_path / "copy"
    for place in (folder, copy):
        (place / "sub").mkdir(parents=True)
        (place / "sub" / "weights.bin").write_bytes(b"abc")
    assert content_digest(folder) == content_digest(copy)

    def identity(place):
        return ScorerFile.parse("clip", f"{file}:Legible?folder={place}").identity()

    before = identity(folder)
    assert identity(copy) == before
    (folder / "sub" / "weights.bin").write_bytes(b"abd")
    assert identity(folder) != before


def test_reading_a_scorers_name_needs_nothing_but_the_standard_library():
    code = (
        "import sys; old = set(sys.modules); import reward_server.scorer_files;"
        "print(*{m.split('.')[0] for m in set(sys.modules) - old})"
    )
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert {name for name in loaded if name not in sys.stdlib_module_names} == {"reward_server"}
