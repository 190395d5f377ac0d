"""A policy of three blocks with random weights, its inputs, and other weights for it."""

import dataclasses

import torch
from diffusers import FluxTransformer2DModel

from calligrapher.model.ip_adapter import AdapterConfig, StyleAdapter
from calligrapher.model.lora import add_lora
from calligrapher.model.policy import Conditioning, Policy, StyledTransformer

LENGTH, TEXT = 6, 4
TARGETS = ["to_q", "to_out.0", "proj_mlp"]


def build(lora=False, train_adapter=True, autocast=None, before=False, adapter_targets=()):
    """A policy of one double and two single blocks; `before` = LoRA goes in before the adapter."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=20,
        out_channels=8,
        num_layers=1,
        num_single_layers=2,
        attention_head_dim=8,
        num_attention_heads=2,
        joint_attention_dim=10,
        pooled_projection_dim=7,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
    ).eval()
    torch.manual_seed(1)
    adapter = StyleAdapter(AdapterConfig(6, 16, 5, 3), 3, transformer.inner_dim)
    if lora and before:
        add_lora(transformer, rank=2, alpha=4.0, targets=TARGETS, seed=3)
    styled = StyledTransformer(transformer, adapter, guidance_scale=3.5)
    if adapter_targets:
        add_lora(styled.adapter, rank=2, alpha=4.0, targets=list(adapter_targets), seed=4)
    if lora and not before:
        add_lora(transformer, rank=2, alpha=4.0, targets=TARGETS, seed=3)
    return Policy(styled, train_adapter=train_adapter, autocast=autocast)


def inputs(rows=3):
    torch.manual_seed(5)
    conditioning = Conditioning(
        prompt=torch.randn(rows, TEXT, 10),
        pooled=torch.randn(rows, 7),
        style=torch.randn(rows, 6),
        masked=torch.randn(rows, LENGTH, 12),
        image_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0)),
    )
    return torch.randn(rows, LENGTH, 8), torch.tensor([0.9, 0.5, 0.1])[:rows], conditioning


def velocity(policy, **changes):
    x, sigma, conditioning = inputs()
    with torch.no_grad():
        return policy.velocity(x, sigma, dataclasses.replace(conditioning, **changes))


def moved(policy, seed):
    """Other weights for the policy's names."""
    generator = torch.Generator().manual_seed(seed)
    own = policy.snapshot()
    return {n: w + 0.3 * torch.randn(w.shape, generator=generator) for n, w in own.items()}
