"""The likeness of looks, and that the embedded SigLIP sees what it says."""

import numpy as np
import pytest

from calligrapher.tiny import world
from calligrapher.tiny.looks import Look, draw, lab, likeness
from calligrapher.tiny.pack import DATA
from reward_server.scorers.style import StyleScorer

INK = (0.5, 0.1, 0.15)
FONTS = np.eye(len(world.FONTS))


def look(font=0, ink=INK, weight=0.0):
    return Look(ink, tuple(FONTS[font]), weight)


def test_lab_has_the_published_values_of_red_and_white():
    assert lab(np.array([1.0, 0.0, 0.0])) == pytest.approx([53.24, 80.09, 67.20], abs=0.05)
    assert lab(np.ones(3)) == pytest.approx([100, 0, 0], abs=0.05)


def test_likeness_is_half_ink_and_half_font_and_none_is_like_no_word():
    far = (0.0, 0.35, 0.5)
    found = likeness([look(), look(), look(font=1), look(ink=far), look(weight=1.0), None])
    assert found[0, 1] == pytest.approx(1)
    assert found[0, 2] == pytest.approx(0.5)
    assert found[0, 3] == pytest.approx(0.5, abs=0.05)
    assert found[0, 4] == pytest.approx(np.exp(-2))
    assert found[0, 5] == 0
    assert found[5, 5] == 1
    assert np.linalg.eigvalsh(found).min() > -1e-9  # cosines of vectors can have these values


@pytest.fixture(scope="module")
def scorer():
    return StyleScorer.load(DATA / "siglip", device="cpu", max_wait_s=0.0)


def crop(picture):
    return np.asarray(world.to_image(picture[world.TOP : world.BOTTOM, world.LEFT :]))


def style_on(paper_seed, light=True):
    rng = np.random.default_rng(paper_seed)
    style = world.random_style(rng, "evaluation")
    while style.on_light != light:
        style = world.random_style(rng, "evaluation")
    return style


def held_out(count):
    """Looks of styles that the tower has not seen, each on its own light paper."""
    return [(Look.of(style := style_on(seed)), world.paper(style)) for seed in range(count)]


def scores(scorer, pictures, references):
    seen, shown = (scorer.embed([crop(p) for p in many]) for many in (pictures, references))
    return np.array([scorer.match(a, b) for a, b in zip(seen, shown, strict=True)])


@pytest.mark.parametrize("part", ["ink", "font", "weight"])
def test_style_rises_step_by_step_from_wrong_to_right(scorer, part):
    pairs = held_out(12)
    references = [draw(paper, "REFER", right) for right, paper in pairs]
    wrongs = {
        "ink": [right.but(ink=tuple(0.6 * c + 0.2 for c in right.ink[::-1])) for right, _ in pairs],
        "font": [right.but(fonts=right.fonts[3:] + right.fonts[:3]) for right, _ in pairs],
        "weight": [right.but(weight=-1.0) for right, _ in pairs],
    }[part]
    means = []
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        painted = [
            draw(paper, "QUIET", wrong.towards(right, share))
            for wrong, (right, paper) in zip(wrongs, pairs, strict=True)
        ]
        means.append(scores(scorer, painted, references).mean())
    assert np.all(np.diff(means) > 0), means
    assert means[-1] >= 0.9
    assert means[-1] - means[0] >= 0.25


@pytest.mark.parametrize("part", ["paper", "word", "place"])
def test_paper_word_and_place_do_not_move_style(scorer, part):
    pairs = held_out(24)
    references = [draw(paper, "REFER", right) for right, paper in pairs]
    plain = [draw(paper, "QUIET", right) for right, paper in pairs]
    moved = {
        "paper": [
            draw(world.paper(style_on(i + 1000)), "QUIET", look)
            for i, (look, _) in enumerate(pairs)
        ],
        "word": [draw(paper, "MXK", right) for right, paper in pairs],
        "place": [draw(paper, "QUIET", right, (1, 5)) for right, paper in pairs],
    }[part]
    change = scores(scorer, moved, references) - scores(scorer, plain, references)
    assert abs(change.mean()) <= 0.05
