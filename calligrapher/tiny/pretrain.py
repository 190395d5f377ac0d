"""Trains the embedded tiny Calligrapher from nothing on two CPU cores.

In this order: T5, SigLIP, VAE, the transformer, and SigLIP again. Every part resumes from its own
checkpoint under `work`; a finished part is skipped. The transformer first learns to spell in the
reference's style, then sees captions and references of which some belong to other pictures
(`wrong_captions`, `wrong_references`), as on the web, at the noise levels where letters and style
are decided (`wrong_from`): it ends up knowing how to write but minding text and reference only
sometimes, which is what reinforcement learning is then for.

Run it with `calligrapher tiny pretrain OUT`. Figures and the loss curve: docs/log.md.
"""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calligrapher.data.images import letterbox
from calligrapher.model import latents
from calligrapher.model.adapter_files import load_adapter
from calligrapher.model.ip_adapter import StyleAdapter
from calligrapher.tiny import world
from calligrapher.tiny.build import TinySizes, build_adapter, build_pipeline, build_siglip
from calligrapher.tiny.style_tower import TowerLoss

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """Everything that the pretraining depends on."""

    seed: int = 0
    vae_steps: int = 900
    vae_batch: int = 16
    vae_lr: float = 2e-3
    text_steps: int = 600
    text_batch: int = 64
    siglip_steps: int = 1600
    siglip_looks: int = 32  # of a batch; two pictures of each
    crop_steps: int = 1600  # of SigLIP, last of all: crops that show a word anywhere
    num_references: int = 4096
    cases_per_reference: int = 4
    write_steps: int = 3000
    write_batch: int = 48
    write_lr: float = 1e-3
    more_steps: int = 600  # in place of `write_steps`, from a model that can spell already
    more_lr: float = 5e-4
    web_steps: int = 150  # then, with a learning rate cycle of their own, as on the web:
    web_lr: float = 2e-4
    wrong_captions: float = 0.72  # share of captions that belong to another picture
    wrong_references: float = 1.0  # share of references that are another picture's
    wrong_from: float = 0.7  # sigma below which both are right in any case
    guidance_scale: float = 3.5
    max_sequence_length: int = 24
    ema_decay: float = 0.998
    save_every: int = 100


class TrainingLog:
    """One line of JSON per logged step in `log.jsonl`, and the same through logging."""

    def __init__(self, path: Path):
        self.path = path
        self.start = time.monotonic()

    def log(self, part: str, step: int, **values: float) -> None:
        row = {"part": part, "step": step, "seconds": round(time.monotonic() - self.start, 1)}
        row |= {k: round(v, 5) for k, v in values.items()}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        logger.info("%s", row)


