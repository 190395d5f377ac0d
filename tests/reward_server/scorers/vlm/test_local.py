"""A Qwen2.5-VL of a few thousand random weights: built here, written in the published layout,
loaded."""

import random

import numpy as np
import pytest

from reward_server.scorers.base import Item
from reward_server.scorers.vlm.local import LocalVLMScorer
from reward_server.scorers.vlm.question import Question


@pytest.fixture(scope="module")
def folder(qwen_folder):
    return qwen_folder


def load(folder, mode="expectation", **options) -> LocalVLMScorer:
    defaults = {"device": "cpu", "max_batch": 4, "max_wait_s": 0.0, "min_mass": 0.0}
    return LocalVLMScorer.load(folder, Question.load(mode), **{**defaults, **options})


@pytest.fixture(scope="module")
def scorer(folder):
    return load(folder)


def item(seed: int, *, size=(24, 40), text="abc", reference=False) -> Item:
    pixels = np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)
    return Item(pixels, pixels, text, reference=pixels[::2] if reference else None)


def test_the_score_is_an_expectation_and_depends_on_picture_text_and_reference(scorer):
    variants = [item(1), item(2), item(1, text="abd"), item(1, reference=True)]
    scores = [scorer.score_items([one])[0].values["vlm_score"] for one in variants]
    assert all(0 < score < 1 for score in scores)
    assert len(set(scores)) == 4


def test_scores_are_bit_identical_alone_in_any_batch_in_any_order(scorer):
    items = [
        item(seed, size=(8 + 4 * seed, 24), text="x" * seed, reference=seed % 2 == 0)
        for seed in range(1, 7)
    ]
    alone = [scorer.score_items([one])[0] for one in items]
    for seed in range(3):
        order = random.Random(seed).sample(range(6), 6)
        assert scorer.score_items([items[place] for place in order]) == [
            alone[place] for place in order
        ]


def test_left_padding_does_not_move_the_score(scorer):
    items = [
        item(1, text="a"),
        item(2, size=(40, 48), text="a longer text", reference=True),
        item(3),
    ]
    together = [outcome.values["vlm_score"] for outcome in scorer.score_together(items)]
    alone = [scorer.score_together([one])[0].values["vlm_score"] for one in items]
    assert together == pytest.approx(alone, abs=1e-5)
    lengths = [len(scorer.encode(one).ids) for one in items]
    assert len(set(lengths)) == 3  # otherwise nothing was padded


def test_each_picture_has_one_token_per_merged_patch(scorer):
    encoded = scorer.encode(item(1, size=(32, 48), reference=True))
    pads = encoded.ids.count(scorer._image_id)
    assert pads == int((encoded.grids.prod(dim=1) // 4).sum())
    assert encoded.pixels.shape[0] == 4 * pads


def test_special_tokens_in_the_text_stay_text(scorer):
    encoded = scorer.encode(item(1, text="<|im_end|><|image_pad|>"))
    plain = scorer.encode(item(1, text="x"))
    assert encoded.ids.count(scorer._image_id) == plain.ids.count(scorer._image_id)
    assert scorer.score_items([item(1, text="<|im_end|><|image_pad|>")])[0].values


def test_a_model_that_would_not_answer_with_a_digit_gives_no_score(folder):
    (outcome,) = load(folder, min_mass=0.5).score_items([item(1)])
    assert outcome.values == {}
    assert "probability" in outcome.errors["vlm_score"]


def test_generate_mode_parses_what_is_written(folder, monkeypatch):
    scorer = load(folder, "generate")
    monkeypatch.setattr("reward_server.scorers.vlm.local._MAX_NEW_TOKENS", 3)
    assert (
        "<Score>" in scorer.score_items([item(1)])[0].errors["vlm_score"]
    )  # random weights write noise
    monkeypatch.setattr(scorer, "_answers", lambda inputs: ["Good. <Score>8</Score>"])
    assert scorer.score_items([item(1)])[0].values == {"vlm_score": 0.8}


def test_info_names_engine_weights_and_prompt(folder, scorer):
    info = scorer.info
    assert info["engine"].startswith("transformers ")
    assert len(info["sha256"]) == len(info["prompt_sha256"]) == 64
    assert load(folder).info == info


def test_a_folder_without_a_model_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="vlm_model_path must be"):
        load(tmp_path)
