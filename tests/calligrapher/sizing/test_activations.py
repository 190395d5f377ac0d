"""The estimate of activations, against what autograd keeps and against simulated runs of the real
sizes."""

import weakref
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from diffusers import FluxTransformer2DModel
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from calligrapher.model.ip_adapter import AdapterConfig, StyleAdapter
from calligrapher.model.lora import add_lora
from calligrapher.model.policy import Conditioning, Policy, StyledTransformer
from calligrapher.sizing import configs as full
from calligrapher.sizing.activations import Batch, decode_peak, forward_peak, training_peak
from calligrapher.sizing.meta_model import MetaModel

BF16, FP32 = torch.bfloat16, torch.float32
LORA = ["to_q", "to_k", "to_v", "to_out.0", "add_q_proj"]


SMALL = {"attention_head_dim": 64, "num_attention_heads": 2, "joint_attention_dim": 128}
FULL = {"attention_head_dim": 128, "num_attention_heads": 24, "joint_attention_dim": 4096}


def model(double, single, sizes=SMALL, tokens=4, autocast=BF16, lora=False):
    """A FLUX with an adapter, of blocks like the real ones; frozen parts in autocast's type."""
    width, style_dim = sizes["attention_head_dim"], 1152 if sizes is FULL else 24
    torch.set_default_dtype(autocast or FP32)
    try:
        transformer = FluxTransformer2DModel(
            in_channels=384,
            out_channels=64,
            num_layers=double,
            num_single_layers=single,
            guidance_embeds=True,
            axes_dims_rope=(width // 8, width * 7 // 16, width * 7 // 16),
            **sizes,
        )
    finally:
        torch.set_default_dtype(FP32)
    config = AdapterConfig(
        style_dim=style_dim, token_dim=sizes["joint_attention_dim"], num_tokens=tokens
    )
    style = StyleAdapter(config, double + single, transformer.inner_dim)
    if lora:
        add_lora(transformer, rank=2, alpha=2.0, targets=LORA, seed=0)
    styled = StyledTransformer(transformer, style, 30.0)
    policy = Policy(styled, train_adapter=not lora, autocast=autocast)
    for parameter in policy.parameters.values():
        parameter.data = parameter.data.float()
    return MetaModel(policy, None, None, None, None)


def inputs(sized, batch):
    rows, image, text = batch.rows, batch.image, batch.text
    joint = sized.transformer.config.joint_attention_dim
    style = sized.adapter.image_proj_mlp.proj[0].in_features
    pooled = sized.transformer.config.pooled_projection_dim
    conditioning = Conditioning(
        torch.zeros(rows, text, joint),
        torch.zeros(rows, pooled),
        torch.zeros(rows, style),
        torch.zeros(rows, image, 320),
        torch.zeros(image, 3),
    )
    return torch.zeros(rows, image, 64), torch.full((rows,), 0.5), conditioning


@contextmanager
def layer_norms_of_cuda():
    """CUDA's autocast runs layer norms in float32; the CPU's does not."""
    plain = F.layer_norm

    def layer_norm(x, shape, weight=None, bias=None, eps=1e-5):
        if torch.is_autocast_enabled("cpu"):
            x, weight, bias = (None if t is None else t.float() for t in (x, weight, bias))
        return plain(x, shape, weight, bias, eps)

    F.layer_norm = layer_norm
    try:
        yield
    finally:
        F.layer_norm = plain


def kept_by_autograd(sized, batch):
    """Bytes of the tensors that a forward leaves for its backward, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in sized.policy.model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (
                storage.nbytes(),
                tensor,
            )  # held, so that no address is used twice
        return tensor

    with (
        layer_norms_of_cuda(),
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
    ):
        sized.policy.velocity(*inputs(sized, batch))
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("autocast", [BF16, None])
def test_what_two_more_blocks_keep_is_the_formula(autocast, lora):
    """A double and a single one, at odd numbers of rows and tokens: what the first block saves
    cancels."""
    batch = Batch(rows=3, image=70, text=41)
    less, more = (
        model(1, 1, autocast=autocast, lora=lora),
        model(2, 2, autocast=autocast, lora=lora),
    )
    measured = kept_by_autograd(more, batch) - kept_by_autograd(less, batch)
    estimate = training_peak(more, batch, checkpointing=False) - training_peak(
        less, batch, checkpointing=False
    )
    assert estimate == pytest.approx(measured, rel=0.1 if lora else 0.03)


@pytest.mark.parametrize("autocast", [BF16, None])
def test_with_checkpointing_a_block_keeps_its_inputs(autocast):
    batch = Batch(rows=3, image=70, text=41)
    found = []
    for blocks in (1, 2):
        sized = model(blocks, blocks, autocast=autocast)
        sized.transformer.enable_gradient_checkpointing()
        found.append(kept_by_autograd(sized, batch))
    size = autocast.itemsize if autocast else 4
    assert found[1] - found[0] == 2 * 3 * (70 + 41) * 128 * size


class Live(TorchDispatchMode):
    """Counts the bytes of all tensors that are alive, and their maximum."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.seen = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if (
                isinstance(tensor, torch.Tensor)
                and (storage := tensor.untyped_storage()) not in self.seen
            ):
                size = storage.nbytes()
                self.seen[storage] = size
                self.now += size
                weakref.finalize(storage, self.gone, size)
        self.peak = max(self.peak, self.now)
        return made

    def gone(self, size):
        self.now -= size

    def above(self, action):
        """The most that was alive during `action`, beyond what was before it."""
        before = self.peak = self.now
        action()
        return self.peak - before


