"""Which file a name means, and what is read where words have a meaning in YAML."""

import operator

import pytest
import yaml

from calligrapher.errors import ParamsError
from tasks.params.files import find_params_file, shipped_params
from tasks.params.run_params import load_params

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


@pytest.mark.parametrize("override", ["rounds=[1", "model={a: b: c}", "seed=!x 1", "rounds=\0"])
def test_what_is_no_yaml_is_told_in_one_line(override):
    with pytest.raises(ParamsError, match="must be YAML: ") as caught:
        load_params(find_params_file("nft"), [override])
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("name", ["", ".", "tiny", "nft.yaml", "params/nft", "params/nft.yaml"])
def test_another_name_is_told_which_ones_there_are(name):
    with pytest.raises(ParamsError, match=r"comes with the program: evaluate, grpo, nft"):
        find_params_file(name)


# key -> (as written, what the key then holds)
WORDS = [
    ("model.mixed_precision", "no", "no"),
    ("tracking.experiment", "null", "null"),
    ("tracking.experiment", "2024-01-01", "2024-01-01"),
    ("tracking.experiment", "1e5", "1e5"),
    ("tracking.experiment", "007", "007"),
    ("data.train", "yes", "yes"),
    ("data.train", "true", "true"),
    ("model.lora.targets", "[no, on, 1, 1:30]", ["no", "on", "1", "1:30"]),
    ("model.siglip", "null", None),
    ("model.siglip", "~", None),
    ("ema.use_ema", "true", True),
    ("ema.use_ema", "off", False),
    ("rounds", "1e1", 10),
    ("seed", "010", 10),
    ("update.learning_rate", "1e-5", 1e-5),
    ("update.betas", "[1e-1, .5]", (0.1, 0.5)),
    ("nft.num_train_sigmas", "null", None),
]


@pytest.mark.parametrize(("key", "written", "expected"), WORDS)
def test_a_word_is_read_as_what_its_key_holds_in_files_and_overrides(
    tmp_path, key, written, expected
):
    shipped = find_params_file("tiny-nft")
    values = yaml.safe_load(shipped.read_text())
    *sections, name = key.split(".")
    place = values
    for section in sections:
        place = place.setdefault(section, {})
    place[name] = "WRITTEN"
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(values).replace("WRITTEN", written))
    for params in (load_params(shipped, [f"{key}={written}"]), load_params(file)):
        held = operator.attrgetter(key)(params)
        assert held == expected
        assert type(held) is type(expected)


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("rounds=true", "rounds must be a whole number. Got 'true'."),
        ("rounds=null", "rounds must be a whole number. Got 'null'."),
        ("update.learning_rate=true", "update.learning_rate must be a number. Got 'true'."),
        ("update.betas=[0.9, false]", "update.betas.1 must be a number. Got 'false'."),
        ("model.lora={rank: true}", "model.lora.rank must be a whole number. Got 'true'."),
        ("model.lora.targets=no", "model.lora.targets must be a list. Got 'no'."),
        ("nft=off", "nft must be a section with keys of its own. Got 'off'."),
        ("seed=" + "9" * 5000, "must be YAML"),
        ("reward.server_urls=&a [*a]", "reward.server_urls"),
    ],
)
def test_a_word_that_its_key_cannot_hold_is_told_as_it_was_written(override, words):
    with pytest.raises(ParamsError) as caught:
        load_params(find_params_file("tiny-nft"), [override])
    assert words in str(caught.value)
