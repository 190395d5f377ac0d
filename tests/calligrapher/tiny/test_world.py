"""The drawn cases: legible, masked where they should be, given by the seed, and held out for
good."""

import numpy as np
import pytest
from PIL import Image

from calligrapher.data.dataset import load_cases
from calligrapher.data.images import mask_box
from calligrapher.tiny import world

SPLITS = ["train", "evaluation"]


def styles_of(split, count=300):
    rng = np.random.default_rng(0)
    return [world.random_style(rng, split) for _ in range(count)]


def words_of(split, count=600):
    rng = np.random.default_rng(0)
    return [world.random_word(rng, split) for _ in range(count)]


def hue_of(colour):
    import colorsys

    return colorsys.rgb_to_hsv(*colour)[0]


def cases_of(split, count=40, seed=0):
    rng = np.random.default_rng(seed)
    return [world.random_case(rng, split) for _ in range(count)]


def luminance(colour):
    return float(np.dot(colour, (0.2126, 0.7152, 0.0722)))


# --- what is held out ---


def test_no_word_is_in_both_splits():
    train, evaluation = (set(words_of(split)) for split in SPLITS)
    assert not train & evaluation
    assert len(train) > 400
    assert len(evaluation) > 300
    assert {len(word) for word in train | evaluation} == {3, 4, 5, 6}
    assert set("".join(train)) == set("".join(evaluation)) == set(world.LETTERS)


def test_no_font_and_hue_are_together_in_both_splits():
    def pairs(split):
        return {(s.font, int(hue_of(s.ink) * world.HUES)) for s in styles_of(split)}

    train, evaluation = pairs("train"), pairs("evaluation")
    assert not train & evaluation
    assert {font for font, _ in train} == set(range(len(world.FONTS)))
    assert len({font for font, _ in evaluation}) >= 4  # One style in six is held out.


def test_a_case_takes_all_its_words_and_styles_from_its_split(monkeypatch):
    seen = []
    for name in ("random_word", "random_style"):
        real = getattr(world, name)
        monkeypatch.setattr(
            world, name, lambda rng, split, real=real: seen.append(split) or real(rng, split)
        )
    cases_of("evaluation", count=5)
    assert len(seen) >= 25
    assert set(seen) == {"evaluation"}


# --- what is drawn ---


@pytest.mark.parametrize("font", range(len(world.FONTS)))
def test_every_letter_is_whole_centred_and_unlike_the_others(font):
    glyphs = {letter: world.glyph(font, letter) for letter in world.LETTERS}
    for letter, glyph in glyphs.items():
        assert glyph.shape == (world.BOTTOM - world.TOP, world.CELL)
        assert glyph.sum() > 15, letter  # In units of fully inked pixels.
        assert glyph.max() > 0.5, letter
        inked = np.argwhere(glyph > 0.25)
        (top, left), (bottom, right) = inked.min(0), inked.max(0)
        assert bottom - top >= 10, letter
        assert top > 0, letter
        assert bottom < glyph.shape[0] - 1, letter
        assert abs((left + right) / 2 - (world.CELL - 1) / 2) <= 1, letter
    different = [
        np.abs(glyphs[a] - glyphs[b]).sum() for a in world.LETTERS for b in world.LETTERS if a < b
    ]
    assert min(different) > 4


def test_ink_and_paper_are_far_apart():
    for style in styles_of("train"):
        for side in style.paper:
            assert abs(luminance(style.ink) - luminance(side)) > 0.1


@pytest.mark.parametrize("split", SPLITS)
def test_the_mask_covers_both_words_and_the_rest_is_the_same(split):
    for case in cases_of(split):
        outside = case.mask[..., None] == 0
        assert np.array_equal(case.source * outside, case.target * outside)
        assert set(np.unique(case.mask)) == {0, 1}
        left, top, right, bottom = mask_box(world.to_image(case.mask))
        assert (left, top, bottom) == (world.LEFT, world.TOP, world.BOTTOM)
        assert right >= world.LEFT + world.CELL * len(case.text)
        assert right <= world.WIDTH
        # A cell whose letter changed differs; the ones behind the text are paper in the target.
        changed = np.abs(case.source - case.target).max(-1)
        assert changed[world.TOP : world.BOTTOM, world.LEFT :].max() > 0.1


def test_the_target_is_the_text_in_the_references_ink_on_the_sources_paper():
    rng = np.random.default_rng(4)
    case = world.random_case(rng, "train")
    rng = np.random.default_rng(4)
    own, wanted = world.random_style(rng, "train"), world.random_style(rng, "train")
    while (sum(own.paper[0]) > 1.5) != (sum(wanted.paper[0]) > 1.5):
        wanted = world.random_style(rng, "train")
    assert np.array_equal(case.target, world.write(world.paper(own), case.text, wanted))
    assert np.array_equal(case.target[:2], world.paper(own)[:2])
    assert np.array_equal(case.reference[:2], world.paper(wanted)[:2])


def test_ink_of_the_reference_is_legible_on_the_paper_of_the_source():
    for case in cases_of("train", count=100):
        plain, inked = case.target[0], case.target[world.TOP : world.BOTTOM]
        paper = luminance(plain.mean(0))
        strongest = max(abs(luminance(pixel) - paper) for pixel in inked.reshape(-1, 3))
        assert strongest > 0.15


# --- seeds and files ---


def test_everything_follows_from_the_seed(tmp_path):
    folders = [
        world.write_bench(tmp_path / name, num_cases=n, split=split, seed=seed)
        for name, n, split, seed in (
            ("a", 3, "train", 0),
            ("b", 3, "train", 0),
            ("more", 5, "train", 0),
            ("seed", 3, "train", 1),
            ("held out", 3, "evaluation", 0),
        )
    ]
    a, b, more, seed, held_out = ({p.name: p.read_bytes() for p in f.iterdir()} for f in folders)
    assert a == b
    pictures = {name for name in a if name.endswith(".png")}
    assert len(pictures) == 12
    assert all(more[name] == a[name] for name in pictures)
    for other in (seed, held_out):
        assert all(other[name] != a[name] for name in pictures if "mask" not in name)
        assert other["self_bench.txt"] != a["self_bench.txt"]


@pytest.mark.parametrize("split", SPLITS)
def test_a_bench_folder_loads_with_its_targets(tmp_path, split):
    folder = world.write_bench(tmp_path / split, num_cases=5, split=split, seed=3)
    cases = load_cases(folder)
    assert len({case.case_id for case in cases}) == 5
    for n, case in enumerate(cases, start=1):
        assert case.target == folder / f"test{n}_target.png"
        assert world.split_of(case.text) == split
        for path in (case.source, case.mask, case.reference, case.target):
            assert Image.open(path).size == (world.WIDTH, world.HEIGHT)
        source, target, mask = (
            np.asarray(Image.open(p)) for p in (case.source, case.target, case.mask)
        )
        assert not np.array_equal(source, target)
        assert np.array_equal(source[mask == 0], target[mask == 0])
