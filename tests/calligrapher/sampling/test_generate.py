"""Painting one case: sizes, untouched pixels, equality with a rollout's picture, encoder calls, bad
input."""

import numpy as np
import pytest
import torch
from PIL import Image

from calligrapher.data.canvas import Canvas
from calligrapher.data.case import Case
from calligrapher.errors import DataError
from calligrapher.model.conditioning import ConditioningCache
from calligrapher.model.ip_adapter import scaled, set_scale
from calligrapher.model.loading import load_model, pictures
from calligrapher.sampling.generate import generate, look, paint
from calligrapher.sampling.sampler import sample

CANVAS = Canvas(48, 32)


@pytest.fixture(scope="module")
def model(random_model):
    return load_model(
        random_model / "flux-fill",
        random_model / "siglip",
        random_model / "calligrapher.bin",
        digest="random",
        guidance_scale=3.5,
        max_sequence_length=24,
        device="cpu",
    )


@pytest.fixture
def draw(tmp_path):
    """`draw(size, *boxes, text="AB")` -> a case of noise with white `boxes` in its mask."""

    def draw(size, *boxes, text="AB", **changes):
        rng = np.random.default_rng(7)
        files = {role: tmp_path / f"{role}.png" for role in ("source", "mask", "reference")}
        for role, (width, height) in (("source", size), ("reference", (50, 40))):
            Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(
                files[role]
            )
        mask = Image.new("L", size)
        for box in boxes:
            mask.paste(255, box)
        mask.save(files["mask"])
        return Case(case_id="one", text=text, **(files | changes))

    return draw


def pixels(image):
    return np.asarray(image).astype(int)


@pytest.mark.parametrize("crop", [True, False])
@pytest.mark.parametrize(
    ("size", "boxes"),
    [
        ((301, 173), [(250, 150, 301, 173)]),
        ((199, 77), [(0, 20, 199, 40)]),
        ((400, 301), [(30, 40, 60, 60), (100, 50, 131, 61)]),
        ((31, 19), [(3, 3, 20, 12)]),
    ],
)
def test_every_picture_is_as_large_as_the_source_and_only_the_mask_changes(
    model, draw, size, boxes, crop
):
    case = draw(size, *boxes)
    images = generate(model, case, [1, 2, 3], num_steps=2, canvas=CANVAS, crop=crop, batch_size=2)
    assert [image.size for image in images] == [size] * 3
    source, white = pixels(Image.open(case.source)), pixels(Image.open(case.mask)) == 255
    for image in images:
        assert (pixels(image)[~white] == source[~white]).all()
        assert (pixels(image)[white] != source[white]).any()
    assert (pixels(images[0]) != pixels(images[1])).any()


def test_a_seed_gives_the_same_picture_alone_and_beside_others(model, draw):
    case = draw((100, 60), (30, 20, 60, 40))
    three = generate(model, case, [4, 5, 6], num_steps=2, canvas=CANVAS)
    (alone,) = generate(model, case, [5], num_steps=2, canvas=CANVAS)
    assert abs(pixels(three[1]) - pixels(alone)).max() <= 1


def test_a_source_as_large_as_the_canvas_is_painted_as_a_rollout_paints_it(model, draw):
    case = draw((48, 32), (10, 8, 40, 24))
    conditioning = ConditioningCache(model.encoders, CANVAS, model.device).batch([case] * 2)
    wanted = pictures(model, sample(model.policy, conditioning, [8, 9], 3).x0, CANVAS)
    found = generate(model, case, [8, 9], num_steps=3, canvas=CANVAS, feather=0)
    white = pixels(Image.open(case.mask)) == 255
    for image, rollouts in zip(found, wanted, strict=True):
        assert (pixels(image)[white] == pixels(rollouts)[white]).all()


def test_the_model_sees_the_crop_as_it_is_and_not_the_rest(model, draw, tmp_path):
    case = draw((200, 100), (80, 40, 110, 60))
    small = tmp_path / "small"
    small.mkdir()
    box = look(model, case, CANVAS).box
    assert (box[2] - box[0], box[3] - box[1]) == (48, 32)
    for role in ("source", "mask"):
        Image.open(getattr(case, role)).crop(box).save(small / f"{role}.png")
    cut = case.model_copy(update={role: small / f"{role}.png" for role in ("source", "mask")})
    found, wanted = (generate(model, c, [3], num_steps=2, canvas=CANVAS)[0] for c in (case, cut))
    assert (pixels(found.crop(box)) == pixels(wanted)).all()


def test_with_reference_context_the_strip_is_cut_off_again(model, draw):
    case = draw((200, 100), (80, 40, 110, 60))
    with_strip = Canvas(48, 32, reference_context=True)
    found = [
        generate(model, case, [3], num_steps=2, canvas=canvas)[0] for canvas in (CANVAS, with_strip)
    ]
    assert found[1].size == (200, 100)
    assert (pixels(found[0]) != pixels(found[1])).any()


def test_the_scale_weighs_the_style_and_is_put_back(model, draw):
    case = draw((48, 32), (4, 4, 44, 28))
    processors = model.policy.model.transformer.attn_processors.values()
    set_scale(model.policy.model.transformer, 0.75)
    try:
        scene = look(model, case, CANVAS)
        none, half, full = (
            paint(model, scene, [1], num_steps=2, scale=s)[0] for s in (0.0, 0.5, 1.0)
        )
        assert {p.scale for p in processors} == {0.75}
        assert 0 < abs(pixels(half) - pixels(none)).sum() < abs(pixels(full) - pixels(none)).sum()
        with pytest.raises(KeyboardInterrupt), scaled(model.policy.model.transformer, 2.0):
            raise KeyboardInterrupt
        assert {p.scale for p in processors} == {0.75}
    finally:
        set_scale(model.policy.model.transformer, 1.0)


