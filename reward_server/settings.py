"""Everything that a server process can be told."""

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from reward_server.scorer_files import ScorerFile

_VLM_TYPE = "qwen2_5_vl"
LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Option -> what it must name, and the file by which that is seen.
_LOADED = {
    "ocr_model_dir": ("a folder with Paddle weights (inference.yml)", "inference.yml"),
    "ocr_det_model_dir": ("a folder with Paddle weights (inference.yml)", "inference.yml"),
    "vlm_model_path": ("a folder with a Qwen2.5-VL (config.json)", "config.json"),
    "vlm_api_key_file": ("a file", ""),
    "vlm_prompt_file": ("a file", ""),
    "siglip_path": ("a folder with a SigLIP (config.json)", "config.json"),
}


class Settings(BaseModel):
    """Options of one server process: `ocr_mode` is `--ocr-mode` of `python -m reward_server`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = Field(
        "127.0.0.1", description="address to bind; another than loopback needs --token-file"
    )
    port: int = Field(8000, ge=1, le=65535, description="port to bind")
    token_file: Path | None = Field(
        None, description="file with the bearer token that clients must send"
    )
    disable_reward_model: bool = Field(
        False, description="debug: load no model, answer made-up numbers, mark every answer"
    )
    device: str = Field(
        "cpu", description="torch device of the local VLM and SigLIP: cpu, cuda, cuda:0"
    )

    ocr_engine: Literal["onnxruntime", "paddle", "none"] = Field(
        "onnxruntime",
        description=(
            "onnxruntime: CPU, bundled weights; paddle: needs --ocr-model-dir; none: no OCR"
        ),
    )
    ocr_model_dir: Path | None = Field(
        None, description="folder with Paddle recognition weights (engine paddle)"
    )
    ocr_det_model_dir: Path | None = Field(
        None, description="folder with Paddle detection weights (engine paddle)"
    )
    ocr_device: str = Field("cpu", description="device of the paddle engine: cpu, gpu, gpu:0")
    ocr_mode: Literal["auto", "line", "scene"] = Field(
        "auto",
        description=(
            "auto: find lines, keep those in the mask, read one that fills it as its box shows it;"
            " scene: always as found; line: the mask's box is one line"
        ),
    )
    ocr_match: Literal["loose", "exact"] = Field(
        "loose",
        description="whether case and spaces count, where a request's `match` does not say",
    )
    ocr_threads: int = Field(
        1, ge=1, le=256, description="pictures read side by side, one thread each"
    )

    vlm_model_path: Path | None = Field(
        None, description="folder of a Qwen2.5-VL, run by transformers"
    )
    vlm_url: str | None = Field(
        None, description="base URL of an OpenAI-compatible server, e.g. http://h:8000/v1"
    )
    vlm_model: str | None = Field(None, description="model name for --vlm-url")
    vlm_api_key_file: Path | None = Field(None, description="file with the API key for --vlm-url")
    vlm_mode: Literal["expectation", "generate"] = Field(
        "expectation",
        description="expectation over the score tokens of one forward, or parse <Score>n</Score>",
    )
    vlm_prompt_file: Path | None = Field(
        None, description="question template instead of the one for --vlm-mode"
    )
    vlm_min_mass: float = Field(
        0.5,
        ge=0,
        le=1,
        description="probability that the score tokens must hold together, or the score is null",
    )
    vlm_max_batch: int = Field(
        8, ge=1, description="pictures per VLM forward (GPU); requests at once (--vlm-url)"
    )
    vlm_timeout: float = Field(60.0, gt=0, description="seconds one request to --vlm-url may take")
    siglip_path: Path | None = Field(None, description="folder of a SigLIP, for the style score")

    scorer: tuple[str, ...] = Field(
        (),
        description=(
            "a scorer of your own, NAME=FILE:CLASS?KEY=VALUE&...; again for more"
            " (docs/extending.md)"
        ),
    )

    max_wait_ms: float = Field(
        5.0, ge=0, description="how long a VLM or style batch waits for company"
    )
    queue_size: int = Field(512, ge=1, description="items in the house; more are answered 429")
    max_items: int = Field(64, ge=1, description="items of one /score_batch")
    max_body_bytes: int = Field(64 * 2**20, ge=1024, description="bytes of one request's body")
    max_pixels: int = Field(4096 * 4096, ge=1, description="pixels of one picture")
    answer_cache: int = Field(
        4096, ge=0, description="answers kept for items that are asked again; 0: none"
    )
    body_timeout: float = Field(
        10.0,
        gt=0,
        description="seconds that a request's body may pause while it comes in (in all, ten times)",
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field(
        "info", description="what is logged; debug: a line for each request"
    )
    score_timeout: float = Field(
        120.0, gt=0, description="seconds after which a component counts as failed"
    )
    parent_pid: int | None = Field(None, description="stop when this process is gone")

    @model_validator(mode="after")
    def _consistent(self) -> "Settings":
        if self.host not in LOOPBACK and self.token_file is None:
            raise ValueError(
                f"token_file must be given when host is not loopback. Got host {self.host!r}."
            )
        names = [text.partition("=")[0] for text in self.scorer]
        if len(set(names)) != len(names):
            raise ValueError(f"scorer must name each scorer once. Got {', '.join(names)}.")
        _ = self.own_scorers
        if self.vlm_model_path is not None and self.vlm_url is not None:
            raise ValueError("vlm_model_path and vlm_url must not both be given.")
        if (self.vlm_url is None) != (self.vlm_model is None):
            raise ValueError(
                f"vlm_url and vlm_model must be given together. Got {self.vlm_url!r},"
                f" {self.vlm_model!r}."
            )
        if self.ocr_engine == "paddle" and self.ocr_model_dir is None:
            raise ValueError("ocr_model_dir must be given with ocr_engine paddle.")
        return self

    @property
    def own_scorers(self) -> dict[str, ScorerFile]:
        """Component -> the user's scorer that measures it. Raises ValueError."""
        pairs = [text.partition("=") for text in self.scorer]
        return {name: ScorerFile.parse(name, text) for name, _, text in pairs}

    def check_paths(self) -> None:
        """Raise ValueError when a file or folder that is to be loaded is not there.

        Told before a library is imported: loading would say so after half a minute.
        """
        if self.disable_reward_model:
            return
        for own in self.own_scorers.values():
            own.check()
        for name, (kind, file) in _LOADED.items():
            path = getattr(self, name)
            if path is not None and not (path / file).is_file():
                raise ValueError(f"{name} must be {kind}. Got {path}, where there is none.")
        if self.vlm_model_path is not None:
            _check_vlm(self.vlm_model_path)

    def token(self) -> str | None:
        """Return the bearer token, or None when none is required. Raises ValueError."""
        if self.token_file is None:
            return None
        try:
            token = self.token_file.read_text(encoding="utf-8").strip()
        except OSError as error:
            raise ValueError(
                f"token_file must be readable. Got {self.token_file}: {error.strerror}."
            ) from None
        if len(token) < 16 or not token.isascii():
            raise ValueError(
                f"token_file must hold at least 16 ASCII characters. Got {len(token)} in"
                f" {self.token_file}."
            )
        return token


def _check_vlm(folder: Path) -> None:
    """Raise ValueError unless `folder` is a whole Qwen2.5-VL by the look of its files."""
    what = f"vlm_model_path must be a folder with a Qwen2.5-VL. Got {folder}"
    try:
        kind = json.loads((folder / "config.json").read_text(encoding="utf-8"))["model_type"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{what}, whose config.json names no model_type ({error!r}).") from None
    if kind != _VLM_TYPE:
        raise ValueError(f"{what}, whose config.json names the model_type {kind!r}.")
    needed = {
        "weights": ("*.safetensors", "*.bin"),
        "a tokenizer": ("tokenizer.json", "vocab.json"),
        "a picture processor": ("preprocessor_config.json",),
    }
    lacking = [
        f"{part} ({' or '.join(names)})"
        for part, names in needed.items()
        if not any(any(folder.glob(name)) for name in names)
    ]
    if lacking:
        raise ValueError(f"{what}, where {' and '.join(lacking)} is missing: copy it there.")
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        if gone := sorted(name for name in files if not (folder / name).is_file()):
            raise ValueError(
                f"{what}, where {len(gone)} of {len(files)} weight files are missing,"
                f" such as {gone[0]}: copy them there."
            )
