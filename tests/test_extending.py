"""docs/extending.md: what it names is there; doing what it says adds a reward, an algorithm."""

import hashlib
import json
import os
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "extending.md").read_text()
PACKAGES = ("calligrapher", "flows", "reward_server", "tasks")


def test_every_file_that_the_page_names_is_there():
    links = re.findall(r"\]\(\.\./([^)#]+)\)", TEXT)
    assert len(set(links)) > 15
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_page_counts_the_places_as_it_lists_them():
    rows = re.findall(r"^\| \[[^\]]+\]\(#([a-z-]+)\) \| (\d) \|$", TEXT, re.MULTILINE)
    assert len(rows) == 7
    for anchor, count in rows:
        section = TEXT.split(f"## {anchor.replace('-', ' ').capitalize()}\n")[1].split("\n## ")[0]
        assert len(re.findall(r"^\d\. ", section, re.MULTILINE)) == int(count), anchor


@pytest.fixture
def tree(tmp_path):
    """A copy of the four packages to change, and a way to run Python in it."""
    for name in PACKAGES:
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / "tree" / name, ignore=ignored)
    shutil.copytree(ROOT / "tests" / "helpers", tmp_path / "tree" / "helpers")
    return tmp_path / "tree"


def insert(path, before, text):
    """Put `text` in front of the one place where `before` stands."""
    content = path.read_text()
    assert content.count(before) == 1, (path, before)
    path.write_text(content.replace(before, text + before))


def environment(tree):
    return os.environ | {"PYTHONPATH": f"{tree}:{tree / 'helpers'}", "OMP_NUM_THREADS": "1"}


TRAIN = """
import json, sys
from contextlib import ExitStack
from pathlib import Path
from small_runs import SETTINGS, HashScorer
from calligrapher.tiny.build import write_random
from calligrapher.tiny.world import write_bench
from calligrapher.data.canvas import Canvas
from tasks.artifacts.layout import RunsDir
from tasks.params.run_params import RunParams
from tasks.resources.rewards import RewardScorer
from tasks.runs.preflight import preflight
from tasks.runs.run import open_run, resources_of

place, changes = Path(sys.argv[1]), json.loads(sys.argv[2])
model = write_random(place / "model")
write_bench(place / "cases", num_cases=4, split="train", seed=1)
values = {name: dict(v) if isinstance(v, dict) else v for name, v in SETTINGS.items()}
weights = {"base": "flux-fill", "siglip": "siglip", "initial_adapter": "calligrapher.bin"}
values["model"] |= {key: str(model / name) for key, name in weights.items()}
values["data"] = {"train": str(place / "cases")}
values["rounds"] = 1
for name, value in changes.items():
    values[name] = {**values.get(name, {}), **value} if isinstance(value, dict) else value
params = RunParams.model_validate(values)
urls = params.reward.server_urls
scorer = RewardScorer(params.reward, urls, Canvas(48, 32)) if urls else HashScorer()
with ExitStack() as stack:
    if params.reward.scorers:
        from flows.contexts import lazy_scorer

        preflight(params, place / "data")
        scorer = stack.enter_context(lazy_scorer(params, place / "run", place / "data"))
    run = stack.enter_context(open_run(resources_of(params, RunsDir(place), scorer), place / "run"))
    run.make_planned()
    made = {name: run.folder.load(f"round-0000/{name}") for name in ("score", "update")}
    print(json.dumps({name: artifact.meta for name, artifact in made.items()}))
"""


