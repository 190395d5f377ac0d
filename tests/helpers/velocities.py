"""What a transformer computes of fixed numbers, alone and with an adapter."""

import torch

from calligrapher.model.policy import StyledTransformer


def call(transformer):
    generator = torch.Generator().manual_seed(2)
    config = transformer.config
    given = {
        "hidden_states": torch.randn(2, 6, config.in_channels, generator=generator),
        "encoder_hidden_states": torch.randn(2, 4, config.joint_attention_dim, generator=generator),
        "pooled_projections": torch.randn(2, config.pooled_projection_dim, generator=generator),
        "timestep": torch.tensor([0.7, 0.2]),
        "guidance": torch.full((2,), 3.5),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0)),
        "txt_ids": torch.zeros(4, 3),
    }
    with torch.no_grad():
        return transformer(**given).sample


def velocity(transformer, adapter):
    generator = torch.Generator().manual_seed(0)
    styled = StyledTransformer(transformer, adapter, 3.5).eval()
    config = transformer.config
    with torch.no_grad():
        return transformer(
            hidden_states=torch.randn(2, 6, config.in_channels, generator=generator),
            encoder_hidden_states=torch.randn(
                2, 4, config.joint_attention_dim, generator=generator
            ),
            pooled_projections=torch.randn(2, config.pooled_projection_dim, generator=generator),
            timestep=torch.tensor([0.7, 0.2]),
            guidance=torch.full((2,), 3.5),
            img_ids=torch.cartesian_prod(torch.zeros(1), torch.arange(2.0), torch.arange(3.0)),
            txt_ids=torch.zeros(4, 3),
            joint_attention_kwargs={
                "style_tokens": styled.adapter.tokens(torch.randn(2, 16, generator=generator))
            },
        ).sample
