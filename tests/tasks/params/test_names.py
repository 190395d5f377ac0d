"""Which names a run can have."""

import pytest

from calligrapher.errors import ParamsError
from tasks.params.names import check_run_name


@pytest.mark.parametrize("name", ["a", "tiny-nft", "2024.01_b", "_x", "database", "a" * 100])
def test_a_plain_name_is_taken_as_it_is(name):
    assert check_run_name(name) == name


BAD = ["", ".", "..", "../../x", "a/b", "/tmp/x", ".services", "-x", "a b", "a\n", "größe", "a\0"]
SHARED = ["data", "Data", "evaluations", "mlartifacts", "mlruns", "mlflow.db", "mlflow.db.lock"]


@pytest.mark.parametrize("name", [*BAD, *SHARED, "a" * 101])
def test_a_name_that_leads_elsewhere_or_to_what_runs_share_is_refused(name):
    with pytest.raises(ParamsError) as caught:
        check_run_name(name, "--fork")
    assert str(caught.value).startswith("--fork must be a name of at most 100 letters")
    assert repr(name) in str(caught.value)