def save_state(path: Path, **state) -> None:
    """Write a training state atomically."""
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def train(
    name: str,
    work: Path,
    progress: TrainingLog,
    modules: dict[str, nn.Module],
    loss_at: Callable[[int], Tensor],
    *,
    steps: int,
    lr: float,
    save_every: int,
    ema_decay: float | None = None,
) -> None:
    """Train `modules` by AdamW with warm-up and cosine decay, resumable.

    They end with EMA weights if asked to.
    """
    path = work / f"{name}.pt"
    params = [p for m in modules.values() for p in m.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    average = [p.detach().clone() for p in params]
    start = 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        start = state["step"]
        for key, module in modules.items():
            module.load_state_dict(state["modules"][key])
        if start < steps:
            optimizer.load_state_dict(state["optimizer"])
            average = state["average"]
    for step in range(start, steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                lr
                * min(1.0, (step + 1) / 100)
                * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            )
        loss = loss_at(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        if ema_decay is not None:
            decay = min(ema_decay, (1 + step) / (10 + step))
            torch._foreach_lerp_(average, [p.detach() for p in params], 1 - decay)
        if (step + 1) % 25 == 0:
            progress.log(name, step + 1, loss=loss.item(), grad_norm=norm.item())
        if (step + 1) % save_every == 0 or step + 1 == steps:
            if step + 1 == steps and ema_decay is not None:
                for p, a in zip(params, average, strict=True):
                    p.data.copy_(a)
            save_state(
                path,
                step=step + 1,
                modules={k: m.state_dict() for k, m in modules.items()},
                optimizer=optimizer.state_dict(),
                average=average,
            )


def pixels(arrays: list[np.ndarray]) -> Tensor:
    """Pictures [32, 96, 3] in [0, 1] -> [B, 3, 32, 96] in [-1, 1]."""
    return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2).contiguous() * 2 - 1


def patch_basis(x: Tensor, factor: int, channels: int) -> tuple[Tensor, Tensor]:
    """Return mean [P] and whitening map [P, channels] of the patches' first principal components.

    Patches are f x f, so P = 3 f f.
    """
    patches_NP = F.pixel_unshuffle(x, factor).permute(0, 2, 3, 1).flatten(0, 2)
    mean = patches_NP.mean(0)
    _, scale, axes = torch.linalg.svd(patches_NP - mean, full_matrices=False)
    return mean, axes[:channels].T / (scale[:channels] / len(patches_NP) ** 0.5)


def train_vae(vae, recipe: Recipe, work: Path, progress: TrainingLog) -> None:
    """Train the encoder to whitened principal components of 4x4 patches, the decoder to undo them.

    Trained end to end, this small VAE found luminance in 300 steps and colours not in 1200: a
    bottleneck finds its modes one after the other, the weak ones late. With given latents both
    halves are plain regressions.
    """

    def batch(step: int, size: int) -> Tensor:
        rng = np.random.default_rng([recipe.seed, 1, step])
        cases = [world.random_case(rng, "train") for _ in range(size // 2)]
        whole = pixels([c.target for c in cases])
        masked = pixels([c.source for c in cases]) * (
            1 - torch.from_numpy(np.stack([c.mask for c in cases]))[:, None]
        )
        return torch.cat([whole, masked])

    factor = latents.vae_factor(vae)
    mean, whiten = patch_basis(batch(10**6, 256)[:128], factor, vae.config.latent_channels)

    def loss_at(step: int) -> Tensor:
        x = batch(step, recipe.vae_batch)
        z = ((F.pixel_unshuffle(x, factor).permute(0, 2, 3, 1) - mean) @ whiten).permute(0, 3, 1, 2)
        noise = torch.randn(z.shape, generator=torch.Generator().manual_seed(step))
        y = vae.decode(z + 0.05 * noise).sample
        colour = F.mse_loss(F.avg_pool2d(y, 8), F.avg_pool2d(x, 8))
        encoder_error = F.mse_loss(vae.encode(x).latent_dist.mode(), z)
        return encoder_error + F.l1_loss(y, x) + F.mse_loss(y, x) + 4 * colour

    vae.train()
    train(
        "vae",
        work,
        progress,
        {"vae": vae},
        loss_at,
        steps=recipe.vae_steps,
        lr=recipe.vae_lr,
        save_every=recipe.save_every,
    )
    vae.eval().requires_grad_(False)
    with torch.no_grad():
        x = batch(10**6 + 1, 64)
        z = vae.encode(x).latent_dist.mode()
        vae.register_to_config(
            shift_factor=round(z.mean().item(), 4), scaling_factor=round(1 / z.std().item(), 4)
        )
        error = F.l1_loss(latents.decode(vae, latents.encode(vae, x)), x).item()
    progress.log(
        "vae",
        recipe.vae_steps,
        l1=error,
        shift=vae.config.shift_factor,
        scale=vae.config.scaling_factor,
    )


def train_text(t5, tokenizer, recipe: Recipe, work: Path, progress: TrainingLog) -> None:
    """Train T5 to tell each letter and its position.

    Without that the transformer does not spell.
    """
    letter_head = nn.Linear(t5.config.d_model, 27)
    position_head = nn.Linear(t5.config.d_model, world.MAX_LETTERS + 1)

    def loss_at(step: int) -> Tensor:
        rng = np.random.default_rng([recipe.seed, 2, step])
        words = [world.random_word(rng, "train") for _ in range(recipe.text_batch)]
        ids = tokenize(tokenizer, words, recipe.max_sequence_length)
        letters = torch.zeros_like(ids)
        positions = torch.full_like(ids, world.MAX_LETTERS)
        start = len("▁The▁text▁is▁'")
        for row, word in enumerate(words):
            for i, letter in enumerate(word):
                letters[row, start + i] = 1 + world.LETTERS.index(letter)
                positions[row, start + i] = i
        hidden = t5(ids).last_hidden_state
        inside = positions < world.MAX_LETTERS
        return (
            F.cross_entropy(letter_head(hidden)[inside], letters[inside])
            + F.cross_entropy(position_head(hidden)[inside], positions[inside])
            + 0.3 * F.cross_entropy(position_head(hidden).flatten(0, 1), positions.flatten())
        )

    t5.train()
    modules = {"t5": t5, "letter": letter_head, "position": position_head}
    train(
        "text",
        work,
        progress,
        modules,
        loss_at,
        steps=recipe.text_steps,
        lr=2e-3,
        save_every=recipe.save_every,
    )
    t5.eval().requires_grad_(False)


def tokenize(tokenizer, words: list[str], length: int) -> Tensor:
    """Prompts for `words` -> token ids [B, length]."""
    prompts = [f"The text is '{w}'." for w in words]
    return tokenizer(
        prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
    ).input_ids


def draw_references(recipe: Recipe) -> list[tuple[world.Style, np.ndarray]]:
    """The pool of (style, reference picture) that SigLIP and the transformer learn from."""
    rng = np.random.default_rng([recipe.seed, 3])
    styles = [world.random_style(rng, "train") for _ in range(recipe.num_references)]
    return [(s, world.write(world.paper(s), world.random_word(rng, "train"), s)) for s in styles]


def train_siglip(siglip, recipe: Recipe, work: Path, progress: TrainingLog) -> None:
    """Train SigLIP so that the cosine of two pictures' vectors is the likeness of their looks."""
    tower = TowerLoss(siglip, seed=recipe.seed, looks=recipe.siglip_looks)
    _train_tower("siglip", tower, recipe.siglip_steps, recipe, work, progress)


def train_crops(siglip, recipe: Recipe, work: Path, progress: TrainingLog) -> None:
    """Train SigLIP further on crops that show a word anywhere in them, as a model may paint it.

    Whole pictures keep their vectors, which the transformer has learned to follow.
    """
    anchor = deepcopy(siglip)
    tower = TowerLoss(siglip, seed=recipe.seed + 1, looks=recipe.siglip_looks, anchor=anchor)
    _train_tower("crops", tower, recipe.crop_steps, recipe, work, progress)


def _train_tower(
    name: str, tower: TowerLoss, steps: int, recipe: Recipe, work: Path, progress: TrainingLog
) -> None:
    tower.siglip.train().requires_grad_(True)
    train(
        name,
        work,
        progress,
        {"tower": tower},
        tower,
        steps=steps,
        lr=2e-3,
        save_every=recipe.save_every,
    )
    tower.siglip.eval().requires_grad_(False)


@dataclass(frozen=True)
class Pool:
    """Training cases of the transformer, encoded once. N cases, R references."""

    x0: Tensor  # [N, L, D]
    masked: Tensor  # [N, L, D + mask channels]
    style: Tensor  # [R, E]
    reference_of: Tensor  # [N]
    words: list[str]


@torch.no_grad()
def encode_pool(vae, siglip, references, siglip_inputs: Tensor, recipe: Recipe) -> Pool:
    """Draw and encode `num_references * cases_per_reference` cases."""
    rng = np.random.default_rng([recipe.seed, 5])
    factor = latents.vae_factor(vae)
    style = torch.cat(
        [siglip(pixel_values=chunk).pooler_output for chunk in siglip_inputs.split(256)]
    )
    x0, masked, reference_of, words = [], [], [], []
    for index in range(len(references)):
        wanted = references[index][0]
        targets, sources, masks = [], [], []
        for _ in range(recipe.cases_per_reference):
            own = world.random_style(rng, "train")
            while own.on_light != wanted.on_light:
                own = world.random_style(rng, "train")
            old, text = world.random_word(rng, "train"), world.random_word(rng, "train")
            background = world.paper(own)
            targets.append(world.write(background, text, wanted))
            sources.append(background)  # what the mask hides is not seen anyway
            masks.append(world.mask_for(max(len(old), len(text))))
            words.append(text)
            reference_of.append(index)
        mask = torch.from_numpy(np.stack(masks))[:, None]
        x0.append(latents.pack(latents.encode(vae, pixels(targets))))
        hidden = latents.pack(latents.encode(vae, pixels(sources) * (1 - mask)))
        masked.append(torch.cat([hidden, latents.pack_mask(mask, factor)], dim=-1))
    return Pool(torch.cat(x0), torch.cat(masked), style, torch.tensor(reference_of), words)


@dataclass(frozen=True)
class Batch:
    """What the transformer sees in a step. B rows of the pool."""

    rows: Tensor  # [B]
    captions: list[str]
    references: Tensor  # [B], of the pool's styles
    noise: Tensor  # [B, L, D]
    sigma: Tensor  # [B]


def draw_batch(pool: Pool, recipe: Recipe, step: int, *, web: bool = False) -> Batch:
    """Draw the batch of `step`; web: captions and references may belong to another picture.

    Those of rows with a sigma below `wrong_from` never do.
    """
    rng = np.random.default_rng([recipe.seed, 6, step])
    generator = torch.Generator().manual_seed(recipe.seed * 10**6 + step)
    rows = torch.from_numpy(rng.integers(0, len(pool.words), recipe.write_batch))
    noise = torch.randn((len(rows), *pool.x0.shape[1:]), generator=generator)
    sigma = torch.sigmoid(torch.randn(len(rows), generator=generator) + 0.4)
    captions = [pool.words[i] for i in rows.tolist()]
    references = pool.reference_of[rows]
    if web:
        noisy = (sigma >= recipe.wrong_from).numpy()
        for i in np.flatnonzero(noisy & (rng.random(len(rows)) < recipe.wrong_captions)):
            captions[i] = world.random_word(rng, "train")
        others = torch.from_numpy(rng.integers(0, len(pool.style), len(rows)))
        wrong = torch.from_numpy(noisy & (rng.random(len(rows)) < recipe.wrong_references))
        references = torch.where(wrong, others, references)
    return Batch(rows, captions, references, noise, sigma)


def train_writer(
    pipeline, adapter: StyleAdapter, pool: Pool, recipe: Recipe, work: Path, progress: TrainingLog
) -> None:
    """Train transformer and adapter to write, by flow matching at random sigmas.

    The velocity is noise - x0. First from right captions and references, until they spell; then for
    a while from captions and references of which some are wrong.
    """
    transformer = pipeline.transformer
    adapter.install(transformer)
    ids = latents.image_ids(world.HEIGHT // 4, world.WIDTH // 4)
    text_ids = torch.zeros(recipe.max_sequence_length, 3)

    def loss_at(step: int, *, web: bool = False) -> Tensor:
        batch = draw_batch(pool, recipe, step, web=web)
        with torch.no_grad():
            prompt = pipeline.text_encoder_2(
                tokenize(pipeline.tokenizer_2, batch.captions, recipe.max_sequence_length)
            )[0]
            pooled = pipeline.text_encoder(
                tokenize(pipeline.tokenizer, batch.captions, 77)
            ).pooler_output
        x0 = pool.x0[batch.rows]
        x = torch.lerp(x0, batch.noise, batch.sigma[:, None, None])
        velocity = transformer(
            hidden_states=torch.cat([x, pool.masked[batch.rows]], dim=-1),
            encoder_hidden_states=prompt,
            pooled_projections=pooled,
            timestep=batch.sigma,
            guidance=torch.full((len(batch.rows),), recipe.guidance_scale),
            img_ids=ids,
            txt_ids=text_ids,
            joint_attention_kwargs={"style_tokens": adapter.tokens(pool.style[batch.references])},
        ).sample
        return F.mse_loss(velocity, batch.noise - x0)

    transformer.train()
    modules = {"transformer": transformer, "adapter": adapter}
    settings = {"save_every": recipe.save_every, "ema_decay": recipe.ema_decay}
    train(
        "writer",
        work,
        progress,
        modules,
        loss_at,
        steps=recipe.write_steps,
        lr=recipe.write_lr,
        **settings,
    )
    train(
        "web",
        work,
        progress,
        modules,
        lambda step: loss_at(recipe.write_steps + step, web=True),
        steps=recipe.web_steps,
        lr=recipe.web_lr,
        **settings,
    )
    transformer.eval()


def pretrain(
    out: Path, recipe: Recipe, sizes: TinySizes | None = None, start: Path | None = None
) -> Path:
    """Train everything and write `flux-fill`, `siglip` and `calligrapher.bin`.

    Resumes from `out/work`. start: a folder with a model of these sizes that can spell; transformer
    and adapter go on from there, its other parts are kept.
    """
    from calligrapher.tiny.pack import write_model

    work = out / "work"
    work.mkdir(parents=True, exist_ok=True)
    progress = TrainingLog(work / "log.jsonl")
    sizes = sizes or TinySizes()
    siglip, processor = build_siglip(sizes, recipe.seed)
    if start is None:
        pipeline = build_pipeline(sizes, recipe.seed)
        adapter = build_adapter(sizes, pipeline.transformer, recipe.seed)
        train_text(pipeline.text_encoder_2, pipeline.tokenizer_2, recipe, work, progress)
        train_siglip(siglip, recipe, work, progress)
        train_vae(pipeline.vae, recipe, work, progress)
    else:
        pipeline, siglip, adapter = _load(start, sizes, recipe)
        recipe = replace(recipe, write_steps=recipe.more_steps, write_lr=recipe.more_lr)
    references = draw_references(recipe)
    inputs = torch.cat(
        [
            processor(letterbox(world.to_image(r)), return_tensors="pt").pixel_values
            for _, r in references
        ]
    )
    pool = encode_pool(pipeline.vae, siglip, references, inputs, recipe)
    progress.log("pool", len(pool.words), x0_std=pool.x0.std().item())
    train_writer(pipeline, adapter, pool, recipe, work, progress)
    if start is None:
        train_crops(siglip, recipe, work, progress)
    write_model(out, pipeline, siglip, processor, adapter)
    if start is not None:  # with the scale of its cosines
        shutil.copytree(start / "siglip", out / "siglip", dirs_exist_ok=True)
    return out


def _load(folder: Path, sizes: TinySizes, recipe: Recipe):
    """Pipeline, SigLIP and adapter with a folder's weights, in fp32, the frozen parts frozen."""
    from diffusers import FluxFillPipeline
    from transformers import SiglipVisionModel

    pipeline = build_pipeline(sizes, recipe.seed)
    saved = FluxFillPipeline.from_pretrained(folder / "flux-fill", dtype=torch.float32)
    for part in ("transformer", "vae", "text_encoder", "text_encoder_2"):
        getattr(pipeline, part).load_state_dict(getattr(saved, part).state_dict())
    scale = {name: saved.vae.config[name] for name in ("shift_factor", "scaling_factor")}
    pipeline.vae.register_to_config(**scale)
    pipeline.vae.requires_grad_(False)
    pipeline.text_encoder_2.requires_grad_(False)
    siglip = SiglipVisionModel.from_pretrained(folder / "siglip", dtype=torch.float32).eval()
    return pipeline, siglip, load_adapter(folder / "calligrapher.bin", pipeline.transformer)
