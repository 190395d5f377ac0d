"""What breaks under a run from outside, as listed in docs/operations.md: the run ends as an
unharmed one."""

import json
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from calligrapher.errors import ArtifactError, RewardError, RunLockedError
from tasks.params.run_params import RunParams

# Answers with rewards that the picture's bytes decide; dies by SIGKILL in the middle of request
# argv[1].
REWARD_SERVER = """
import hashlib, json, os, signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer

OCR = ("ocr_text", "ocr_confidence", "ocr_accuracy", "ocr_likelihood")
FIELDS = (*OCR, "vlm_score", "style_score")
asked = 0

class Handler(BaseHTTPRequestHandler):
    def reply(self, content):
        raw = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("content-length", str(len(raw)))
        self.end_headers()
        self.wfile.write(raw)

    def do_GET(self):
        self.reply({"scorers": {"ocr": "hash"}})

    def do_POST(self):
        global asked
        asked += 1
        if asked == int(sys.argv[1]):
            os.kill(os.getpid(), signal.SIGKILL)
        results = []
        for item in json.loads(self.rfile.read(int(self.headers["content-length"])))["items"]:
            value = hashlib.sha256(item["image"].encode()).digest()[0] / 256
            errors = {field: "not here" for field in FIELDS if field != "ocr_accuracy"}
            score = dict.fromkeys(FIELDS) | {"ocr_accuracy": value}
            score |= {"errors": errors, "reward_model_disabled": False}
            results.append({"score": score, "error": None})
        self.reply({"results": results})

    def log_message(self, *args):
        pass

server = HTTPServer(("127.0.0.1", 0), Handler)
print(server.server_port, flush=True)
server.serve_forever()
"""


@pytest.fixture
def reward_server():
    """Start a server that dies in the middle of its n-th request (0 = never); (process, url)."""
    started = []

    def start(dies_in):
        command = [sys.executable, "-c", REWARD_SERVER, str(dies_in)]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        started.append(process)
        return process, f"http://127.0.0.1:{int(process.stdout.readline())}"

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_reward_server_that_is_killed_costs_what_was_not_scored_and_nothing_else(
    train, reward_server, make_resources
):
    from calligrapher.data.canvas import Canvas
    from tasks.resources.rewards import RewardScorer

    params = make_resources(reward={"timeout_s": 0.2}).params.reward

    def scorer(url):
        return RewardScorer(params, [url], Canvas(48, 32, False))

    process, url = reward_server(2)
    with pytest.raises(RewardError, match=r"could not be scored.* start the same command again"):
        train("a", "nft", scorer(url), reward={"timeout_s": 0.2})
    assert process.wait() == -signal.SIGKILL
    _, url = reward_server(0)
    folder, resumed = train("a", "nft", scorer(url), reward={"timeout_s": 0.2})
    _, whole = train("b", "nft", scorer(url), reward={"timeout_s": 0.2})
    assert resumed["adapter_digest"] == whole["adapter_digest"]
    assert list(folder.rglob("*.partial")) == []


def run_to_the_end(resources, folder, name):
    from tasks.pipeline import planned
    from tasks.runs.run import open_run

    with open_run(resources, folder / name) as run:
        run.make_planned()
        return [run.folder.load(artifact).digest for artifact in planned(run.params)]


def test_a_run_whose_disk_was_full_goes_on_when_there_is_room(make_resources, small_disk, tmp_path):
    whole = run_to_the_end(make_resources(), tmp_path, "whole")
    with pytest.raises(ArtifactError, match=r"It is full: .* start the same command again"):
        run_to_the_end(make_resources(), small_disk, "a")
    finished = [p.parent for p in small_disk.rglob("artifact.json") if ".partial" not in str(p)]
    assert len(finished) < 11
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert run_to_the_end(make_resources(), small_disk, "a") == whole


def test_a_clock_that_is_set_back_changes_nothing(train, monkeypatch):
    _, whole = train("whole")
    now, real = [time.time()], time.time

    def backwards():
        now[0] -= 86_400
        return now[0]

    monkeypatch.setattr(time, "time", backwards)
    train("a", rounds=1)
    folder, resumed = train("a")
    monkeypatch.setattr(time, "time", real)
    assert resumed["adapter_digest"] == whole["adapter_digest"]
    before = {p: p.stat().st_mtime_ns for p in folder.rglob("artifact.json")}
    for path in folder.rglob("*"):
        os.utime(path, (0, 0))
    train("a")
    assert {p for p in folder.rglob("artifact.json") if p.stat().st_mtime_ns != 0} == set()
    assert len(before) == 11
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
    assert len({(line["stage"], line["step"]) for line in lines}) == len(lines)


def test_of_two_starters_one_trains_and_the_other_is_told_who(
    make_resources, tmp_path, scorer_class
):
    """The first one waits, inside its first request for scores, until the second one has been
    refused."""
    scoring, refused = threading.Event(), threading.Event()

    class Waiting(scorer_class):
        def score(self, images, cases, letters=False):
            scoring.set()
            assert refused.wait(60)
            return super().score(images, cases)

    done = []
    resources = make_resources("nft", Waiting())
    first = threading.Thread(target=lambda: done.append(run_to_the_end(resources, tmp_path, "a")))
    first.start()
    assert scoring.wait(60)
    code = (
        "import sys; from pathlib import Path\n"
        "from tasks.artifacts.layout import RunsDir\n"
        "from tasks.params.run_params import RunParams\n"
        "from tasks.runs.run import open_run, resources_of\n"
        "params, runs = RunParams.model_validate_json(sys.argv[1]), Path(sys.argv[2])\n"
        "open_run(resources_of(params, RunsDir(runs), None), runs / 'a').__enter__()"
    )
    command = [sys.executable, "-c", code, resources.params.model_dump_json(), tmp_path]
    second = subprocess.run(command, capture_output=True, text=True)
    refused.set()
    first.join()
    assert second.returncode == 1
    assert (
        f"{RunLockedError.__name__}: the run {tmp_path}/a must be free. Process {os.getpid()}"
        in second.stderr
    )
    assert done == [run_to_the_end(make_resources(), tmp_path, "whole")]
    assert (
        RunParams.model_validate_json((tmp_path / "a/params.json").read_text()) == resources.params
    )
