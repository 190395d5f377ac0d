import pytest

from calligrapher.errors import ParamsError
from tasks.tracking.backends.mlflow import Backend
from tasks.tracking.pointer import (
    read_pointer,
    refuse_password,
    store_pointer,
    with_variables,
    write_pointer,
)

POINTER = {"uri": "sqlite:////old/mlflow.db", "experiment": "e", "run_id": "4711"}


def test_a_store_at_another_address_is_asked_for_the_same_run(tmp_path):
    store_pointer(tmp_path, POINTER)
    write_pointer(tmp_path, "sqlite:////new/mlflow.db", "e")
    assert read_pointer(tmp_path) == POINTER | {"uri": "sqlite:////new/mlflow.db"}
    write_pointer(tmp_path, "sqlite:////new/mlflow.db", "another")
    assert read_pointer(tmp_path)["run_id"] is None


@pytest.mark.slow
def test_a_store_that_does_not_answer_gets_no_second_run(tmp_path):
    from mlflow.exceptions import MlflowException
    from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

    class Down:
        def get_run(self, run_id):
            raise MlflowException("503", error_code=TEMPORARILY_UNAVAILABLE)

    mirror = object.__new__(Backend)
    mirror._client, mirror._run_dir = Down(), tmp_path
    with pytest.raises(MlflowException, match="503"):
        mirror._run(POINTER)


@pytest.mark.parametrize("uri", ["https://me:secret@host", "postgresql://me:a${B}c@host/db"])
def test_a_password_in_the_uri_is_refused_and_not_repeated(uri, tmp_path):
    with pytest.raises(ParamsError, match="must not hold a password") as error:
        write_pointer(tmp_path, uri, "e")
    assert "secret" not in str(error.value)
    assert read_pointer(tmp_path) == {}


def test_a_variable_stands_for_the_password_until_mlflow_is_asked(tmp_path, monkeypatch):
    uri = "postgresql://me:${MLFLOW_PASSWORD}@host/db"
    write_pointer(tmp_path, uri, "e")
    assert read_pointer(tmp_path)["uri"] == uri
    monkeypatch.delenv("MLFLOW_PASSWORD", raising=False)
    with pytest.raises(ParamsError, match="MLFLOW_PASSWORD, which must be set"):
        with_variables(uri)
    monkeypatch.setenv("MLFLOW_PASSWORD", "secret")
    assert with_variables(uri) == "postgresql://me:secret@host/db"
    refuse_password("https://me@host")