def simulated(sized, batch, live, *, gradient):
    """Peak of one micro-batch in the middle of an accumulation, or of a forward without
    gradient."""
    x, sigma, conditioning = inputs(sized, batch)

    def backward():
        sized.policy.velocity(x, sigma, conditioning).square().mean().backward()

    def forward():
        with sized.policy.use(held):
            sized.policy.velocity(x, sigma, conditioning)

    with layer_norms_of_cuda():
        if gradient:
            backward()  # gradients are there from now on
            return live.above(backward)
        held = sized.policy.to_storage(sized.policy.snapshot())
        return live.above(forward)


def test_the_real_vae_decodes_within_the_estimate():
    from diffusers import AutoencoderKL
    from torch._subclasses.fake_tensor import FakeTensorMode

    sized = model(1, 1)
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live, torch.no_grad():
        torch.set_default_dtype(BF16)
        try:
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(full.BASE / "vae"))
        finally:
            torch.set_default_dtype(FP32)
        latent = torch.zeros(2, 16, 128, 64, dtype=BF16)
        measured = live.above(lambda: vae.decode(latent))
    estimate = decode_peak(replace(sized, vae=vae), rows=2, pixels=1024 * 512)
    assert estimate == pytest.approx(measured, rel=0.01)


# name -> (style tokens, autocast, checkpointing); few style tokens make the largest matrix small
CASES = {
    "bf16, checkpointing": (128, BF16, True),
    "bf16": (128, BF16, False),
    "float32, checkpointing": (128, None, True),
    "float32": (128, None, False),
    "bf16, checkpointing, 4 style tokens": (4, BF16, True),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_full_size_peaks_are_those_of_simulated_runs(case, capsys):
    """All ops of the real code on tensors without memory; `-s` prints the table of
    docs/full-size.md."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    style, autocast, checkpointing = CASES[case]
    batch = Batch(rows=1, image=2048, text=512)
    with FakeTensorMode(allow_non_fake_inputs=True), Live() as live:
        sized = model(19, 38, FULL, style, autocast)
        if checkpointing:
            sized.transformer.enable_gradient_checkpointing()
        measured = simulated(sized, batch, live, gradient=True)
        quiet = simulated(sized, batch, live, gradient=False)
    estimate, still = (
        training_peak(sized, batch, checkpointing=checkpointing),
        forward_peak(sized, batch),
    )
    with capsys.disabled():
        print(
            f"\n| {case} | {measured / 1e9:.2f} | {estimate / 1e9:.2f} | "
            f"{estimate / measured - 1:+.1%} | {quiet / 1e9:.2f} | {still / 1e9:.2f} |"
        )
    assert estimate == pytest.approx(measured, rel=0.05)
    assert still == pytest.approx(quiet, rel=0.05)
