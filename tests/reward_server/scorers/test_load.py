"""From settings to scorers that answer together."""

import pytest
from fakes import png

from reward_server.components import NAMES
from reward_server.scorers.load import load_scorers
from reward_server.settings import Settings


def test_the_configured_scorers_answer_together(serve, qwen_folder, siglip_folder):
    settings = Settings(
        ocr_engine="none", vlm_model_path=qwen_folder, vlm_min_mass=0.0, siglip_path=siglip_folder
    )
    body = {"image": png(40, 24, "red"), "mask": png(40, 24), "prompt": "The text is 'abc'."}
    with serve(*load_scorers(settings)) as client:
        both = client.post("/score", json={**body, "reference": png(30, 30, "red")}).json()
        plain = client.post("/score", json=body).json()
        info = client.get("/info").json()
    assert 0 < both["vlm_score"] < 1
    assert both["style_score"] > 0.9
    assert set(both["errors"]) == {name for name in NAMES if name.startswith("ocr_")}
    assert plain["style_score"] is None
    assert plain["errors"]["style_score"] == "no reference was given"
    assert plain["vlm_score"] != both["vlm_score"]  # the judge sees the reference
    assert set(info["scorers"]) == {"vlm", "style"}


def test_a_remote_judge_is_configured_by_url_model_and_key(tmp_path):
    (tmp_path / "key").write_text("k3y\n")
    settings = Settings(
        ocr_engine="none",
        vlm_url="http://127.0.0.1:9/v1",
        vlm_model="judge",
        vlm_api_key_file=tmp_path / "key",
        vlm_mode="generate",
        vlm_max_batch=3,
    )
    (scorer,) = load_scorers(settings)
    assert scorer.parallel == 3
    assert scorer.info["model"] == "judge"
    assert scorer.info["mode"] == "generate"


def test_an_engine_without_its_weights_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"inference\.yml"):
        load_scorers(Settings(ocr_engine="paddle", ocr_model_dir=tmp_path, ocr_mode="line"))
    with pytest.raises(FileNotFoundError, match="siglip_path"):
        load_scorers(Settings(ocr_engine="none", siglip_path=tmp_path))


def test_debug_mode_loads_no_model():
    (scorer,) = load_scorers(Settings(disable_reward_model=True, siglip_path="/nowhere"))
    assert scorer.name == "debug"
