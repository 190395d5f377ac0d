"""`calligrapher doctor`, as a person calls it."""

import json

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from calligrapher.errors import CalligrapherError
from flows.cli import doctor
from flows.cli.main import main
from tasks.params.files import find_params_file
from tasks.params.run_params import load_params

NOBODY = "http://127.0.0.1:9"


def test_what_is_wrong_is_one_line_with_what_to_do_and_the_exit_status_says_so(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr("tasks.doctor.checks.data", lambda params, runs_dir: "as they are")
    monkeypatch.setattr("tasks.doctor.on_ranks.on_ranks", lambda *given, **named: "one")
    asked = ["doctor", "tiny-nft", f"runs_dir={tmp_path / 'runs'}", f"tracking.uri={NOBODY}"]
    with temporary_settings({PREFECT_API_URL: ""}):
        assert main([*asked, "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert [finding["check"] for finding in found if not finding["ok"]] == ["mlflow"]
    assert {f["check"] for f in found} >= {"versions", "devices", "weights", "disk", "rewards"}
    with temporary_settings({PREFECT_API_URL: ""}):
        assert main([*asked[:-1]]) == 0
    assert "ok rewards: the run starts its own on a free port, for ocr" in capsys.readouterr().out


def test_a_prefect_server_that_does_not_answer_is_told():
    with (
        temporary_settings({PREFECT_API_URL: f"{NOBODY}/api"}),
        pytest.raises(CalligrapherError, match=r"PREFECT_API_URL must name a server that answers"),
    ):
        doctor.prefect()


def test_an_mlflow_server_that_does_not_answer_is_told(tmp_path):
    params = load_params(find_params_file("tiny-nft"), [f"tracking.uri={NOBODY}"])
    with pytest.raises(CalligrapherError, match=r"tracking.uri must name an MLflow server"):
        doctor.mlflow(params, tmp_path)
