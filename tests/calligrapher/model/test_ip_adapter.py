"""The adapter's arithmetic against NumPy, its sizes, and its place in the transformer."""

import math

import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from diffusers.models.transformers.transformer_flux import FluxPosEmbed
from torch import nn

from calligrapher.errors import CheckpointError
from calligrapher.model.ip_adapter import AdapterConfig, StyleAdapter, StyleAttnProcessor, set_scale

HEADS, WIDTH = 3, 8
INNER = HEADS * WIDTH
TINY = AdapterConfig(style_dim=6, token_dim=16, num_tokens=5, qformer_tokens=3)


def small_transformer(double=2, single=3):
    """A Flux transformer whose norms have weights other than 1, so that leaving one out is seen."""
    torch.manual_seed(0)
    transformer = FluxTransformer2DModel(
        in_channels=20,
        out_channels=8,
        num_layers=double,
        num_single_layers=single,
        attention_head_dim=WIDTH,
        num_attention_heads=HEADS,
        joint_attention_dim=10,
        pooled_projection_dim=7,
        guidance_embeds=True,
        axes_dims_rope=(4, 2, 2),
    )
    for name, parameter in transformer.named_parameters():
        if ".norm_" in name and parameter.ndim == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
    return transformer.eval()


def adapter_for(transformer):
    torch.manual_seed(1)
    return StyleAdapter(TINY, len(transformer.attn_processors), transformer.inner_dim)


# --- the formulas, in NumPy and float64 ---


def array(tensor):
    return tensor.detach().double().numpy()


def linear(x, layer):
    out = x @ array(layer.weight).T
    return out if layer.bias is None else out + array(layer.bias)


def gelu(x):
    return x * 0.5 * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def layer_norm(x, layer):
    x = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-5)
    return x * array(layer.weight) + array(layer.bias)


