"""The benchmarks with a few pictures: they run, and what they show holds already there."""

import json

import pytest
from PIL import Image

from reward_server.bench.__main__ import main
from reward_server.bench.cases import item_of, load
from reward_server.bench.draw import RIGHT, WRONG
from reward_server.bench.pictures import picture


def run(capsys, *arguments: str) -> dict:
    assert main(arguments) == 0
    return json.loads(capsys.readouterr().out)


def test_accuracy_and_likelihood_order_the_pictures_and_confidence_does_not(capsys):
    found = run(capsys, "heldout", "--count", "40")
    for part in ("accuracy", "likelihood"):
        assert found["right"][part] > found["one_wrong"][part] > found["mirrored"][part]
    assert found["mirrored"]["accuracy"] > found["empty"]["accuracy"]
    assert found["one_wrong"]["confidence"] > 0.95 * found["right"]["confidence"]


def test_labelled_pictures_are_counted_by_kind(capsys, tmp_path):
    labelled = []
    for name, verdict, painted in (("a", "right", "river"), ("b", "wrong", "rover")):
        picture(painted, (112, 36)).save(tmp_path / f"{name}.png")
        Image.new("1", (112, 36), 1).save(tmp_path / f"{name}.mask.png")
        labelled.append({"id": name, "kind": verdict, "verdict": verdict, "target": "river"})
    (tmp_path / "cases.json").write_text(json.dumps(labelled))
    found = run(capsys, "cases", str(tmp_path), "--threads", "1")
    assert found["all"]["right_below_0.9"] == found["all"]["wrong_at_1.0"] == 0
    assert found["kinds"]["right"] == {
        "right": 1,
        "right_below_0.9": 0,
        "mean_right": 1,
        "no_number": 0,
    }
    assert found["likelihood_ordered"]["loose"] == {"pairs": 1, "share": 1}


def test_a_tight_line_is_read_in_both_ways_by_turns(capsys):
    found = run(capsys, "tight", "--count", "16", "--threads", "1")
    assert found["images"] == 16
    assert found["line"]["cpu_ms_per_image"] > 0
    assert found["auto"]["images_per_s"] > 0
    assert 0 < found["of_line"] < 2  # finding lines is more work, and no other kind of work


def test_a_folder_without_labels_is_refused(capsys, tmp_path):
    with pytest.raises(SystemExit):
        main(["cases", str(tmp_path)])
    assert "must hold cases.json" in capsys.readouterr().err


def test_drawn_pictures_are_labelled_and_another_seed_draws_others(capsys, tmp_path):
    for name, seed in (("a", "5"), ("b", "5"), ("c", "6")):
        found = run(capsys, "draw", str(tmp_path / name), "--seed", seed, "--count", "1")
        assert found["pictures"] == len(RIGHT) + len(WRONG)
    labelled = [load(tmp_path / name) for name in "abc"]
    assert labelled[0] == labelled[1] != labelled[2]
    assert {case["kind"] for case in labelled[0]} == {*RIGHT, *WRONG}
    case = next(case for case in labelled[0] if case["kind"] == "cut by the mask")
    item = item_of(tmp_path / "a", case)
    assert item.image.shape == (384, 384, 3)
    assert 0 < item.mask.mean() < 0.3
    with pytest.raises(SystemExit):
        main(["draw", str(tmp_path / "a")])
    assert "File exists" in capsys.readouterr().err


@pytest.mark.slow
def test_a_killed_server_costs_no_score(capsys):
    found = run(capsys, "faults", "--count", "200", "--threads", "1")
    assert found["killed_on_the_way"] is True
    assert found["scored"] == found["read_right"] == 200
    assert found["zeros"] == 0


@pytest.mark.slow
def test_throughput_and_soak_give_their_figures(capsys):
    found = run(capsys, "throughput", "--count", "64")
    assert 0 < found["of_bare_loop"] < 1.5
    assert (
        found["single_image_requests"]["64"]["p50_ms"]
        > found["single_image_requests"]["1"]["p50_ms"]
    )
    soaked = run(capsys, "soak", "--count", "200")
    assert soaked["last"]["requests"] == 200
    assert soaked["last"]["threads"] == soaked["first"]["threads"]
