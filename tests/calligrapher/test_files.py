"""Files below folders that hold links."""

import pytest

from calligrapher.files import files_below


@pytest.fixture
def tree(tmp_path):
    """`here/` holds a file, a link to a file, to the folder `there/`, to itself and to nowhere."""
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here / "sub", there / "deep"):
        folder.mkdir(parents=True)
    (here / "sub" / "a").write_text("a")
    (there / "deep" / "b").write_text("b")
    (here / "again").symlink_to(there)
    (here / "file").symlink_to(there / "deep" / "b")
    (here / "sub" / "up").symlink_to(here)
    (here / "nowhere").symlink_to(tmp_path / "nothing")
    return here


def test_links_are_followed_and_circles_are_not(tree):
    names = [path.relative_to(tree).as_posix() for path in files_below(tree)]
    assert names == ["again/deep/b", "file", "sub/a"]


def test_one_folder_under_two_names_is_there_twice(tree, tmp_path):
    (tree / "more").symlink_to(tmp_path / "there")
    names = [path.relative_to(tree).as_posix() for path in files_below(tree)]
    assert names == ["again/deep/b", "file", "more/deep/b", "sub/a"]


def test_two_folders_that_link_to_each_other_end(tmp_path):
    for one, other in (("x", "y"), ("y", "x")):
        (tmp_path / one).mkdir()
        (tmp_path / one / "file").touch()
        (tmp_path / one / "link").symlink_to(tmp_path / other)
    names = [path.relative_to(tmp_path).as_posix() for path in files_below(tmp_path / "x")]
    assert names == ["x/file", "x/link/file"]