def rms_norm(x, eps, weight=1.0):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def attention(query_BNHK, key_BMHK, value_BMHK):
    scores = np.einsum("bnhk,bmhk->bhnm", query_BNHK, key_BMHK) / math.sqrt(query_BNHK.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("bhnm,bmhk->bnhk", weights, value_BMHK)
    return out.reshape(*out.shape[:2], -1)


def rotated(x_BNHK, cos_NK, sin_NK):
    even, odd = x_BNHK[..., 0::2], x_BNHK[..., 1::2]
    turned = np.stack([-odd, even], axis=-1).reshape(x_BNHK.shape)
    return x_BNHK * array(cos_NK)[None, :, None] + turned * array(sin_NK)[None, :, None]


def heads(x, heads=HEADS):
    return x.reshape(*x.shape[:2], heads, -1)


def by_formula(attn, style, scale, x, text, rope, tokens):
    """What a block's attention gives: (image, text) in double blocks, the whole sequence in single
    ones."""
    query = rms_norm(heads(linear(x, attn.to_q)), 1e-6, array(attn.norm_q.weight))
    key = rms_norm(heads(linear(x, attn.to_k)), 1e-6, array(attn.norm_k.weight))
    value = heads(linear(x, attn.to_v))

    style_key = rms_norm(heads(linear(tokens, style.to_k_ip)), 1e-5)
    style_value = heads(linear(tokens, style.to_v_ip))
    styled = scale * attention(query, style_key, style_value)

    if text is not None:
        added = rms_norm(
            heads(linear(text, attn.add_q_proj)), 1e-6, array(attn.norm_added_q.weight)
        )
        query = np.concatenate([added, query], axis=1)
        added = rms_norm(
            heads(linear(text, attn.add_k_proj)), 1e-6, array(attn.norm_added_k.weight)
        )
        key = np.concatenate([added, key], axis=1)
        value = np.concatenate([heads(linear(text, attn.add_v_proj)), value], axis=1)
    out = attention(rotated(query, *rope), rotated(key, *rope), value)
    if text is None:
        return out + styled
    length = text.shape[1]
    image = linear(out[:, length:] + styled, attn.to_out[0])
    return image, linear(out[:, :length], attn.to_add_out)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("block", range(5))
def test_the_attention_of_every_block_is_the_formula(block, scale):
    transformer = small_transformer()
    adapter = adapter_for(transformer)
    adapter.install(transformer)
    set_scale(transformer, scale)
    blocks = [*transformer.transformer_blocks, *transformer.single_transformer_blocks]
    attn, style = blocks[block].attn, adapter.attn_adapter[block]

    torch.manual_seed(block)
    text = torch.randn(2, 3, INNER) if block < 2 else None
    image, tokens = torch.randn(2, 7 if block < 2 else 10, INNER), torch.randn(2, 5, TINY.token_dim)
    ids = torch.randint(0, 9, (10, 3)).float()
    rope = FluxPosEmbed(theta=10000, axes_dim=[4, 2, 2])(ids)
    with torch.no_grad():
        found = attn(image, encoder_hidden_states=text, image_rotary_emb=rope, style_tokens=tokens)

    text = None if text is None else array(text)
    wanted = by_formula(attn, style, scale, array(image), text, rope, array(tokens))
    if block >= 2:
        found, wanted = (found,), (wanted,)
    for ours, formula in zip(found, wanted, strict=True):
        np.testing.assert_allclose(ours.numpy(), formula, atol=2e-6)


def test_the_style_changes_the_image_stream_alone_in_double_blocks_and_everything_in_single_ones():
    transformer = small_transformer()
    adapter_for(transformer).install(transformer)
    image, text, tokens = (
        torch.randn(2, 7, INNER),
        torch.randn(2, 3, INNER),
        torch.randn(2, 5, TINY.token_dim),
    )

    double = transformer.transformer_blocks[0].attn
    plain_image, plain_text = double(image, encoder_hidden_states=text)
    styled_image, styled_text = double(image, encoder_hidden_states=text, style_tokens=tokens)
    assert torch.equal(plain_text, styled_text)
    assert (plain_image - styled_image).abs().amax(-1).min() > 1e-3

    single = transformer.single_transformer_blocks[0].attn
    assert (single(image) - single(image, style_tokens=tokens)).abs().amax(-1).min() > 1e-3


def test_the_mlp_is_the_formula():
    mlp = adapter_for(small_transformer()).image_proj_mlp
    nn.init.normal_(mlp.norm.weight)
    nn.init.normal_(mlp.norm.bias)
    style = torch.randn(3, TINY.style_dim)
    hidden = gelu(linear(array(style), mlp.proj[0]))
    wanted = layer_norm(linear(hidden, mlp.proj[2]).reshape(3, 5, TINY.token_dim), mlp.norm)
    np.testing.assert_allclose(mlp(style).detach().numpy(), wanted, atol=2e-6)


def test_the_qformer_is_the_formula():
    qformer = adapter_for(small_transformer()).image_proj_qformer
    for parameter in qformer.parameters():
        nn.init.normal_(parameter, std=0.3)
    style = torch.randn(3, TINY.style_dim)
    read = linear(gelu(linear(array(style), qformer.id_proj[0])), qformer.id_proj[2])
    read = read.reshape(3, TINY.qformer_tokens, TINY.token_dim)
    queries = np.broadcast_to(array(qformer.query_embeds), (3, 5, TINY.token_dim))

    inner = qformer.cross_attn
    weights, biases = (
        np.split(array(inner.in_proj_weight), 3),
        np.split(array(inner.in_proj_bias), 3),
    )
    q, k, v = (
        heads(x @ w.T + b, heads=8)
        for x, w, b in zip((queries, read, read), weights, biases, strict=True)
    )
    attended = linear(attention(q, k, v), inner.out_proj)
    wanted = layer_norm(layer_norm(attended + queries, qformer.cross_attn_norm), qformer.norm)
    np.testing.assert_allclose(qformer(style).detach().numpy(), wanted, atol=5e-6)


def test_style_tokens_are_the_sum_of_both_projections_and_the_mlp_alone_without_a_qformer():
    adapter = adapter_for(small_transformer())
    style = torch.randn(3, TINY.style_dim)
    mlp, qformer = adapter.image_proj_mlp(style), adapter.image_proj_qformer(style)
    assert adapter.tokens(style).shape == (3, TINY.num_tokens, TINY.token_dim)
    assert torch.equal(adapter.tokens(style), mlp + qformer)
    adapter.image_proj_qformer = None
    assert torch.equal(adapter.tokens(style), mlp)


# --- in the transformer ---


def call(transformer, tokens=None, rows=2):
    torch.manual_seed(2)
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(rows, 6, 20),
            encoder_hidden_states=torch.randn(rows, 4, 10),
            pooled_projections=torch.randn(rows, 7),
            timestep=torch.full((rows,), 0.7),
            guidance=torch.full((rows,), 3.5),
            img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0)),
            txt_ids=torch.zeros(4, 3),
            joint_attention_kwargs=None if tokens is None else {"style_tokens": tokens},
        ).sample


