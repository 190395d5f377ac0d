import numpy as np
import pytest

from reward_server.scorers.base import Item
from reward_server.scorers.style import StyleScorer, letterbox


@pytest.fixture(scope="module")
def folder(siglip_folder):
    return siglip_folder


@pytest.fixture(scope="module")
def scorer(folder):
    return StyleScorer.load(folder, device="cpu", max_wait_s=0.0)


def picture(seed: int, size=(10, 30)) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)


def item(crop: np.ndarray, reference: np.ndarray | None) -> Item:
    return Item(picture(99), crop, "a", reference=reference)


def test_the_reference_itself_has_cosine_one_and_others_less(scorer):
    same, other = scorer.score_items(
        [item(picture(1), picture(1)), item(picture(1), picture(2, (30, 12)))]
    )
    assert same.values["style_score"] == pytest.approx(1.0, abs=1e-6)
    assert -1 <= other.values["style_score"] < 0.9999


def test_without_a_reference_there_is_no_score_and_the_others_keep_theirs(scorer):
    alone = scorer.score_items([item(picture(1), picture(2))])[0]
    first, second = scorer.score_items([item(picture(3), None), item(picture(1), picture(2))])
    assert first.errors == {"style_score": "no reference was given"}
    assert second == alone


def test_scores_are_bit_identical_alone_and_in_any_batch(scorer):
    items = [item(picture(seed, (6 + seed, 20)), picture(seed + 50)) for seed in range(7)]
    alone = [scorer.score_items([one])[0] for one in items]
    assert scorer.score_items(items) == alone
    assert scorer.score_items(items[::-1]) == alone[::-1]


@pytest.mark.parametrize("size", [(10, 30), (30, 10), (1, 200), (24, 24)])
def test_pictures_are_letterboxed_on_black_without_being_stretched(size):
    box = letterbox(np.full((*size, 3), 255, dtype=np.uint8), 24)
    white = box[:, :, 0] > 0.99
    assert box.shape == (24, 24, 3)
    assert set(np.unique(box)) <= {-1.0, 1.0}
    assert max(white.any(0).sum(), white.any(1).sum()) == 24
    assert white.sum() == pytest.approx(24 * 24 * min(size) / max(size), abs=24)


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="siglip_path must be"):
        StyleScorer.load(tmp_path, device="cpu", max_wait_s=0.0)
