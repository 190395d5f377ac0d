"""The doctor's processes: they sum, and train a case."""

import pytest

from calligrapher.errors import CalligrapherError
from tasks.doctor.on_ranks import on_ranks
from tasks.params.run_params import RunParams


@pytest.mark.slow
def test_two_ranks_train_a_case_and_one_that_cannot_is_quoted(values, random_model, tmp_path):
    params = RunParams.model_validate(values())
    said = on_ranks(params, tmp_path / "runs", 2, gpu_ids=[0, 1], timeout_s=240)
    assert "2 sum their gradients; loss" in said
    gone = RunParams.model_validate(values(model={"base": str(tmp_path / "gone")}))
    with pytest.raises(CalligrapherError, match=r"rank 0 failed: .*gone"):
        on_ranks(gone, tmp_path / "runs", 1, gpu_ids=[0], timeout_s=240)
