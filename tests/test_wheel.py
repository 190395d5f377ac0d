"""The wheel holds all that runs without the repository."""

import importlib.util
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = ("calligrapher", "flows", "reward_server", "tasks")
LEAVE_OUT = {"__pycache__", ".mypy_cache"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("hatchling") is None, reason="builds with hatchling: install it"
    ),
]


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory):
    """The folder that the wheel's files lie in, as in site-packages."""
    folder = tmp_path_factory.mktemp("wheel")
    command = ["-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([sys.executable, *command, "--wheel-dir", folder, ROOT], check=True, timeout=300)
    (wheel,) = folder.glob("calligrapher-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(folder / "site")
    return folder / "site"


def files(root, *folders):
    return {
        str(path.relative_to(root))
        for folder in folders
        for path in (root / folder).rglob("*")
        if path.is_file() and not LEAVE_OUT & set(path.parts)
    }


def test_every_file_of_the_packages_is_in_it_and_nothing_else_but_the_params(unpacked):
    found = files(unpacked, *PACKAGES)
    params = {f"tasks/params/shipped/{path.name}" for path in (ROOT / "params").iterdir()}
    assert found - params == files(ROOT, *PACKAGES)
    assert params <= found
    assert {
        "tasks/runs/run.py",
        "reward_server/scorers/vlm/prompts/generate.txt",
        "flows/demo/demo.css",
        "calligrapher/tiny/data/calligrapher.bin",
        "calligrapher/sizing/configs/siglip/config.json",
        "calligrapher/py.typed",
    } <= found
    (licence,) = unpacked.glob("*.dist-info/licenses/LICENSE")
    assert licence.read_bytes() == (ROOT / "LICENSE").read_bytes()


def test_the_shipped_params_load_in_an_empty_folder(unpacked, tmp_path):
    command = (
        "import tasks; from tasks.params.files import find_params_file;"
        "from tasks.params.run_params import load_params;"
        "print(tasks.__file__, load_params(find_params_file('tiny-nft')).update.batch_size)"
    )
    found = subprocess.run(
        [sys.executable, "-c", command],
        cwd=tmp_path,
        env={"PYTHONPATH": str(unpacked)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert found.stdout.split() == [str(unpacked / "tasks/__init__.py"), "24"]