def test_without_tokens_or_with_scale_0_the_transformer_is_diffusers_own():
    transformer = small_transformer()
    plain = call(transformer)
    adapter_for(transformer).install(transformer)
    tokens = torch.randn(2, 5, TINY.token_dim)
    torch.testing.assert_close(call(transformer), plain, rtol=0, atol=1e-6)
    set_scale(transformer, 0.0)
    assert torch.equal(call(transformer, tokens), call(transformer))
    set_scale(transformer, 0.5)
    half = call(transformer, tokens)
    set_scale(transformer, 1.0)
    assert (half - plain).abs().max() > 1e-3
    assert (call(transformer, tokens) - half).abs().max() > 1e-3


def test_tokens_of_zeros_add_exactly_nothing():
    """A row whose style is dropped: no bias, so the values are 0 and any mean of them is 0."""
    transformer = small_transformer()
    adapter_for(transformer).install(transformer)
    tokens = torch.randn(2, 5, TINY.token_dim)
    plain, styled = call(transformer), call(transformer, tokens)
    tokens[0] = 0
    mixed = call(transformer, tokens)
    assert torch.equal(mixed[0], plain[0])
    assert torch.equal(mixed[1], styled[1])


def test_entry_i_of_the_adapter_belongs_to_block_i_double_blocks_first():
    transformer = small_transformer()
    adapter = adapter_for(transformer)
    adapter.install(transformer)
    names = list(transformer.attn_processors)
    assert names == [
        *(f"transformer_blocks.{i}.attn.processor" for i in range(2)),
        *(f"single_transformer_blocks.{i}.attn.processor" for i in range(3)),
    ]
    for entry, processor in zip(
        adapter.attn_adapter, transformer.attn_processors.values(), strict=True
    ):
        assert isinstance(processor, StyleAttnProcessor)
        assert processor.style is entry
    assert not any("ip" in name for name, _ in transformer.named_parameters())


def test_every_block_looks_at_the_tokens_once_per_call():
    transformer = small_transformer()
    adapter = adapter_for(transformer)
    adapter.install(transformer)
    seen = []
    for i, entry in enumerate(adapter.attn_adapter):
        entry.register_forward_hook(lambda *_, i=i: seen.append(i))
    call(transformer, torch.randn(2, 5, TINY.token_dim))
    assert seen == [0, 1, 2, 3, 4]


def test_gradients_reach_every_tensor_of_the_adapter():
    transformer = small_transformer().requires_grad_(False)
    adapter = adapter_for(transformer)
    adapter.install(transformer)
    torch.manual_seed(3)
    tokens = adapter.tokens(torch.randn(2, TINY.style_dim))
    with torch.enable_grad():
        out = transformer(
            hidden_states=torch.randn(2, 6, 20),
            encoder_hidden_states=torch.randn(2, 4, 10),
            pooled_projections=torch.randn(2, 7),
            timestep=torch.full((2,), 0.7),
            guidance=torch.full((2,), 3.5),
            img_ids=torch.zeros(6, 3),
            txt_ids=torch.zeros(4, 3),
            joint_attention_kwargs={"style_tokens": tokens},
        ).sample
    out.square().mean().backward()
    for name, parameter in adapter.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name


