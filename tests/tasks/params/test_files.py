"""Which file a name means."""

import pytest

from calligrapher.errors import ParamsError
from tasks.params.files import find_params_file, shipped_params

SHIPPED = ["evaluate", "grpo", "nft", "tiny-grpo", "tiny-nft"]


@pytest.fixture(autouse=True)
def _empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def test_a_bare_name_is_a_shipped_file_in_any_folder():
    assert [find_params_file(name).name for name in SHIPPED] == [f"{name}.yaml" for name in SHIPPED]
    assert sorted(file.stem for file in shipped_params().iterdir()) == SHIPPED


def test_a_file_of_that_name_wins_and_a_folder_does_not(tmp_path):
    (tmp_path / "nft").mkdir()
    assert find_params_file("nft") == shipped_params() / "nft.yaml"
    (tmp_path / "grpo").write_text("rounds: 1")
    assert find_params_file("grpo").absolute() == tmp_path / "grpo"


@pytest.mark.parametrize("name", ["", ".", "tiny", "nft.yaml", "params/nft", "params/nft.yaml"])
def test_another_name_is_told_which_ones_there_are(name):
    with pytest.raises(ParamsError, match=r"comes with the program: evaluate, grpo, nft"):
        find_params_file(name)
