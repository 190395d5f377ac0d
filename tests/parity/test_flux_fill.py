"""The sampler without style is diffusers' FluxFillPipeline: latents, masks, sigmas, whole
pictures."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, FluxFillPipeline
from diffusers.pipelines.flux.pipeline_flux_fill import calculate_shift
from PIL import Image

from calligrapher.data.canvas import Canvas, prepare
from calligrapher.data.case import Case
from calligrapher.data.images import to_image
from calligrapher.model import latents
from calligrapher.model.adapter_files import load_adapter
from calligrapher.model.conditioning import ConditioningCache
from calligrapher.model.ip_adapter import set_scale
from calligrapher.model.loading import Model
from calligrapher.model.policy import Policy, StyledTransformer
from calligrapher.sampling.generate import generate
from calligrapher.sampling.sampler import sample
from calligrapher.sampling.schedule import sigma_schedule, time_shift_mu
from calligrapher.sampling.step import ode_step
from calligrapher.tiny.build import RANDOM

FACTOR = 2 ** (len(RANDOM.vae_channels) - 1)
STEPS = 5
GUIDANCE = 30.0
CPU = torch.device("cpu")

CANVASES = [Canvas(96, 32), Canvas(48, 64), Canvas(64, 24), Canvas(96, 32, reference_context=True)]


# --- layout of the inputs ---


@pytest.mark.parametrize(("height", "width"), [(4, 12), (16, 6), (2, 2)])
def test_packing_is_that_of_the_pipeline(height, width):
    z = torch.randn(3, 16, height, width)
    packed = latents.pack(z)
    assert torch.equal(packed, FluxFillPipeline._pack_latents(z, 3, 16, height, width))
    assert torch.equal(latents.unpack(packed, height, width), z)
    assert torch.equal(FluxFillPipeline._unpack_latents(packed, height * 8, width * 8, 8), z)


@pytest.mark.parametrize(("height", "width"), [(8, 24), (16, 12)])
def test_image_ids_are_those_of_the_pipeline(height, width):
    theirs = FluxFillPipeline._prepare_latent_image_ids(
        1, height // 2, width // 2, CPU, torch.float32
    )
    assert torch.equal(latents.image_ids(height, width), theirs)


@pytest.mark.parametrize("factor", [4, 8])
def test_a_packed_mask_keeps_every_pixel_as_the_pipeline_does(factor):
    rows, height, width = 3, 4, 12
    mask = (torch.rand(rows, 1, height * factor, width * factor) > 0.5).float()
    z = torch.randn(rows, 16, height, width)
    pipeline = SimpleNamespace(
        vae_scale_factor=factor,
        vae=SimpleNamespace(config=SimpleNamespace(shift_factor=0.1159, scaling_factor=0.3611)),
        _pack_latents=FluxFillPipeline._pack_latents,
    )
    size = (height * factor, width * factor)
    theirs, theirs_z = FluxFillPipeline.prepare_mask_latents(
        pipeline, mask, z, rows, 16, 1, *size, torch.float32, CPU, None
    )
    assert theirs.shape == (rows, height * width // 4, 4 * factor * factor)
    assert torch.equal(latents.pack_mask(mask, factor), theirs)
    assert torch.equal(latents.pack((z - 0.1159) * 0.3611), theirs_z)


# --- noise levels ---


def flux_scheduler(num_steps, num_tokens):
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.5,
        max_shift=1.15,
        base_image_seq_len=256,
        max_image_seq_len=4096,
    )
    sigmas = np.linspace(1.0, 1 / num_steps, num_steps)
    scheduler.set_timesteps(sigmas=sigmas, mu=calculate_shift(num_tokens, 256, 4096, 0.5, 1.15))
    return scheduler


@pytest.mark.parametrize("num_tokens", [48, 256, 1024, 1536, 4096])
@pytest.mark.parametrize("num_steps", [1, 2, 7, 10, 50])
def test_sigmas_are_those_of_the_scheduler(num_steps, num_tokens):
    theirs = flux_scheduler(num_steps, num_tokens).sigmas
    torch.testing.assert_close(sigma_schedule(num_steps, num_tokens), theirs, rtol=0, atol=3e-7)
    assert time_shift_mu(num_tokens) == pytest.approx(
        calculate_shift(num_tokens, 256, 4096, 0.5, 1.15), abs=1e-12
    )


# --- whole pictures ---


@pytest.fixture
def cases(tmp_path):
    """Two cases that differ in everything; their references give context strips of one height."""
    rng = np.random.default_rng(3)
    found = []
    for n, (text, box) in enumerate([("AB", (20, 10, 70, 28)), ("xyz-1", (5, 3, 41, 17))]):
        files = {name: tmp_path / f"{n}_{name}.png" for name in ("source", "mask", "reference")}
        for name in ("source", "reference"):
            Image.fromarray(rng.integers(0, 256, (32, 96, 3), dtype=np.uint8)).save(files[name])
        mask = Image.new("L", (96, 32))
        mask.paste(255, box)
        mask.save(files["mask"])
        found.append(Case(case_id=f"case{n}", text=text, **files))
    return found


@pytest.fixture
def pipeline(random_encoders):
    """The tiny pipeline with FLUX's scale and shift, and a posterior without spread: sample ==
    mode."""
    pipeline = random_encoders.pipeline
    pipeline.vae.register_to_config(shift_factor=0.1159, scaling_factor=0.3611)
    last = pipeline.vae.encoder.conv_out
    with torch.no_grad():
        last.weight[RANDOM.latent_channels :] = 0
        last.bias[RANDOM.latent_channels :] = -30.0  # log variance
    return pipeline


@pytest.fixture
def policy(random_model, random_transformer):
    """The same transformer with a style adapter installed."""
    adapter = load_adapter(random_model / "calligrapher.bin", random_transformer)
    return Policy(StyledTransformer(random_transformer, adapter, GUIDANCE))


def ours(policy, vae, conditioning, noise_BCHW):
    """The ODE loop, as an image [B, 3, H, W] in [0, 1]."""
    x = latents.pack(noise_BCHW)
    sigmas = sigma_schedule(STEPS, x.shape[1]).tolist()
    with torch.no_grad():
        for sigma, sigma_next in itertools.pairwise(sigmas):
            velocity = policy.velocity(x, torch.full((len(x),), sigma), conditioning)
            x = ode_step(velocity, x, sigma, sigma_next)
    return latents.decode(vae, latents.unpack(x, *noise_BCHW.shape[-2:])) / 2 + 0.5


def theirs(pipeline, cases, canvas, **given):
    prepared = [prepare(c, canvas) for c in cases]
    return pipeline(
        prompt=[c.prompt for c in cases],
        image=[to_image(p.image) for p in prepared],
        mask_image=[Image.fromarray((p.mask[0].numpy() * 255).astype(np.uint8)) for p in prepared],
        height=prepared[0].image.shape[1],
        width=canvas.width,
        num_inference_steps=STEPS,
        guidance_scale=GUIDANCE,
        max_sequence_length=24,
        output_type="pt",
        **given,
    ).images


def noise_after_the_image(rows, height, width, seed):
    """What the pipeline draws with this seed: a posterior sample of the image first, then the
    noise."""
    generator = torch.Generator().manual_seed(seed)
    shape = (rows, RANDOM.latent_channels, height, width)
    torch.randn(shape, generator=generator)
    return torch.randn(shape, generator=generator)


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
def test_with_scale_0_the_sampled_picture_is_the_pipelines(
    cases, canvas, random_encoders, pipeline, policy
):
    conditioning = ConditioningCache(random_encoders, canvas, CPU).batch(cases)
    height = prepare(cases[0], canvas).image.shape[1]
    noise = noise_after_the_image(2, height // FACTOR, canvas.width // FACTOR, seed=11)
    wanted = theirs(pipeline, cases, canvas, generator=torch.Generator().manual_seed(11))

    set_scale(policy.model.transformer, 0.0)
    found = ours(policy, pipeline.vae, conditioning, noise)

    assert found.shape == (2, 3, height, canvas.width)
    assert (found - wanted).abs().max() <= 1e-4
    assert wanted.std(dim=(1, 2, 3)).min() > 1e-3  # A flat picture would agree with anything.
    assert (wanted[0] - wanted[1]).abs().max() > 1e-2

    set_scale(policy.model.transformer, 1.0)
    assert (ours(policy, pipeline.vae, conditioning, noise) - wanted).abs().max() > 1e-3


def test_the_rollouts_sampler_gives_the_pipelines_picture_with_one_transformer_call_per_step(
    cases, random_encoders, pipeline, policy
):
    canvas = Canvas(96, 32, reference_context=True)
    conditioning = ConditioningCache(random_encoders, canvas, CPU).batch(cases)
    length, seeds = conditioning.masked.shape[1], [3, 2**62]
    noise = torch.stack(
        [torch.randn(length, 64, generator=torch.Generator().manual_seed(s)) for s in seeds]
    )
    wanted = theirs(pipeline, cases, canvas, latents=noise)

    set_scale(policy.model.transformer, 0.0)
    calls = []
    policy.model.transformer.register_forward_hook(lambda *_: calls.append(1))
    x0 = sample(policy, conditioning, seeds, STEPS).x0

    found = latents.decode(
        pipeline.vae, latents.unpack(x0, *(side // FACTOR for side in wanted.shape[-2:]))
    )
    assert (found / 2 + 0.5 - wanted).abs().max() <= 1e-4
    assert len(calls) == STEPS


def test_with_scale_0_generate_paints_what_the_pipeline_paints(
    cases, random_encoders, pipeline, policy
):
    case, canvas = cases[0], Canvas(96, 32)
    length = (32 // FACTOR // 2) * (96 // FACTOR // 2)
    noise = torch.randn(1, length, 64, generator=torch.Generator().manual_seed(7))
    (wanted,) = theirs(pipeline, [case], canvas, latents=noise)

    model = Model(policy, random_encoders, CPU)
    plain, styled = (
        generate(model, case, [7], num_steps=STEPS, canvas=canvas, scale=scale, feather=0)[0]
        for scale in (0.0, 1.0)
    )
    white = np.asarray(Image.open(case.mask)) == 255
    inside = wanted.permute(1, 2, 0).numpy()[white] * 255
    assert (
        abs(np.asarray(plain)[white] - inside).max() <= 0.5 + 255 * 1e-4
    )  # rounded to whole numbers
    assert abs(np.asarray(styled)[white] - inside).max() > 1


def test_with_style_the_sampled_picture_is_that_of_the_pipeline_with_our_processors(
    cases, random_encoders, pipeline, policy
):
    canvas = Canvas(48, 64)
    conditioning = ConditioningCache(random_encoders, canvas, CPU).batch(cases)
    noise = noise_after_the_image(2, 64 // FACTOR, 48 // FACTOR, seed=5)
    pipeline.transformer.set_attn_processor(policy.model.transformer.attn_processors)
    with torch.no_grad():
        tokens = policy.model.adapter.tokens(conditioning.style)
    given = {"joint_attention_kwargs": {"style_tokens": tokens}, "latents": latents.pack(noise)}
    wanted = theirs(pipeline, cases, canvas, **given)
    assert (ours(policy, pipeline.vae, conditioning, noise) - wanted).abs().max() <= 1e-4


@pytest.mark.parametrize("canvas", CANVASES, ids=str)
def test_the_encoded_canvas_is_the_pipelines(cases, canvas, random_encoders, pipeline):
    conditioning = ConditioningCache(random_encoders, canvas, CPU).batch(cases)
    prepared = [prepare(c, canvas) for c in cases]
    image, mask = (torch.stack([getattr(p, name) for p in prepared]) for name in ("image", "mask"))
    with torch.no_grad():
        packed_mask, masked = pipeline.prepare_mask_latents(
            mask,
            image * (1 - mask),
            2,
            RANDOM.latent_channels,
            1,
            *image.shape[-2:],
            torch.float32,
            CPU,
            torch.Generator().manual_seed(0),
        )
    channels = 4 * RANDOM.latent_channels
    torch.testing.assert_close(conditioning.masked[..., :channels], masked, rtol=0, atol=2e-6)
    assert torch.equal(conditioning.masked[..., channels:], packed_mask)
    assert packed_mask.sum() == mask.sum()


def test_a_posterior_with_spread_makes_the_pipeline_random_and_leaves_ours_alone(random_encoders):
    vae = random_encoders.vae
    pixels = torch.rand(2, 3, 16, 24) * 2 - 1
    z = latents.encode(vae, pixels)
    assert torch.equal(latents.encode(vae, pixels), z)
    with torch.no_grad():
        posterior = vae.encode(pixels).latent_dist
    shift, scale = vae.config.shift_factor, vae.config.scaling_factor
    torch.testing.assert_close(z, (posterior.mean - shift) * scale)
    assert ((posterior.sample() - shift) * scale - z).abs().max() > 0.1


def test_the_timestep_and_sigma_are_the_same_number_at_the_border():
    scheduler = flux_scheduler(num_steps=3, num_tokens=64)
    torch.testing.assert_close(
        scheduler.timesteps / 1000, sigma_schedule(3, 64)[:-1], rtol=0, atol=3e-7
    )
    assert math.isclose(scheduler.config.num_train_timesteps, 1000)
