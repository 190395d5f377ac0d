"""An application around given scorers, ready to be asked; and tiny models in the published
layouts."""

import time
from contextlib import contextmanager

import pytest


@contextmanager
def serving(*scorers, wait=True, on_failure=lambda: None, **settings):
    from fastapi.testclient import TestClient

    from reward_server.service.app import create_app
    from reward_server.settings import Settings

    app = create_app(Settings(**settings), lambda: list(scorers), on_failure)
    with TestClient(app, raise_server_exceptions=False) as client:
        stop_at = time.monotonic() + 20
        while wait and client.get("/health").status_code != 200 and time.monotonic() < stop_at:
            time.sleep(0.01)
        client.service = app.state.service
        yield client


@pytest.fixture
def serve():
    """`with serve(scorer, queue_size=3) as client:`."""
    return serving


SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
]


@pytest.fixture(scope="session")
def qwen_folder(tmp_path_factory):
    """A Qwen2.5-VL of a few thousand random weights in the published layout."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, Qwen2Tokenizer
    from transformers.convert_slow_tokenizer import bytes_to_unicode
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    path = tmp_path_factory.mktemp("qwen")
    vocab = {letter: place for place, letter in enumerate(bytes_to_unicode().values())}
    tokenizer = Qwen2Tokenizer(vocab=vocab, merges=[])
    tokenizer.add_special_tokens({"additional_special_tokens": SPECIALS[1:]})
    ids = {name: tokenizer.convert_tokens_to_ids(name) for name in SPECIALS}
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "num_heads": 2,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "patch_size": 4,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
    text = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "rope_parameters": rope,
    }
    config = Qwen2_5_VLConfig(
        text_config=text,
        vision_config=vision,
        image_token_id=ids["<|image_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    torch.manual_seed(3)
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(path)
    tokenizer.save_pretrained(path)
    Qwen2VLImageProcessorPil(patch_size=4, min_pixels=64, max_pixels=4096).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def siglip_folder(tmp_path_factory):
    """A SigLIP vision tower of a few thousand random weights in the published layout."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    path = tmp_path_factory.mktemp("siglip")
    torch.manual_seed(0)
    config = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=24,
        patch_size=8,
    )
    SiglipVisionModel(config).save_pretrained(path)
    return path
