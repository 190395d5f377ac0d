"""The doctor's processes: they sum, and train a case."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from calligrapher.errors import CalligrapherError
from tasks.doctor.on_ranks import on_ranks
from tasks.params.run_params import RunParams

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parents[3]


def test_two_ranks_train_a_case_and_one_that_cannot_is_quoted(values, random_model, tmp_path):
    said = on_ranks(RunParams.model_validate(values()), tmp_path / "runs", 2)
    assert "2 sum their gradients; loss" in said
    shared = RunParams.model_validate(values(launch={"strategy": "fsdp2"}))
    assert on_ranks(shared, tmp_path / "runs", 2).split(", ")[0] == said.split(", ")[0]
    gone = RunParams.model_validate(values(model={"base": str(tmp_path / "gone")}))
    with pytest.raises(CalligrapherError, match="gone"):
        on_ranks(gone, tmp_path / "runs", 1)


def test_a_doctor_that_is_told_to_end_leaves_no_rank_and_no_temporary_file(
    values, random_model, tmp_path
):
    (tmp_path / "params.json").write_text(RunParams.model_validate(values()).model_dump_json())
    (tmp_path / "temporary").mkdir()
    code = (
        "from pathlib import Path; from tasks.doctor.on_ranks import on_ranks\n"
        "from tasks.params.run_params import RunParams\n"
        "params = RunParams.model_validate_json(Path('params.json').read_text())\n"
        "on_ranks(params, Path('runs'), 2)"
    )
    given = {"PYTHONPATH": str(ROOT), "TMPDIR": str(tmp_path / "temporary")}
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, env=os.environ | given
    ) as doctor:
        stop_at = time.monotonic() + 120
        while len(ranks := psutil.Process(doctor.pid).children(recursive=True)) < 2:
            assert doctor.poll() is None
            assert time.monotonic() < stop_at
            time.sleep(0.05)
        doctor.send_signal(signal.SIGTERM)
        assert doctor.wait(10) == -signal.SIGTERM
    # A rank that was still at its imports sees at their end that nobody listens any more.
    _, alive = psutil.wait_procs(ranks, timeout=120)
    assert alive == []
    assert list((tmp_path / "temporary").iterdir()) == []
