import sqlite3
import subprocess
import sys

import pytest

from tasks.tracking.mlflow_setup import follow_moved_folder

CREATE = "import sys; from tasks.tracking.mlflow_setup import create_database as c; c(sys.argv[1])"


def test_pictures_of_a_moved_database_lie_beside_it(tmp_path):
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        database.executescript("""
            CREATE TABLE experiments (artifact_location TEXT);
            CREATE TABLE runs (artifact_uri TEXT);
            CREATE TABLE logged_models (artifact_location TEXT);
            INSERT INTO experiments VALUES ('file:///old/runs/mlartifacts'), ('s3://bucket/x');
            INSERT INTO runs VALUES ('file:///old/runs/mlartifacts/4711/artifacts'), ('s3://b/1');
            INSERT INTO logged_models VALUES ('file:///old/runs/mlartifacts/models/m-1');
        """)
    here = (tmp_path / "mlartifacts").as_uri()
    for _ in range(2):
        follow_moved_folder(f"sqlite:///{tmp_path / 'mlflow.db'}")
    with sqlite3.connect(tmp_path / "mlflow.db") as database:
        assert database.execute("SELECT * FROM experiments").fetchall() == [
            (here,),
            ("s3://bucket/x",),
        ]
        assert database.execute("SELECT * FROM runs").fetchall() == [
            (f"{here}/4711/artifacts",),
            ("s3://b/1",),
        ]
        assert database.execute("SELECT * FROM logged_models").fetchall() == [
            (f"{here}/models/m-1",)
        ]


@pytest.mark.slow
def test_processes_that_start_together_create_one_database(tmp_path):
    command = [sys.executable, "-c", CREATE, f"sqlite:///{tmp_path / 'mlflow.db'}"]
    processes = [subprocess.Popen(command) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
