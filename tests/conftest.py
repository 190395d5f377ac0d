"""A tiny model with random weights, written once per session in the layout of the full-size one."""

from collections import Counter
from contextlib import contextmanager
from pathlib import Path

import pytest

from calligrapher.threads import wait_asleep

wait_asleep()  # before any test imports torch


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """What a test printed reaches the process that reports, also where it is no UTF-8."""
    report = yield
    report.sections = [
        (title, text.encode("utf-8", "backslashreplace").decode())
        for title, text in report.sections
    ]
    return report


@pytest.fixture(scope="module")
def one_thread():
    """This process computes the same bits as several ranks with as many threads as each of them."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def random_model(tmp_path_factory) -> Path:
    """A folder with `flux-fill/`, `siglip/` and `calligrapher.bin`. Read-only: it is shared by all
    tests."""
    from calligrapher.tiny.build import write_random

    return write_random(tmp_path_factory.mktemp("model") / "random")


@pytest.fixture
def random_transformer(random_model):
    """The transformer of `random_model`, freshly loaded."""
    from diffusers import FluxTransformer2DModel

    return FluxTransformer2DModel.from_pretrained(random_model / "flux-fill" / "transformer").eval()


@pytest.fixture
def random_encoders(random_model):
    """The frozen encoders of `random_model`, freshly loaded; they take prompts of up to 24
    tokens."""
    from diffusers import FluxFillPipeline
    from transformers import AutoImageProcessor, SiglipVisionModel

    from calligrapher.model.conditioning import Encoders

    pipeline = FluxFillPipeline.from_pretrained(random_model / "flux-fill")
    pipeline.set_progress_bar_config(disable=True)
    return Encoders(
        pipeline=pipeline,
        siglip=SiglipVisionModel.from_pretrained(random_model / "siglip").eval(),
        image_processor=AutoImageProcessor.from_pretrained(random_model / "siglip"),
        digest="random",
        max_sequence_length=24,
    )


@pytest.fixture
def count_calls():
    """`with count_calls(model) as calls`: how often each network ran in the block; absent =
    never."""

    @contextmanager
    def count_calls(model):
        calls: Counter[str] = Counter()
        pipeline = model.encoders.pipeline
        networks = {
            "clip": pipeline.text_encoder,
            "t5": pipeline.text_encoder_2,
            "siglip": model.encoders.siglip,
            "vae_encode": model.vae.encoder,
            "vae_decode": model.vae.decoder,
            "transformer": model.policy.model.transformer,
        }
        hooks = [
            network.register_forward_hook(lambda *_, name=name: calls.update([name]))
            for name, network in networks.items()
        ]
        try:
            yield calls
        finally:
            for hook in hooks:
                hook.remove()

    return count_calls
