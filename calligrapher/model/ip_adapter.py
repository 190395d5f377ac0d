"""Calligrapher's style adapter: style tokens of a SigLIP vector, attended to in every block.

Legend: B rows, E style embedding, I style tokens, D token width, N sequence length, H heads, K head
width. Module and key names are those of the released weights (`image_proj_mlp`,
`image_proj_qformer`, `attn_adapter`).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from calligrapher.errors import CheckpointError

KEY_NORM_EPS = 1e-5


@dataclass(frozen=True)
class AdapterConfig:
    """Sizes of the adapter; the defaults are those of the released model."""

    style_dim: int = 1152  # E, SigLIP so400m's pooler output
    token_dim: int = 4096  # D
    num_tokens: int = 128  # I
    qformer_tokens: int = 32  # key/value tokens that the QFormer's queries look at
    qformer_heads: int = 8


class MLPProjection(nn.Module):
    """Style vector [B, E] -> tokens [B, I, D]."""

    def __init__(self, config: AdapterConfig):
        super().__init__()
        hidden = config.style_dim * 2
        self.num_tokens, self.token_dim = config.num_tokens, config.token_dim
        self.proj = nn.Sequential(
            nn.Linear(config.style_dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, config.num_tokens * config.token_dim),
        )
        self.norm = nn.LayerNorm(config.token_dim)

    def forward(self, style_BE: Tensor) -> Tensor:
        return self.norm(self.proj(style_BE).reshape(-1, self.num_tokens, self.token_dim))


class QFormerProjection(nn.Module):
    """Style vector [B, E] -> tokens [B, I, D], by learned queries.

    The queries read a few tokens that are made from the vector.
    """

    def __init__(self, config: AdapterConfig):
        super().__init__()
        hidden = config.style_dim * 2
        self.qformer_tokens, self.token_dim = config.qformer_tokens, config.token_dim
        self.query_embeds = nn.Parameter(torch.randn(config.num_tokens, config.token_dim) * 0.02)
        self.id_proj = nn.Sequential(
            nn.Linear(config.style_dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, config.qformer_tokens * config.token_dim),
        )
        self.cross_attn = nn.MultiheadAttention(
            config.token_dim, config.qformer_heads, batch_first=True
        )
        self.cross_attn_norm = nn.LayerNorm(config.token_dim)
        self.norm = nn.LayerNorm(config.token_dim)

    def forward(self, style_BE: Tensor) -> Tensor:
        read = self.id_proj(style_BE).reshape(-1, self.qformer_tokens, self.token_dim)
        queries = self.query_embeds.expand(read.shape[0], -1, -1)
        attended, _ = self.cross_attn(queries, read, read, need_weights=False)
        return self.norm(self.cross_attn_norm(attended + queries))


class StyleAttention(nn.Module):
    """The two projections that one transformer block adds: style tokens -> keys and values."""

    def __init__(self, token_dim: int, inner_dim: int):
        super().__init__()
        self.to_k_ip = nn.Linear(token_dim, inner_dim, bias=False)
        self.to_v_ip = nn.Linear(token_dim, inner_dim, bias=False)

    def forward(self, query_BNHK: Tensor, tokens_BID: Tensor, backend=None) -> Tensor:
        """Normalised image queries (before RoPE) and style tokens -> [B, N, H*K].

        backend: see `StyleAttnProcessor`.
        """
        b, _, heads, width = query_BNHK.shape
        key = self.to_k_ip(tokens_BID).reshape(b, -1, heads, width)
        value = self.to_v_ip(tokens_BID).reshape(b, -1, heads, width)
        key = F.rms_norm(key, (width,), eps=KEY_NORM_EPS)
        attended = _attention(
            query_BNHK, key.to(query_BNHK.dtype), value.to(query_BNHK.dtype), backend=backend
        )
        return attended.flatten(2)


def _attention(
    query_BNHK: Tensor, key_BMHK: Tensor, value_BMHK: Tensor, *, mask: Tensor | None = None, backend
) -> Tensor:
    """Attention [B, N, H, K] as diffusers' `backend` computes it; None: as torch does."""
    if backend is not None:
        from diffusers.models.attention_dispatch import dispatch_attention_fn

        return dispatch_attention_fn(
            query_BNHK, key_BMHK, value_BMHK, attn_mask=mask, backend=backend
        )
    attended = F.scaled_dot_product_attention(
        query_BNHK.transpose(1, 2),
        key_BMHK.transpose(1, 2),
        value_BMHK.transpose(1, 2),
        attn_mask=mask,
    )
    return attended.transpose(1, 2)


