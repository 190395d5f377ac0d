"""Copies of the adapter's weights that follow the trained ones: `ema` and `old`.

`ema` is evaluated; `old` samples NFT's rollouts. `decay` is the share of the copy that stays: 1
leaves it alone, 0 overwrites it.
"""

from typing import Literal

import torch
from torch import Tensor

from calligrapher.errors import InputError

OldPolicy = Literal["fixed", "slow", "fast", "copy"]
CHUNK = 16 * 2**20  # numbers that come from a GPU at a time
ROOM_LEFT = 2 * 2**30  # bytes of a GPU that an average leaves alone


def ema_decay(step: int, max_decay: float) -> float:
    """Return `min((1 + t) / (10 + t), max_decay)`.

    The average forgets its start quickly, then settles at max_decay.

    step: optimizer steps so far, t >= 0. Source: DiffusionNFT's and Flow-GRPO's `EMAModuleWrapper`.
    """
    _check_step(step)
    return min((1 + step) / (10 + step), max_decay)


def old_policy_decay(kind: OldPolicy | float, step: int) -> float:
    """The decay of `old` at the end of a round; step: optimizer steps so far.

    fixed: 1 (never updated). slow: 0.001 t, at most 0.5. fast: 0 while t < 75, then 0.0075 (t -
    75), at most 0.999. copy: 0 (on-policy). A number between 0 and 1 is the decay itself. Source:
    DiffusionNFT's `return_decay`, whose type 0 is our `copy`.
    """
    _check_step(step)
    match kind:
        case float() if 0.0 < kind < 1.0:
            return kind
        case "fixed":
            return 1.0
        case "slow":
            return min(0.001 * step, 0.5)
        case "fast":
            return 0.0 if step < 75 else min((step - 75) * 0.0075, 0.999)
        case "copy":
            return 0.0
    raise InputError(
        f"old_policy must be one of fixed, slow, fast, copy, or between 0 and 1. Got {kind!r}."
    )


@torch.no_grad()
def lerp_(target: dict[str, Tensor], source: dict[str, Tensor], decay: float) -> None:
    """`target <- decay * target + (1 - decay) * source`, in place, name by name.

    Computed in float32, stored in the target's dtype: keep the copies in float32, since bfloat16
    rounds small updates away for good. Raises InputError for a decay outside [0, 1], for names or
    shapes that differ, and for a target that shares memory with its source.
    """
    if not 0.0 <= decay <= 1.0:
        raise InputError(f"decay must lie in [0, 1]. Got {decay}.")
    if target.keys() != source.keys():
        differ = sorted(target.keys() ^ source.keys())
        raise InputError(
            f"both sides must have the same names. {len(differ)} differ, the first: {differ[:3]}."
        )
    for name, kept in target.items():
        new = source[name].detach()
        if kept.shape != new.shape:
            raise InputError(
                f"{name} must have one shape on both sides. Got {tuple(kept.shape)} and"
                f" {tuple(new.shape)}."
            )
        if kept.numel() and kept.data_ptr() == new.data_ptr():
            raise InputError(
                f"{name} shares its memory with its source. Make the copy with `snapshot`."
            )
    if decay == 1.0:
        return
    for name, kept in target.items():
        _blend_(kept, source[name].detach().to(kept.device), decay)


def _blend_(kept: Tensor, new: Tensor, decay: float) -> None:
    if decay == 0.0:
        kept.copy_(new)
    elif kept.dtype == torch.float32:
        kept.lerp_(new.float(), 1.0 - decay)  # without a copy as large as the tensor
    else:
        kept.copy_(kept.float().lerp(new.float(), 1.0 - decay))


def follow_(average: dict[str, Tensor], trained: dict[str, Tensor], decay: float) -> None:
    """`lerp_` of an average on the CPU after weights on a GPU, at least cost.

    Where the GPU has room, the average moves there for good (`average` gets new tensors). The peak
    of its memory is known: follow the weights after an optimizer step. Otherwise the weights come
    over in chunks, each blended while the next one is on its way. On one device it is `lerp_`.
    """
    devices = {tensor.device for tensor in trained.values()}
    if not any(device.type == "cuda" for device in devices) or all(
        tensor.device in devices for tensor in average.values()
    ):
        return lerp_(average, trained, decay)
    (device,) = devices
    if sum(tensor.nbytes for tensor in average.values()) <= room_on(device):
        for name in average:
            average[name] = average[name].to(device)
        return lerp_(average, trained, decay)
    follow_in_chunks_(average, trained, decay)


def room_on(device: torch.device) -> int:
    """Bytes of a GPU that stay free at the peak of this process so far, less `ROOM_LEFT`."""
    free, _ = torch.cuda.mem_get_info(device)
    spare = torch.cuda.memory_reserved(device) - torch.cuda.max_memory_allocated(device)
    return free + min(spare, 0) - ROOM_LEFT


@torch.no_grad()
def follow_in_chunks_(average: dict[str, Tensor], trained: dict[str, Tensor], decay: float) -> None:
    """`lerp_` of float32 tensors on the CPU after ones of a GPU, `CHUNK` numbers at a time.

    Two pinned buffers take turns: the copy into one, on a stream of its own, goes on while the
    other is blended.
    """
    device = next(iter(trained.values())).device
    on_gpu = device.type == "cuda"
    pieces = [
        (kept_part, new_part)
        for name, kept in average.items()
        for kept_part, new_part in zip(
            kept.view(-1).split(CHUNK), trained[name].reshape(-1).split(CHUNK), strict=True
        )
    ]
    buffers = [torch.empty(CHUNK, pin_memory=on_gpu) for _ in range(2)]
    stream = torch.cuda.Stream(device) if on_gpu else None
    if stream:
        stream.wait_stream(torch.cuda.current_stream(device))  # the optimizer's step

    def fetch(number: int) -> torch.cuda.Event | None:
        new = pieces[number][1]
        with torch.cuda.stream(stream):
            buffers[number % 2][: new.numel()].copy_(new, non_blocking=True)
            return stream.record_event() if stream else None

    arrived = fetch(0) if pieces else None
    for number, (kept, _) in enumerate(pieces):
        following = fetch(number + 1) if number + 1 < len(pieces) else None
        if arrived:
            arrived.synchronize()
        _blend_(kept, buffers[number % 2][: kept.numel()], decay)
        arrived = following


@torch.no_grad()
def snapshot(params: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return real copies of `params` on the same device.

    `.detach().cpu()` would alias weights that already are on the CPU.
    """
    return {name: tensor.detach().clone() for name, tensor in params.items()}


def _check_step(step: int) -> None:
    if step < 0:
        raise InputError(f"step must be 0 or more. Got {step}.")
