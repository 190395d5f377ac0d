"""`calligrapher plan`, as a person calls it."""

import json
from pathlib import Path

import pytest

from flows.cli.main import main

ROOT = Path(__file__).parents[3]


def test_plan_tells_people_a_table_and_programs_json(capsys):
    nft = str(ROOT / "params/nft.yaml")
    assert main(["plan", nft]) == 0
    told = capsys.readouterr().out
    assert "11,902,391,360" in told
    assert "GPU memory, GiB" in told
    assert max(map(len, told.splitlines()[4:])) <= 90
    assert "fits: h100" in told
    assert main(["plan", nft, "model.mixed_precision=no", "--gpu", "a100-80", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["fits"]
    assert "model.mixed_precision=bf16" in found["changes"]
    assert found["needed_after_gib"] <= found["gpu_gib"]
    assert [stage["stage"] for stage in found["stages"]] == ["rollout", "update"]


def test_a_round_that_may_be_refilled_has_a_range_of_images_and_of_seconds(capsys):
    def table(*settings):
        assert main(["plan", "tiny-grpo", *settings, "--tflops", "1"]) == 0
        told = capsys.readouterr().out
        names, values = told.splitlines()[-2:]
        return (
            told,
            names.split()[-2:],
            [float(v) for v in values.replace("%", "").split() if v != "-"],
        )

    told, names, plain = table()
    assert names == ["GPU", "h"]
    assert "with its refills" not in told
    told, names, filled = table("rollout.refill=3")
    assert names == ["to", "s"]
    assert filled[:-1] == plain, "without refills it takes what it took"
    assert filled[-1] == pytest.approx(plain[3] + 3 * plain[1], abs=0.3)
    assert main(["plan", "tiny-grpo", "rollout.refill=3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["most_images"] == 4 * found["images"]
    assert (
        f"{found['images']} images a round, up to {found['most_images']} with its refills" in told
    )


def test_a_mistake_is_one_line(capsys):
    assert main(["plan", str(ROOT / "params/nft.yaml"), "--gpu", "abacus"]) == 2
    assert capsys.readouterr().err.startswith("ParamsError: --gpu must be one of")
    assert main(["plan", "nowhere.yaml"]) == 2
    assert "nowhere.yaml must be a readable params file" in capsys.readouterr().err


def test_a_shipped_file_is_planned_by_its_bare_name_from_any_folder(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["plan", "tiny-nft", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["fits"]
    assert main(["plan", "tiny-nfd"]) == 2
    assert "tiny-nfd must be a readable params file, or the name" in capsys.readouterr().err
