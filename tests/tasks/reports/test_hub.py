"""A folder for the hub: its card is one that the hub reads, its weights are the run's."""

import json
import shutil

import pytest
from huggingface_hub import ModelCard
from small_runs import SETTINGS

from calligrapher.errors import ParamsError
from tasks.inference.painter import open_painter
from tasks.reports.hub import write_hub_folder
from tasks.weights.model_files import adapter_file

RUN = {
    "rounds": 1,
    "rollout": {"num_cases": 2, "num_images_per_prompt": 2},
    "evaluate": {"every": 1, "noise_level": 0.5},
}


@pytest.fixture
def folder(train, tmp_path):
    """What is written for a run of one round, measured before and after it."""
    train("first", **RUN)
    return tmp_path / "hub"


def test_the_card_is_read_by_the_hubs_library_and_tells_the_measured_table(folder, tmp_path):
    written = write_hub_folder(
        "first", folder, license="other", base_model="owner/base", runs_dir=tmp_path
    )
    names = {str(path.relative_to(folder)) for path in written}
    assert names >= {"calligrapher.safetensors", "config.json", "README.md", "images/grid.png"}
    assert all(path.is_file() for path in written)
    card = ModelCard.load(folder / "README.md")
    assert (card.data.license, card.data.base_model) == ("other", "owner/base")
    measured = json.loads((tmp_path / "first/round-0000/evaluate/metrics.json").read_text())
    found = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert found["ocr_accuracy"] == round(measured["ocr_accuracy"], 4)
    mean, low, high = (measured[f"ocr_accuracy{end}"] for end in ("", "_low", "_high"))
    assert f"| {mean:.3f} [{low:.3f}, {high:.3f}] |" in card.text
    assert "![grid](images/grid.png)" in card.text
    config = json.loads((folder / "config.json").read_text())
    assert config["canvas"]["width"] == SETTINGS["model"]["width"]
    assert config["adapter"]["style_dim"] == 16


def test_the_folders_adapter_paints_what_the_run_paints(folder, tmp_path, random_model, cases):
    from calligrapher.data.dataset import load_cases

    write_hub_folder("first", folder, license="other", runs_dir=tmp_path)
    case = load_cases(str(cases / "evaluation"), "self", tmp_path)[0]
    run = open_painter("first", runs_dir=tmp_path)
    config = json.loads((folder / "config.json").read_text())
    assert config["noise_level"] == 0.5
    assert " --noise-level 0.5 " in (folder / "README.md").read_text()
    alone = open_painter(
        base=config["base"],
        siglip=str(random_model / "siglip"),
        adapter=str(adapter_file(str(folder / "calligrapher.safetensors"), tmp_path)),
        num_steps=config["num_inference_steps"],
        noise_level=config["noise_level"],
        guidance_scale=config["guidance_scale"],
        max_sequence_length=config["max_sequence_length"],
        device="cpu",
        **config["canvas"],
    )
    (wanted,), (found,) = (
        run.paint("trained", case, seeds=[1]),
        alone.paint("base", case, seeds=[1]),
    )
    assert found.tobytes() == wanted.tobytes()


def test_a_licence_is_taken_from_the_base_and_must_be_told(
    folder, train, tmp_path, random_model, monkeypatch
):
    with pytest.raises(ParamsError, match="--license must name the licence of what was trained"):
        write_hub_folder("first", folder, runs_dir=tmp_path)
    assert not folder.exists()
    with pytest.raises(ParamsError, match="--to hub needs a run"):
        write_hub_folder(str(random_model / "calligrapher.bin"), folder, license="other")
    base = shutil.copytree(random_model / "flux-fill", tmp_path / "base")
    (base / "LICENSE.md").write_text("theirs")
    train("second", **RUN, model={"base": str(base)})
    write_hub_folder("second", folder, license="other", runs_dir=tmp_path)
    assert (folder / "LICENSE").read_text() == "theirs"
    with pytest.raises(ParamsError, match="must not be there yet"):
        write_hub_folder("second", folder, license="apache-2.0", runs_dir=tmp_path)
    write_hub_folder("second", folder, license="apache-2.0", runs_dir=tmp_path, force=True)
    assert "Apache License" in (folder / "LICENSE").read_text()