class StyleAttnProcessor:
    """diffusers' Flux attention plus `scale` times the attention to the style tokens.

    The two are added before `to_out`. In double blocks the image stream alone looks at the style;
    in single blocks the whole sequence does, text tokens included. `style_tokens=None` or scale 0
    is exactly `FluxAttnProcessor`. Both attentions are computed by the backend that the model's
    `set_attention_backend` chose.
    """

    _attention_backend = None
    _parallel_config = None

    def __init__(self, style: StyleAttention):
        self.style = style
        self.scale = 1.0

    def __call__(
        self,
        attn,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
        style_tokens: Tensor | None = None,
    ):
        from diffusers.models.embeddings import apply_rotary_emb

        def heads(x: Tensor) -> Tensor:
            return x.unflatten(-1, (-1, attn.head_dim))

        query = attn.norm_q(heads(attn.to_q(hidden_states)))
        key = attn.norm_k(heads(attn.to_k(hidden_states)))
        value = heads(attn.to_v(hidden_states))
        style_query = query
        text_length = 0
        if encoder_hidden_states is not None:
            text_length = encoder_hidden_states.shape[1]
            text_query = attn.norm_added_q(heads(attn.add_q_proj(encoder_hidden_states)))
            text_key = attn.norm_added_k(heads(attn.add_k_proj(encoder_hidden_states)))
            text_value = heads(attn.add_v_proj(encoder_hidden_states))
            query = torch.cat([text_query, query], dim=1)
            key = torch.cat([text_key, key], dim=1)
            value = torch.cat([text_value, value], dim=1)
        if image_rotary_emb is not None:
            query = apply_rotary_emb(query, image_rotary_emb, sequence_dim=1)
            key = apply_rotary_emb(key, image_rotary_emb, sequence_dim=1)

        backend = self._attention_backend
        attended = _attention(query, key, value, mask=attention_mask, backend=backend)
        attended = attended.flatten(2).to(query.dtype)
        text, image = attended[:, :text_length], attended[:, text_length:]
        if style_tokens is not None and self.scale != 0:
            image = image + self.scale * self.style(style_query, style_tokens, backend)
        if encoder_hidden_states is None:
            return image
        return attn.to_out[1](attn.to_out[0](image)), attn.to_add_out(text.contiguous())


class StyleAdapter(nn.Module):
    """All that the adapter adds to a frozen Flux transformer.

    `attn_adapter` has one entry per attention block, in the order of `transformer.attn_processors`
    (double blocks first).
    """

    def __init__(self, config: AdapterConfig, num_blocks: int, inner_dim: int):
        super().__init__()
        self.image_proj_mlp = MLPProjection(config)
        self.image_proj_qformer: QFormerProjection | None = QFormerProjection(config)
        self.attn_adapter = nn.ModuleList(
            StyleAttention(config.token_dim, inner_dim) for _ in range(num_blocks)
        )

    def tokens(self, style_BE: Tensor) -> Tensor:
        """Style vectors [B, E] -> style tokens [B, I, D]: the sum of both projections."""
        tokens = self.image_proj_mlp(style_BE)
        if self.image_proj_qformer is not None:
            tokens = tokens + self.image_proj_qformer(style_BE)
        return tokens

    def install(self, transformer) -> None:
        """Give every attention of `transformer` a processor that looks at the style tokens."""
        names = list(transformer.attn_processors)
        if len(names) != len(self.attn_adapter):
            raise CheckpointError(
                "The adapter must have one entry per attention block. "
                f"Got {len(self.attn_adapter)} entries for {len(names)} blocks."
            )
        transformer.set_attn_processor(
            {
                name: StyleAttnProcessor(style)
                for name, style in zip(names, self.attn_adapter, strict=True)
            }
        )


def set_scale(transformer, scale: float) -> None:
    """Set the weight of the style attention in every block."""
    for processor in transformer.attn_processors.values():
        processor.scale = scale


@contextmanager
def scaled(transformer, scale: float) -> Iterator[None]:
    """`set_scale` for a while: every block gets its own scale back whatever happens."""
    before = {processor: processor.scale for processor in transformer.attn_processors.values()}
    set_scale(transformer, scale)
    try:
        yield
    finally:
        for processor, own in before.items():
            processor.scale = own
