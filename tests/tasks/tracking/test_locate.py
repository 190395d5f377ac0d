"""What a name of a run is taken for."""

import pytest

from calligrapher.errors import ArtifactError
from tasks.artifacts.layout import PARAMS
from tasks.tracking.locate import locate


def test_a_folder_here_that_is_no_run_does_not_hide_the_run_of_that_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/fonts"
    (run / "round-0001/update").mkdir(parents=True)
    (run / PARAMS).write_text("{}")
    (tmp_path / "fonts").mkdir()
    assert locate("fonts", tmp_path / "runs") == (run, None)
    artifact = locate("fonts/round-0001/update", tmp_path / "runs")
    assert artifact == (run, "round-0001/update")
    with pytest.raises(ArtifactError, match="fonts2 must name a run"):
        locate("fonts2", tmp_path / "runs")


def test_an_artifact_that_is_gone_is_still_its_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = tmp_path / "runs/fonts"
    run.mkdir(parents=True)
    (run / PARAMS).write_text("{}")
    gone = (run, "round-0001/refresh")
    assert locate(str(run / "round-0001/refresh"), tmp_path / "runs") == gone
    assert locate("fonts/round-0001/refresh", tmp_path / "runs") == gone
