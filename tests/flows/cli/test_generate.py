"""`calligrapher generate`: files and their settings, going on, datasets, mistakes."""

import json
import logging
import shutil

import numpy as np
import pytest
from PIL import Image

from flows.cli.main import main


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    from calligrapher.tiny.world import write_bench

    return write_bench(tmp_path_factory.mktemp("bench"), num_cases=3, split="evaluation", seed=2)


@pytest.fixture
def generate(random_model, tmp_path, capsys, monkeypatch):
    """`generate("--seed", "3")` -> (exit status, lines printed, what is said of mistakes)."""
    # Prefect's log handler may hold the closed stream of an earlier test.
    monkeypatch.setattr(logging, "raiseExceptions", False)

    def generate(*options, adapter=random_model / "calligrapher.bin"):
        model = ["--base", random_model / "flux-fill", "--siglip", random_model / "siglip"]
        small = ["--width", 48, "--height", 32, "--steps", 2, "--max-sequence-length", 24]
        given = [
            "generate",
            *model,
            "--adapter",
            adapter,
            *small,
            "--out",
            tmp_path / "out",
            *options,
        ]
        status = main([str(value) for value in given])
        printed, said = capsys.readouterr()
        assert "Traceback" not in said
        return status, printed.splitlines(), said

    return generate


@pytest.fixture
def one(bench):
    """The options of a single case."""
    names = {"image": "source", "mask": "mask", "reference": "ref"}
    files = [(f"--{option}", bench / f"test1_{name}.png") for option, name in names.items()]
    return [*(item for pair in files for item in pair), "--text", "AB-1"]


def chunk(path):
    return json.loads(Image.open(path).text["calligrapher"])


def test_one_case_gives_a_picture_per_seed_that_says_how_it_was_made(
    generate, one, bench, tmp_path
):
    status, printed, _ = generate(*one, "--seed", 5, "--num-images", 2, "--scale", 0.5)
    assert status == 0
    written = sorted((tmp_path / "out").iterdir())
    assert len(written) == 3
    assert [*map(str, written)] == sorted(printed)
    assert printed[0].endswith("-seed5.png")
    assert printed[-1].endswith("/sheet-1.png")
    settings = [chunk(path) for path in printed[:2]]
    assert [s["seed"] for s in settings] == [5, 6]
    assert {s["text"] for s in settings} == {"AB-1"}
    assert {(s["scale"], s["num_steps"], s["variant"]) for s in settings} == {(0.5, 2, "base")}
    assert len({s["weights"] for s in settings}) == 1
    assert len(settings[0]["weights"]) == 64
    source, mask = (
        np.asarray(Image.open(bench / f"test1_{name}.png")) for name in ("source", "mask")
    )
    for path in printed[:2]:
        assert (np.asarray(Image.open(path))[mask < 128] == source[mask < 128]).all()


def test_a_stopped_call_goes_on_and_other_settings_paint_anew(generate, bench, tmp_path):
    options = ["--bench", bench, "--num-images", 2]
    status, printed, _ = generate(*options)
    assert (status, len(printed)) == (0, 3 * 2 + 1)
    files = [tmp_path / "out" / path.split("/")[-1] for path in printed[:-1]]
    first = {path: path.read_bytes() for path in files}
    times = {path: path.stat().st_mtime_ns for path in files}
    files[1].unlink()
    files[3].write_bytes(first[files[3]][:-40])  # as a crash of another program would leave it
    assert generate(*options)[0] == 0
    assert {path: path.read_bytes() for path in files} == first
    assert {path for path in files if path.stat().st_mtime_ns != times[path]} == {
        files[1],
        files[3],
    }

    assert generate(*options, "--feather", 0)[0] == 0
    assert {chunk(path)["feather"] for path in files} == {0}
    assert not list((tmp_path / "out").glob(".*"))


def test_cross_cases_are_named_by_their_reference(generate, bench, tmp_path):
    folder = shutil.copytree(bench, tmp_path / "cross")
    (folder / "cross_bench.txt").write_text("1-2,3-HELLO\n")
    status, printed, _ = generate("--bench", folder, "--kind", "cross", "--num-images", 1)
    assert status == 0
    assert [p.split("/")[-1] for p in printed] == [
        "test1-ref2-HELLO-seed0.png",
        "test1-ref3-HELLO-seed0.png",
        "sheet-1.png",
    ]


