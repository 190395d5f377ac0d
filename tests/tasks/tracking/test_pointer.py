import pytest

from tasks.tracking.mirror import Mirror
from tasks.tracking.pointer import read_pointer, store_pointer, write_pointer

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

    mirror = object.__new__(Mirror)
    mirror._client, mirror._run_dir = Down(), tmp_path
    with pytest.raises(MlflowException, match="503"):
        mirror._run(POINTER)
