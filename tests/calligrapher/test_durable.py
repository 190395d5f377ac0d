"""Files and folders are written whole, and others may read them whom the umask lets."""

import os

import pytest
import torch
from safetensors.torch import load_file

from calligrapher.durable import atomic_folder, atomic_path, save_tensors


def half_made(folder):
    with atomic_folder(folder) as aside:
        (aside / "file").write_text("half")
        raise KeyError


def test_after_an_exception_there_is_no_folder_and_no_leftover(tmp_path):
    with pytest.raises(KeyError):
        half_made(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_of_two_that_make_one_folder_the_first_to_end_stays(tmp_path):
    with atomic_folder(tmp_path / "a") as slow:
        (slow / "file").write_text("second")
        with atomic_folder(tmp_path / "a") as quick:
            (quick / "file").write_text("first")
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a" / "file").read_text() == "first"


def test_a_file_in_the_way_is_an_error(tmp_path):
    (tmp_path / "a").touch()
    with pytest.raises(OSError, match="a"), atomic_folder(tmp_path / "a"):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.fixture(params=[0o022, 0o027, 0o077])
def umask(request):
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


def test_tensors_have_the_mode_of_any_other_file(tmp_path, umask):
    weights = {"a": torch.arange(3.0)}
    with atomic_path(tmp_path / "a.safetensors") as partial:
        save_tensors(weights, partial, {"format": "pt"})
    assert torch.equal(load_file(tmp_path / "a.safetensors")["a"], weights["a"])
    assert (tmp_path / "a.safetensors").stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize(
    ("name", "message"), [("none/a.txt", "No such file"), ("folder", "Is a directory")]
)
def test_a_file_that_cannot_be_written_is_called_by_its_own_name(tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    path = tmp_path / name
    with pytest.raises(OSError, match=message) as caught, atomic_path(path) as partial:
        partial.write_text("x")
    assert (caught.value.filename, caught.value.filename2) == (str(path), None)
    assert [p.name for p in tmp_path.iterdir()] == ["folder"]