def test_an_adapter_of_another_depth_is_refused():
    transformer = small_transformer(double=1, single=1)
    with pytest.raises(
        CheckpointError, match=r"one entry per attention block\. Got 5 entries for 2 blocks"
    ):
        StyleAdapter(TINY, 5, INNER).install(transformer)


# --- full size, without memory ---


def count(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def full_size():
    """The released model's transformer and adapter on the meta device."""
    with torch.device("meta"):
        transformer = FluxTransformer2DModel(in_channels=384, out_channels=64, guidance_embeds=True)
        adapter = StyleAdapter(
            AdapterConfig(), len(transformer.attn_processors), transformer.inner_dim
        )
    return transformer, adapter


def test_the_full_size_adapter_has_the_released_number_of_parameters(full_size):
    _, adapter = full_size
    # 1152 -> 2304 -> 128 * 4096, and a LayerNorm.
    assert count(adapter.image_proj_mlp) == 1_211_148_544
    # 57 blocks, keys and values, 4096 -> 3072, no bias.
    assert count(adapter.attn_adapter) == 57 * 2 * 4096 * 3072 == 1_434_451_968
    # 1152 -> 2304 -> 32 * 4096; queries; four 4096 x 4096 with biases; two LayerNorms.
    by_hand = (1153 * 2304) + (2305 * 32 * 4096) + 128 * 4096 + 4 * 4097 * 4096 + 4 * 4096
    assert count(adapter.image_proj_qformer) == by_hand == 372_443_392
    assert count(adapter) == 3_018_043_904


def test_the_full_size_adapter_has_the_released_names_and_shapes(full_size):
    transformer, adapter = full_size
    adapter.install(transformer)
    shapes = {name: tuple(tensor.shape) for name, tensor in adapter.state_dict().items()}
    attention = {n: s for n, s in shapes.items() if n.startswith("attn_adapter.")}
    assert attention == {
        f"attn_adapter.{i}.to_{kind}_ip.weight": (3072, 4096) for i in range(57) for kind in "kv"
    }
    assert {n: s for n, s in shapes.items() if n not in attention} == {
        "image_proj_mlp.proj.0.weight": (2304, 1152),
        "image_proj_mlp.proj.0.bias": (2304,),
        "image_proj_mlp.proj.2.weight": (128 * 4096, 2304),
        "image_proj_mlp.proj.2.bias": (128 * 4096,),
        "image_proj_mlp.norm.weight": (4096,),
        "image_proj_mlp.norm.bias": (4096,),
        "image_proj_qformer.query_embeds": (128, 4096),
        "image_proj_qformer.id_proj.0.weight": (2304, 1152),
        "image_proj_qformer.id_proj.0.bias": (2304,),
        "image_proj_qformer.id_proj.2.weight": (32 * 4096, 2304),
        "image_proj_qformer.id_proj.2.bias": (32 * 4096,),
        "image_proj_qformer.cross_attn.in_proj_weight": (3 * 4096, 4096),
        "image_proj_qformer.cross_attn.in_proj_bias": (3 * 4096,),
        "image_proj_qformer.cross_attn.out_proj.weight": (4096, 4096),
        "image_proj_qformer.cross_attn.out_proj.bias": (4096,),
        "image_proj_qformer.cross_attn_norm.weight": (4096,),
        "image_proj_qformer.cross_attn_norm.bias": (4096,),
        "image_proj_qformer.norm.weight": (4096,),
        "image_proj_qformer.norm.bias": (4096,),
    }


def test_the_full_size_transformer_has_57_attention_blocks_double_blocks_first(full_size):
    transformer, _ = full_size
    names = list(transformer.attn_processors)
    assert len(names) == 57
    assert [name.split(".")[0] for name in names] == ["transformer_blocks"] * 19 + [
        "single_transformer_blocks"
    ] * 38
