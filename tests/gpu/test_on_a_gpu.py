"""What only a GPU can show; skipped where there is none."""

import time

import pytest
import small_policy
import torch

from calligrapher.model.compiling import compile_blocks
from calligrapher.rl import ema

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
BACKENDS = [None, "native", "_native_flash", "_native_efficient", "_native_cudnn"]


def on_gpu(policy):
    policy.model.to("cuda")
    return policy


def velocity(policy):
    x, sigma, c = small_policy.inputs()
    with torch.no_grad():
        return policy.velocity(x.cuda(), sigma.cuda(), c.to(torch.device("cuda")))


def test_the_gpu_gives_the_velocity_of_the_cpu():
    torch.backends.cuda.matmul.allow_tf32 = False
    expected = small_policy.velocity(small_policy.build())
    torch.testing.assert_close(
        velocity(on_gpu(small_policy.build())).cpu(), expected, rtol=1e-3, atol=1e-4
    )


def test_the_ratio_before_the_first_step_is_one_in_bf16():
    policy = on_gpu(small_policy.build(autocast=torch.bfloat16))
    held = policy.to_storage(policy.snapshot())
    own = velocity(policy)
    with policy.use(held):
        assert torch.equal(velocity(policy), own)


@pytest.mark.parametrize("room", [2**40, 0])
def test_an_average_follows_weights_of_the_gpu_with_and_without_room(monkeypatch, room):
    monkeypatch.setattr(ema, "room_on", lambda device: room)
    monkeypatch.setattr(ema, "CHUNK", 1000)
    torch.manual_seed(0)
    average, trained = {"a": torch.randn(300, 17)}, {"a": torch.randn(300, 17)}
    expected = {"a": average["a"].clone()}
    ema.lerp_(expected, trained, 0.9)
    ema.follow_(average, {"a": trained["a"].cuda()}, 0.9)
    assert average["a"].device.type == ("cuda" if room else "cpu")
    torch.testing.assert_close(average["a"].cpu(), expected["a"], rtol=0, atol=1e-6)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_backend_of_attention_gives_about_the_same_velocity(backend, record_property):
    expected = velocity(on_gpu(small_policy.build(autocast=torch.bfloat16)))
    policy = on_gpu(small_policy.build(autocast=torch.bfloat16))
    if backend is not None:
        policy.model.transformer.set_attention_backend(backend)
    try:
        found = velocity(policy)
    except RuntimeError as error:
        pytest.skip(f"{backend} does not run here: {str(error).splitlines()[0]}")
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    record_property("seconds", seconds(policy))


def seconds(policy):
    """What 20 velocities take."""
    torch.cuda.synchronize()
    started = time.perf_counter()
    for _ in range(20):
        velocity(policy)
    torch.cuda.synchronize()
    return time.perf_counter() - started


def test_compiled_blocks_give_about_the_same_velocity(record_property):
    policy = on_gpu(small_policy.build(autocast=torch.bfloat16))
    expected = velocity(policy)
    record_property("eager_seconds", seconds(policy))
    compile_blocks(policy.model.transformer)
    torch.testing.assert_close(velocity(policy), expected, rtol=0.05, atol=0.05)
    record_property("compiled_seconds", seconds(policy))