@pytest.fixture
def large(one, tmp_path):
    """The options of a case whose mask is larger than the canvas, in a still larger picture."""
    source, mask = Image.linear_gradient("L").resize((301, 173)), Image.new("L", (301, 173))
    mask.paste(255, (100, 70, 170, 95))
    source.save(tmp_path / "source.png")
    mask.save(tmp_path / "mask.png")
    return changed(changed(one, "image", tmp_path / "source.png"), "mask", tmp_path / "mask.png")


OPTIONS = (
    "--scale 0.3",
    "--no-crop",
    "--grow 2.5",
    "--feather 0",
    "--steps 3",
    "--noise-level 1",
    "--guidance 9",
    "--seed 1",
)
OPTIONS += ("--width 64", "--height 64", "--context", "--mixed-precision bf16")


def test_every_option_shows_in_the_picture_and_in_its_settings(generate, large):
    seen = {}
    for option in ("--device cpu", *OPTIONS):
        status, printed, _ = generate(*large, "--num-images", 1, *option.split())
        assert status == 0
        seen[option] = Image.open(printed[0]).tobytes(), json.dumps(chunk(printed[0]))
    pictures, settings = ({s[i] for s in seen.values()} for i in (0, 1))
    assert len(pictures) == len(settings) == len(seen)


def test_the_embedded_model_is_what_is_painted_with_when_nothing_is_named(one, tmp_path, capsys):
    out = tmp_path / "fresh"
    assert main([str(v) for v in ("generate", *one, "--num-images", 1, "--out", out)]) == 0
    path = capsys.readouterr().out.splitlines()[0]
    found = chunk(path)
    assert found["canvas"] == {"width": 96, "height": 32, "reference_context": False}
    assert (found["guidance_scale"], found["num_steps"]) == (3.5, 8)


def changed(options, name, value):
    at = options.index(f"--{name}")
    return [*options[: at + 1], value, *options[at + 2 :]]


def pictures(folder):
    """Broken or unfitting pictures, by name."""
    Image.new("L", (40, 32), 255).save(folder / "narrow.png")
    Image.new("L", (96, 32)).save(folder / "empty.png")
    Image.new("L", (96, 32), 255).save(folder / "full.png")
    Image.new("RGBA", (96, 32), (255, 255, 255, 100)).save(folder / "clear.png")
    (folder / "broken.png").write_bytes(b"no picture")
    return folder


