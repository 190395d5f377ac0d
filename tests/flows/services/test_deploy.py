import os
import subprocess
import sys


def test_the_command_tells_prefect_to_tell_nobody_before_it_is_imported(tmp_path):
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "__init__.py").write_text(
        "import os, sys\nprint(os.environ.get('DO_NOT_TRACK'))\nsys.exit(0)\n"
    )
    environment = {name: value for name, value in os.environ.items() if name != "DO_NOT_TRACK"}
    paths = [str(tmp_path), *sys.path]
    done = subprocess.run(
        [sys.executable, "-m", "flows.services.deploy"],
        env=environment | {"PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "true\n", done.stderr
