"""Settings -> scorers: the one place where a scorer is named."""

from collections.abc import Callable

from reward_server.scorers.base import Scorer
from reward_server.scorers.own import load_own
from reward_server.settings import Settings


def load_scorers(settings: Settings) -> list[Scorer]:
    """Return every configured scorer, loaded. Raises what the model libraries raise."""
    if settings.disable_reward_model:
        from reward_server.scorers.debug import DebugScorer

        return [DebugScorer(tuple(settings.own_scorers))]
    # A user's file comes first: its mistakes are then told before models are loaded.
    own = [load_own(file) for file in settings.own_scorers.values()]
    return [scorer for load in LOADERS if (scorer := load(settings)) is not None] + own


# Each imports its library itself: what is not configured need not be installed.
def _ocr(settings: Settings) -> Scorer | None:
    if settings.ocr_engine == "none":
        return None
    from reward_server.scorers.ocr.scorer import OCRScorer

    return OCRScorer(
        num_threads=settings.ocr_threads,
        mode=settings.ocr_mode,
        match=settings.ocr_match,
        engine=settings.ocr_engine,
        model_dir=settings.ocr_model_dir,
        det_model_dir=settings.ocr_det_model_dir,
        device=settings.ocr_device,
    )


def _local_vlm(settings: Settings) -> Scorer | None:
    if settings.vlm_model_path is None:
        return None
    from reward_server.scorers.vlm.local import LocalVLMScorer
    from reward_server.scorers.vlm.question import Question

    return LocalVLMScorer.load(
        settings.vlm_model_path,
        Question.load(settings.vlm_mode, settings.vlm_prompt_file),
        device=settings.device,
        max_batch=settings.vlm_max_batch,
        max_wait_s=settings.max_wait_ms / 1000,
        min_mass=settings.vlm_min_mass,
    )


def _remote_vlm(settings: Settings) -> Scorer | None:
    if settings.vlm_url is None or settings.vlm_model is None:
        return None
    from reward_server.scorers.vlm.http import HttpVLMScorer
    from reward_server.scorers.vlm.question import Question

    key_file = settings.vlm_api_key_file
    return HttpVLMScorer(
        settings.vlm_url,
        settings.vlm_model,
        Question.load(settings.vlm_mode, settings.vlm_prompt_file),
        api_key=key_file.read_text(encoding="utf-8").strip() if key_file else None,
        parallel=settings.vlm_max_batch,
        timeout_s=settings.vlm_timeout,
        min_mass=settings.vlm_min_mass,
    )


def _style(settings: Settings) -> Scorer | None:
    if settings.siglip_path is None:
        return None
    from reward_server.scorers.style import StyleScorer

    return StyleScorer.load(
        settings.siglip_path, device=settings.device, max_wait_s=settings.max_wait_ms / 1000
    )


LOADERS: tuple[Callable[[Settings], Scorer | None], ...] = (
    _ocr,
    _local_vlm,
    _remote_vlm,
    _style,
)