MISTAKES = {
    "a mask of another size": (
        "mask",
        "narrow.png",
        ["as large as its source, 96x32. Found 40x32"],
    ),
    "an empty mask": ("mask", "empty.png", ["must have a white pixel", "Found none"]),
    "a mask over everything": ("mask", "full.png", ["must keep a part of the source"]),
    "a mask with alpha": ("mask", "clear.png", ["must be an opaque mask"]),
    "a broken reference": ("reference", "broken.png", ["broken.png must be an image"]),
    "no picture": ("image", "nothing.png", ["nothing.png must be an image file. Found nothing"]),
    "a text of two lines": ("text", "A\nB", ["text must be one line"]),
    "an empty text": ("text", "", ["text must have a visible character"]),
    "a text of surrogates": ("text", "A\udc80", ["text must be one line"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_case_that_cannot_be_painted_is_told_before_a_model_is_loaded(
    generate, one, tmp_path, mistake, monkeypatch
):
    monkeypatch.setattr("tasks.inference.painter.open_painter", None)
    option, value, words = MISTAKES[mistake]
    if option != "text":
        value = pictures(tmp_path) / value
    status, _, said = generate(*changed(one, option, value))
    assert status == 2
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


SETTINGS = {
    "no picture": (["--num-images", 0], ["num_images must be at least 1"]),
    "a seed below 0": (["--seed", -1], ["seed must be at least 0"]),
    "a scale that is no number": (["--scale", "nan"], ["scale must be a finite number"]),
    "a crop smaller than the mask": (["--grow", 0.5], ["grow must be at least 1"]),
    "a width that the VAE cannot have": (
        ["--width", 50],
        ["model.width must be a multiple of 8", "48, 56"],
    ),
    "no step": (["--steps", 0], ["steps must be at least 1"]),
    "more noise than there is": (["--noise-level", 1.5], ["evaluate.noise_level must be"]),
    "a device of another machine": (["--device", "cuda:99"], ["model.device", "cuda:99"]),
    "a text that is too long": (["--text", "Z" * 30], ["model.max_sequence_length = 24", "ZZZ"]),
    "trained weights without a run": (
        ["--variant", "trained"],
        ["must be base here. Got 'trained'"],
    ),
    "a run and an adapter": (["--run", "first"], ["--base and --siglip and --adapter", "--run"]),
    "two kinds of cases": (
        ["--bench", "here"],
        ["Got --image, --mask, --reference, --text, --bench"],
    ),
    "a model that is not there": (["--base", "/nowhere"], ["/nowhere must be there"]),
}


@pytest.mark.parametrize("mistake", SETTINGS)
def test_a_wrong_setting_is_told(generate, one, mistake, tmp_path):
    options, words = SETTINGS[mistake]
    status, _, said = generate(*one, *options)
    assert status == 2
    assert all(word in said for word in words), said
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_other_sizes_is_told(generate, one):
    from calligrapher.tiny.pack import DATA

    status, _, said = generate(*one, adapter=DATA / "calligrapher.bin")
    assert status == 2
    assert "must fit this model" in said
    assert "wrong shape" in said


def test_an_unknown_run_is_told(one, tmp_path, capsys):
    status = main(
        [str(v) for v in ("generate", *one, "--run", "nobody", "--out", tmp_path / "out")]
    )
    assert status == 2
    assert "nobody must name a run on this disk" in capsys.readouterr().err


def test_all_broken_cases_of_a_bench_are_told_before_one_is_painted(generate, bench, tmp_path):
    folder = shutil.copytree(bench, tmp_path / "bench")
    for number in (1, 3):
        (folder / f"test{number}_ref.png").write_bytes(b"no picture")
    status, printed, said = generate("--bench", folder)
    assert (status, printed) == (2, [])
    assert "test1_ref.png" in said
    assert "test3_ref.png" in said
    assert not (tmp_path / "out").exists()


def test_a_file_in_the_place_of_the_folder_is_told(generate, one, tmp_path, monkeypatch):
    monkeypatch.setattr("tasks.inference.painter.open_painter", None)  # before a model is loaded
    (tmp_path / "out").write_text("mine")
    status, _, said = generate(*one)
    assert status == 2
    assert "need a folder" in said
    assert (tmp_path / "out").read_text() == "mine"


def test_the_warm_up_may_be_spelt_as_in_prose(generate, one):
    status, _, said = generate(*one, "--variant", "warm-up")
    assert (status, "The weights must be base here. Got 'warmup'" in said) == (2, True)


# --- without a source picture ---


def test_an_empty_picture_is_painted_in_its_place_and_keeps_its_colour_elsewhere(
    generate, bench, tmp_path
):
    style = ["--reference", bench / "test1_ref.png", "--text", "AB-1", "--num-images", 1]
    status, printed, _ = generate("--size", "60x40", "--color", "#204080", *style)
    assert status == 0
    painted = np.asarray(Image.open(printed[0]).convert("RGB"))
    assert painted.shape == (40, 60, 3)
    inside = np.zeros((40, 60), dtype=bool)
    inside[5:35, 5:55] = True
    assert (painted[~inside] == (0x20, 0x40, 0x80)).all()
    assert (painted[inside] != (0x20, 0x40, 0x80)).any(axis=1).mean() > 0.5
    assert (tmp_path / "out/blank-60x40-204080.png").is_file()
    _, full, _ = generate("--size", "60x40", "--place", "full", *style)
    corners = np.asarray(Image.open(full[0]).convert("RGB"))[::39, ::59]
    assert (corners != 255).any()


def test_an_empty_picture_is_no_picture_besides_another(generate, one, bench, tmp_path):
    style = ["--reference", bench / "test1_ref.png", "--text", "AB-1"]
    for options, said in {
        ("--size", "60x40", *one): "Got --image, --mask, --reference, --text, --size.",
        ("--color", "red", *one): "There must be --image, --mask, --reference, --text; or --size, ",
        ("--size", "60", *style): "A size must be WIDTHxHEIGHT",
        (
            "--size",
            "60x40",
            "--reference",
            tmp_path / "none.png",
            "--text",
            "A",
        ): "none.png must be",
    }.items():
        status, _, told = generate(*options)
        assert status == 2
        assert said in told
    assert not (tmp_path / "out").exists()
