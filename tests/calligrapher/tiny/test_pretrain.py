"""The pretraining: what its steps see, and that it resumes and goes on from a model."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file

from calligrapher.tiny.pretrain import Pool, Recipe, draw_batch, pretrain

RECIPE = Recipe(
    vae_steps=1,
    vae_batch=2,
    text_steps=1,
    text_batch=2,
    siglip_steps=1,
    crop_steps=1,
    siglip_looks=3,
    num_references=3,
    cases_per_reference=2,
    write_steps=2,
    write_batch=5,
    more_steps=1,
    web_steps=2,
)
LETTERS = "ABCDEF"


@pytest.fixture
def pool():
    """Six pictures of one letter each, of three references."""
    return Pool(
        x0=torch.randn(6, 4, 3),
        masked=torch.randn(6, 4, 3),
        style=torch.eye(3),
        reference_of=torch.tensor([0, 0, 1, 1, 2, 2]),
        words=list(LETTERS),
    )


def shares(pool, recipe, *, web):
    """Per row: sigma, whether its caption is wrong, whether its reference is."""
    rows = []
    for step in range(200):
        batch = draw_batch(pool, recipe, step, web=web)
        for row, text, reference, sigma in zip(
            batch.rows.tolist(), batch.captions, batch.references, batch.sigma, strict=True
        ):
            rows.append((sigma, text != pool.words[row], reference != pool.reference_of[row]))
    return torch.tensor(rows, dtype=torch.float32)


def test_captions_and_references_are_wrong_above_a_sigma_and_only_on_the_web(pool):
    recipe = replace(RECIPE, wrong_from=0.6, wrong_captions=0.5, wrong_references=0.9)
    assert shares(pool, recipe, web=False)[:, 1:].sum() == 0
    found = shares(pool, recipe, web=True)
    noisy = found[:, 0] >= 0.6
    assert 300 < noisy.sum() < 700
    assert found[~noisy, 1:].sum() == 0
    # Another reference is the right one by chance in one of three.
    assert found[noisy, 1:].mean(0).tolist() == pytest.approx([0.5, 0.9 * 2 / 3], abs=0.06)


def test_noise_and_rows_of_a_step_do_not_depend_on_what_is_wrong(pool):
    right, wrong = (draw_batch(pool, RECIPE, 7, web=web) for web in (False, True))
    assert torch.equal(right.rows, wrong.rows)
    assert torch.equal(right.noise, wrong.noise)
    assert torch.equal(right.sigma, wrong.sigma)


def weights(folder):
    return {
        f"{part}/{name}": tensor
        for part in ("flux-fill/transformer", "flux-fill/vae", "flux-fill/text_encoder_2", "siglip")
        for file in (folder / part).glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }


def same(a, b):
    return {name for name in a if torch.equal(a[name], b[name])}


def test_it_skips_finished_parts_and_goes_on_from_a_model_whose_other_parts_it_keeps(tmp_path):
    whole = pretrain(tmp_path / "whole", RECIPE)
    (tmp_path / "half" / "work").mkdir(parents=True)
    for part in ("text", "siglip", "vae", "writer"):
        (whole / "work" / f"{part}.pt").rename(tmp_path / "half" / "work" / f"{part}.pt")
    # Other learning rates would make other weights of the parts that are there.
    half = pretrain(tmp_path / "half", replace(RECIPE, vae_lr=1.0, write_lr=1.0))
    assert same(weights(half), weights(whole)) == set(weights(whole))
    assert (half / "calligrapher.bin").read_bytes() == (whole / "calligrapher.bin").read_bytes()

    (whole / "siglip" / "style_scale.json").write_text('{"other": 0.1, "same": 0.9}\n')
    more = pretrain(tmp_path / "more", RECIPE, start=whole)
    kept = {name for name in weights(whole) if "/transformer/" not in name}
    assert kept <= same(weights(more), weights(whole)) != set(weights(whole))
    scale = (more / "siglip" / "style_scale.json").read_text()
    assert scale == (whole / "siglip" / "style_scale.json").read_text()