# --- input as it comes ---


def test_a_turned_photo_takes_a_mask_in_upright_coordinates(model, draw, tmp_path):
    case = draw((100, 60), (70, 10, 95, 50))
    upright = Image.open(case.source)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned = tmp_path / "turned.png"
    upright.transpose(Image.Transpose.ROTATE_90).save(turned, exif=exif)
    assert Image.open(turned).size == (60, 100)
    photo = case.model_copy(update={"source": turned})
    found, wanted = (generate(model, c, [1], num_steps=2, canvas=CANVAS)[0] for c in (photo, case))
    assert found.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("mode", ["RGBA", "CMYK", "L", "P"])
def test_a_reference_may_have_any_mode(model, draw, tmp_path, mode):
    case = draw((48, 32), (4, 4, 44, 28))
    path = tmp_path / ("reference.tif" if mode == "CMYK" else "other.png")
    Image.open(case.reference).convert(mode).save(path)
    (image,) = generate(
        model, case.model_copy(update={"reference": path}), [1], num_steps=2, canvas=CANVAS
    )
    assert image.mode == "RGB"


@pytest.mark.parametrize("text", ["'s\"", "ÄÖ", "5% {x}"])
def test_the_text_is_put_into_the_prompt_as_it_is(model, draw, text):
    assert generate(
        model, draw((48, 32), (4, 4, 44, 28), text=text), [1], num_steps=2, canvas=CANVAS
    )


def test_a_mask_over_everything_paints_everything(model, draw):
    case = draw((48, 32), (0, 0, 48, 32))
    conditioning = ConditioningCache(model.encoders, CANVAS, model.device).batch([case])
    (wanted,) = pictures(model, sample(model.policy, conditioning, [1], 2).x0, CANVAS)
    (found,) = generate(model, case, [1], num_steps=2, canvas=CANVAS)
    assert found.tobytes() == wanted.tobytes()


def test_what_cannot_be_painted_is_told(model, draw, tmp_path):
    good = draw((48, 32), (4, 4, 44, 28))
    wrong = tmp_path / "wrong.png"
    for mask, words in (
        (
            Image.new("L", (47, 32), 255),
            r"wrong.png must be as large as its source, 48x32. Found 47x32",
        ),
        (Image.new("L", (48, 32)), "A mask must have a white pixel"),
    ):
        mask.save(wrong)
        with pytest.raises(DataError, match=words):
            generate(
                model, good.model_copy(update={"mask": wrong}), [1], num_steps=2, canvas=CANVAS
            )
    with pytest.raises(DataError, match=r"must fit into model\.max_sequence_length = 24"):
        generate(
            model, draw((48, 32), (4, 4, 44, 28), text="Z" * 99), [1], num_steps=2, canvas=CANVAS
        )


# --- how often each network is asked ---


def test_each_encoder_is_asked_once_and_the_transformer_once_per_step_and_batch(
    model, draw, count_calls
):
    case = draw((301, 173), (100, 60, 140, 80))
    with count_calls(model) as calls:
        generate(model, case, [1, 2, 3, 4, 5], num_steps=3, canvas=CANVAS, batch_size=2)
    encoders = {"clip": 1, "t5": 1, "siglip": 1, "vae_encode": 1}
    assert calls == encoders | {"transformer": 3 * 3, "vae_decode": 3}


def test_a_scene_is_painted_again_without_an_encoder(model, draw, count_calls):
    scene = look(model, draw((301, 173), (100, 60, 140, 80)), CANVAS)
    with count_calls(model) as calls:
        for scale in (0.5, 1.0):
            paint(model, scene, [1, 2], num_steps=3, scale=scale)
    assert calls == {"transformer": 6, "vae_decode": 2}


def test_latents_are_decoded_in_one_batch(model, count_calls):
    with count_calls(model) as calls:
        assert len(pictures(model, torch.randn(5, 24, 64), CANVAS)) == 5
    assert calls == {"vae_decode": 1}


def test_fresh_noise_moves_what_is_inside_of_the_mask_and_nothing_else(model, draw):
    case = draw((48, 32), (8, 8, 40, 24))
    ode, again, little, fresh = (
        pixels(generate(model, case, [3], num_steps=4, canvas=CANVAS, noise_level=level)[0])
        for level in (0.0, 0.0, 0.01, 1.0)
    )
    inside = np.zeros(ode.shape[:2], dtype=bool)
    inside[8:24, 8:40] = True
    assert (ode == again).all()
    assert (fresh[~inside] == ode[~inside]).all()
    assert np.abs(fresh - ode)[inside].mean() > 5 * np.abs(little - ode)[inside].mean() > 0


def test_one_step_has_no_noise_to_make_fresh(model, draw):
    case = draw((48, 32), (8, 8, 40, 24))
    ode, fresh = (
        pixels(generate(model, case, [3], num_steps=1, canvas=CANVAS, noise_level=level)[0])
        for level in (0.0, 1.0)
    )
    assert (ode == fresh).all()