def train(tree, place, changes):
    """Train one round in `tree`; return the meta of its scores and its update."""
    command = [sys.executable, "-c", TRAIN, str(place), json.dumps(changes)]
    process = subprocess.run(
        command, cwd=place, env=environment(tree), capture_output=True, text=True, timeout=300
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return json.loads(process.stdout.splitlines()[-1])


LEGIBLE = '''"""How much of the picture is dark."""

from reward_server.scorers.base import Outcome


class LegibleScorer:
    """Scores the share of dark pixels."""

    name, fields, parallel, max_batch, max_wait_s = "legible", ("legible",), 1, 8, 0.0

    def __init__(self, darker_than):
        self.darker_than = darker_than
        self.info = {"darker_than": str(darker_than)}

    def score_items(self, items):
        return [Outcome({"legible": float((i.image < self.darker_than).mean())}) for i in items]

    def close(self):
        pass
'''


PAGES_REWARD = re.search(r"```python\n(# my_rewards.py\n.*?)```", TEXT, re.DOTALL)[1]


@pytest.mark.slow
def test_the_pages_reward_of_ones_own_is_trained_with_on_the_runs_own_server(tree, tmp_path):
    assert len(PAGES_REWARD.splitlines()) <= 20
    (tmp_path / "my_rewards.py").write_text(PAGES_REWARD)
    scorers = {"legible": "my_rewards.py:Legible?darker_than=90"}
    weights = {"ocr_likelihood": 0.25, "legible": 2.0}
    nft = {"num_train_sigmas": 1, "kl_coef": 0.0}
    reward = {"ocr_weight": 0.5, "weights": weights, "scorers": scorers}
    meta = train(tree, tmp_path, {"reward": reward, "nft": nft})["score"]
    assert meta["unscored"] == 0
    assert 0 < meta["legible_mean"] < 1
    parts = 0.5 * meta["ocr_accuracy_mean"] + 0.25 * meta["ocr_likelihood_mean"]
    assert meta["reward_mean"] == pytest.approx(parts + 2 * meta["legible_mean"])
    score = tmp_path / "run" / "round-0000" / "score"
    table = pq.read_table(next(score.glob("scores-*.parquet")))
    assert table.schema.field("legible").type == pa.float64()
    manifest = json.loads((score / "artifact.json").read_text())
    told = manifest["extra"]["scored_by"]["scorers"]["legible"]
    assert told["class"] == "Legible"
    assert told["sha256"] == hashlib.sha256(PAGES_REWARD.encode()).hexdigest()
    assert manifest["params"]["reward"]["weights"] == {"legible": 2.0}


@pytest.mark.slow
def test_a_component_is_added_in_five_places_and_trained_with(tree, tmp_path):
    server = tree / "reward_server"
    (server / "scorers" / "legible.py").write_text(LEGIBLE)
    insert(
        server / "scorers" / "load.py",
        "LOADERS: tuple[",
        "def _legible(settings):\n"
        "    from reward_server.scorers.legible import LegibleScorer\n\n"
        "    return LegibleScorer(settings.darker_than)\n\n\n",
    )
    insert(server / "scorers" / "load.py", "    _style,\n)", "    _legible,\n")
    insert(
        server / "settings.py",
        "    ocr_mode: Literal",
        '    darker_than: int = Field(128, description="grey level of what is dark")\n',
    )
    insert(
        server / "components.py",
        "\n\n_FACTS = {",
        '    legible: float | None = _measured(by="--darker-than", weighable=True)\n',
    )
    insert(
        server / "service" / "schema.py",
        "    errors: dict[str, str] = Field(",
        "    legible: Share | None\n",
    )
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = [f"--port={port}", "--ocr-engine=none", "--darker-than=90"]
    process = subprocess.Popen(
        [sys.executable, "-m", "reward_server", *flags], cwd=tmp_path, env=environment(tree)
    )
    try:
        reward = {
            "server_urls": [f"http://127.0.0.1:{port}"],
            "ocr_weight": 0.0,
            "weights": {"legible": 2.0},
        }
        nft = {"num_train_sigmas": 1, "kl_coef": 0.0}
        meta = train(tree, tmp_path, {"reward": reward, "nft": nft})
    finally:
        process.terminate()
        process.wait(30)
    assert meta["score"]["unscored"] == 0
    assert 0 < meta["score"]["legible_mean"] < 1
    assert meta["score"]["reward_mean"] == pytest.approx(2 * meta["score"]["legible_mean"])
    assert meta["score"]["legible_std"] > 0
    assert meta["update"]["optimizer_steps"] > 0


BEST_OF = '''"""Best-of-group: supervised on the images that are better than their group's mean."""

from typing import ClassVar

import torch
from pydantic import Field

from calligrapher.rl.algorithm import Algorithm
from calligrapher.rl.rows import noised
from calligrapher.rl.seeds import seeded


class BestOfParams(Algorithm):
    """Its settings."""

    threshold: float = Field(0.0, description="Advantage above which an image is learned.")

    name: ClassVar[str] = "best_of"
    default_ema_decay: ClassVar[float] = 0.99
    needs_old: ClassVar[bool] = False
    needs_reference: ClassVar[bool] = False
    old_is_start: ClassVar[bool] = False
    exploration: ClassVar[None] = None

    def losses(self, policy, rows, key, *, num_steps, old, reference):
        streams = [seeded(key, *place) for place in rows.places.tolist()]
        sigma = torch.cat([torch.rand(1, generator=stream) for stream in streams])
        shape = rows.x0.shape[1:]
        noise = torch.stack([torch.randn(shape, generator=stream) for stream in streams])
        x = noised(rows.x0, sigma, noise)
        error = ((policy.velocity(x, sigma, rows.conditioning) - (noise - rows.x0)) ** 2)
        learned = (rows.advantages > self.threshold).float()
        loss = (error.mean((1, 2)) * learned).mean()
        yield loss, {"loss": loss.detach(), "learned_share": learned.mean()}

    def old_policy_decay(self, step, round_index):
        return 0.0

    def forwards_per_image(self, num_steps):
        return 1

    def fits(self, num_steps):
        pass
'''


@pytest.mark.slow
def test_an_algorithm_is_added_in_two_places_and_trained_with(tree, tmp_path):
    (tree / "calligrapher" / "rl" / "best_of.py").write_text(BEST_OF)
    params = tree / "tasks" / "params" / "run_params.py"
    insert(params, "from calligrapher.rl.nft", "from calligrapher.rl.best_of import BestOfParams\n")
    insert(params, "    nft: NFTParams | None", "    best_of: BestOfParams | None = None\n")
    meta = train(tree, tmp_path, {"best_of": {"threshold": 0.1}})
    assert meta["update"]["optimizer_steps"] > 0
    assert 0 < meta["update"]["learned_share"] < 1
    manifest = json.loads((tmp_path / "run/round-0000/update/artifact.json").read_text())
    assert manifest["params"]["algorithm"] == "best_of"
    assert manifest["params"]["best_of"] == {"threshold": 0.1}
    state = json.loads((tmp_path / "run/params.json").read_text())
    assert state["nft"] is None
    assert state["grpo"] is None
