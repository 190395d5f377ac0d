import json

import pytest
from pydantic import ValidationError

from reward_server.settings import Settings


def test_another_address_than_loopback_needs_a_token(tmp_path):
    with pytest.raises(ValidationError, match="token_file must be given"):
        Settings(host="0.0.0.0")
    Settings(host="0.0.0.0", token_file=tmp_path / "token")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"vlm_url": "http://h/v1"}, "given together"),
        ({"vlm_url": "http://h/v1", "vlm_model": "m", "vlm_model_path": "/m"}, "not both"),
        ({"ocr_engine": "paddle"}, "ocr_model_dir"),
        ({"port": 0}, "port"),
        ({"queue_size": 0}, "queue_size"),
        ({"colour": "red"}, "colour"),
    ],
)
def test_options_that_do_not_fit_are_refused(options, told):
    with pytest.raises(ValidationError, match=told):
        Settings(**options)


@pytest.mark.parametrize("content", [None, "short", "tokën-with-an-umlaut-in-it"])
def test_an_unusable_token_file_is_refused(tmp_path, content):
    path = tmp_path / "token"
    if content is not None:
        path.write_text(content, encoding="utf-8")
    with pytest.raises(ValueError, match="token_file must"):
        Settings(token_file=path).token()


def test_every_option_is_documented_and_has_a_flag(capsys):
    from reward_server.processes.serve import main

    with pytest.raises(SystemExit):
        main(["--help"])
    told = capsys.readouterr().out
    for name, field in Settings.model_fields.items():
        assert field.description
        assert "--" + name.replace("_", "-") in told


@pytest.mark.parametrize(
    "flags",
    [
        ["--host=0.0.0.0"],
        ["--port=abc"],
        ["--ocr-engine=tesseract"],
        ["--token-file=/none"],
        ["--vlm-model-path=/none"],
        ["--vlm-model-path=reward_server"],  # a folder without a model
        ["--siglip-path=/none"],
        ["--ocr-engine=paddle", "--ocr-model-dir=/none"],
        ["--vlm-prompt-file=/none"],
        ["--vlm-url=http://a", "--vlm-model=b", "--vlm-api-key-file=/none"],
    ],
)
@pytest.mark.parametrize("launcher", [False, True])
def test_wrong_flags_end_with_one_line_before_anything_is_loaded(
    flags, launcher, capsys, monkeypatch
):
    from reward_server.processes import launch, serve

    monkeypatch.setattr(serve, "serve", None)
    monkeypatch.setattr(launch, "Fleet", None)
    with pytest.raises(SystemExit) as ended:
        (launch.main if launcher else serve.main)(flags)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "error:" in line
    option, _, value = flags[-1].removeprefix("--").partition("=")
    assert f"error: {option.replace('-', '_')}" in line or "host" in option
    assert value in line


def test_what_is_not_loaded_need_not_be_there():
    Settings(disable_reward_model=True, siglip_path="/none").check_paths()


@pytest.mark.parametrize(
    ("config", "files", "told"),
    [
        ("{}", [], "names no model_type"),
        ("no json", [], "names no model_type"),
        ('{"model_type": "siglip"}', [], "model_type 'siglip'"),
        ('{"model_type": "qwen2_5_vl"}', ["tokenizer.json"], "weights (*.safetensors or *.bin)"),
        (
            '{"model_type": "qwen2_5_vl"}',
            ["a.safetensors", "vocab.json"],
            "a picture processor (preprocessor_config.json) is missing",
        ),
        (
            '{"model_type": "qwen2_5_vl"}',
            ["a.safetensors", "vocab.json", "preprocessor_config.json", "INDEX"],
            "1 of 2 weight files are missing, such as b.safetensors",
        ),
    ],
)
def test_a_folder_that_is_no_whole_vlm_is_told_in_one_sentence(tmp_path, config, files, told):
    (tmp_path / "config.json").write_text(config)
    for name in files:
        (tmp_path / name).touch()
    if "INDEX" in files:
        index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"must be a folder with a Qwen2\.5-VL") as refused:
        Settings(vlm_model_path=tmp_path).check_paths()
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_whole_vlm_passes(qwen_folder):
    Settings(vlm_model_path=qwen_folder).check_paths()


def test_the_log_level_reaches_our_loggers_alone():
    import logging

    from reward_server.processes.serve import log_to_stderr

    before = logging.getLogger().level, logging.getLogger("reward_server").level
    try:
        log_to_stderr(Settings(log_level="debug"))
        assert logging.getLogger("reward_server.service").isEnabledFor(logging.DEBUG)
        assert not logging.getLogger("PIL").isEnabledFor(logging.DEBUG)
        log_to_stderr(Settings(log_level="error"))
        assert not logging.getLogger("a_library").isEnabledFor(logging.WARNING)
    finally:
        logging.getLogger().setLevel(before[0])
        logging.getLogger("reward_server").setLevel(before[1])
