"""Real server processes in debug mode: no model is loaded, everything else is as in earnest."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from fakes import noisy_png

from reward_server.client import RewardClient, RewardItem
from reward_server.processes.launch import Fleet, ServerStartError, local_server, main
from reward_server.processes.process import LOCAL_PORTS, ServerProcess, url_of
from reward_server.processes.serve import EXIT_PORT_TAKEN

DEBUG = ["--disable-reward-model"]
ROOT = Path(__file__).parents[3]


def free_ports(count: int) -> int:
    """First of `count` consecutive free ports."""
    for first in range(18000 + os.getpid() % 800, 18999 - count):
        try:
            for port in range(first, first + count):
                with socket.socket() as sock:
                    sock.bind(("127.0.0.1", port))
            return first
        except OSError:
            continue
    raise AssertionError("no free ports")


def health(url: str) -> dict:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(url + "/health", timeout=5) as answer:
        return json.load(answer)


def gone(pid: int, within_s: float = 20.0) -> bool:
    stop_at = time.monotonic() + within_s
    while time.monotonic() < stop_at:
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True
        if state == "Z":  # dead, but its parent (the test's init) has not looked yet
            return True
        time.sleep(0.05)
    return False


def port_is_free(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) != 0


def test_a_local_server_scores_and_is_gone_after_the_block(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY"):  # a proxy that is not there is not asked
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    with local_server(disable_reward_model=True) as url:
        port, pid = int(url.rsplit(":", 1)[1]), health(url)["pid"]
        assert port in LOCAL_PORTS
        with RewardClient([url]) as client:
            (result,) = client.score_batch([RewardItem(noisy_png(9), "The text is 'a'.")])
            assert client.info()["reward_model_disabled"] is True
        assert result.reward_model_disabled
        assert 0 <= result.ocr_accuracy <= 1
    assert gone(pid)
    assert port_is_free(port)


def test_a_local_server_is_gone_when_the_block_raises():
    pids = []

    def fails_inside():
        with local_server(disable_reward_model=True) as url:
            pids.append(health(url)["pid"])
            raise KeyError

    with pytest.raises(KeyError):
        fails_inside()
    assert gone(pids[0])


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_local_server_is_gone_when_its_parent_is_killed(number):
    code = (
        "import sys, time\nfrom reward_server.processes.launch import local_server\n"
        "with local_server(disable_reward_model=True) as url:\n"
        "    print(url, flush=True)\n    time.sleep(60)\n"
    )
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    url = parent.stdout.readline().strip()
    pid = health(url)["pid"]
    parent.send_signal(number)
    parent.wait()
    parent.stdout.close()
    assert gone(pid)
    assert port_is_free(int(url.rsplit(":", 1)[1]))


def test_a_server_outlives_the_thread_that_started_it(tmp_path):
    import threading

    started = []
    port = free_ports(1)
    thread = threading.Thread(
        target=lambda: started.append(ServerProcess(DEBUG, port=port, log_path=tmp_path / "log"))
    )
    thread.start()
    thread.join()
    started[0].wait_healthy(120)
    time.sleep(0.6)
    assert started[0].healthy()
    started[0].stop()


def test_a_server_that_cannot_start_tells_the_end_of_its_log(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    flags = ["--ocr-engine=none", f"--siglip-path={tmp_path}"]
    told = r"(?s)ended with status 3.*no file named model.safetensors"
    with pytest.raises(ServerStartError, match=told), local_server(flags=flags):
        pass


def test_a_taken_port_is_said_at_once(tmp_path, capsys):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        sock.listen()
        port = sock.getsockname()[1]
        with (
            pytest.raises(ServerStartError) as failed,
            local_server(port, disable_reward_model=True),
        ):
            pass
        assert failed.value.exit_status == EXIT_PORT_TAKEN
        assert "Address already in use" in str(failed.value)
        assert main([f"--port={port}", *DEBUG, f"--log-dir={tmp_path}"]) == 2
    assert f"port {port} on 127.0.0.1 must be free" in capsys.readouterr().err


def test_a_fleet_restarts_what_dies_gives_up_at_the_bound_and_stops_all(tmp_path):
    import threading

    first = free_ports(2)
    fleet = Fleet(
        ["0", "1"],
        host="127.0.0.1",
        first_port=first,
        flags=DEBUG,
        log_dir=tmp_path,
        max_restarts=1,
    )
    fleet.start(180)
    watching = threading.Thread(target=fleet.watch)
    watching.start()
    try:
        pids = [server.pid for server in fleet.servers]
        os.kill(pids[1], signal.SIGKILL)
        stop_at = time.monotonic() + 120
        while (
            len(fleet.servers) < 2
            or fleet.servers[1].pid == pids[1]
            or not fleet.servers[1].healthy()
        ):
            assert time.monotonic() < stop_at, "it was not restarted"
            time.sleep(0.1)
        assert fleet.servers[0].pid == pids[0]
        again = fleet.servers[1].pid
        os.kill(again, signal.SIGKILL)
        while len(fleet.servers) == 2:
            assert time.monotonic() < stop_at, "it was not given up"
            time.sleep(0.1)
        time.sleep(2.5)
        assert [server.pid for server in fleet.servers] == [pids[0]]  # one restart was allowed
    finally:
        fleet.ask_to_stop()
        watching.join()
        fleet.stop()
    assert gone(pids[0])
    assert port_is_free(first)
    assert {path.name for path in tmp_path.iterdir()} == {
        "reward_server_gpu_0.log",
        "reward_server_gpu_1.log",
    }


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("127.0.0.1", "http://127.0.0.1:8000"),
        ("0.0.0.0", "http://127.0.0.1:8000"),
        ("::", "http://[::1]:8000"),
        ("::1", "http://[::1]:8000"),
        ("10.0.0.5", "http://10.0.0.5:8000"),
    ],
)
def test_a_server_is_asked_where_it_is_bound(host, url):
    assert url_of(host, 8000) == url


def heed_interrupts() -> None:
    """What a shell starts in the background ignores SIGINT, and so do its children."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def launcher(first: int, log_dir: Path, *flags: str, before=heed_interrupts) -> subprocess.Popen:
    """`calligrapher reward-server` with two servers in debug mode."""
    code = "import sys; from flows.cli.main import main; sys.exit(main(sys.argv[1:]))"
    command = [
        sys.executable,
        "-c",
        code,
        "reward-server",
        "--gpu-ids",
        "4,7",
        "--port",
        str(first),
    ]
    return subprocess.Popen(
        [*command, f"--log-dir={log_dir}", "--device=cpu", *DEBUG, *flags],
        stdout=subprocess.PIPE, text=True, cwd=ROOT, preexec_fn=before,
    )  # fmt: skip


def test_a_launcher_that_is_told_its_parent_ends_with_it(tmp_path):
    first = free_ports(2)
    parent = subprocess.Popen(["sleep", "60"])
    started = launcher(
        first, tmp_path, f"--parent-pid={parent.pid}"
    )  # which is not its parent, as if it were gone
    try:
        assert started.wait(60) == 0
    finally:
        parent.kill()
        parent.wait()
        started.kill()
        started.stdout.close()
    assert port_is_free(first)


def test_a_launcher_under_nohup_outlives_its_terminal(tmp_path):
    first = free_ports(2)
    started = launcher(first, tmp_path, before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    try:
        [started.stdout.readline() for _ in range(2)]
        started.send_signal(signal.SIGHUP)
        time.sleep(0.6)
        assert health(f"http://127.0.0.1:{first}")["status"] == "ok"
    finally:
        started.terminate()
        status = started.wait(60)
        started.stdout.close()
    assert status == 0
    assert port_is_free(first)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_one_signal_to_the_launcher_leaves_no_process_and_no_port(tmp_path, number):
    first = free_ports(2)
    started = launcher(first, tmp_path)
    lines = [started.stdout.readline() for _ in range(2)]
    pids = [health(f"http://127.0.0.1:{first + place}")["pid"] for place in range(2)]
    environments = [Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in pids]
    started.send_signal(number)
    status = started.wait(60)
    started.stdout.close()
    assert f"http://127.0.0.1:{first} (GPU 4" in lines[0]
    assert f"http://127.0.0.1:{first + 1} (GPU 7" in lines[1]
    assert b"CUDA_VISIBLE_DEVICES=4" in environments[0]
    assert b"CUDA_VISIBLE_DEVICES=7" in environments[1]
    assert status == (0 if number != signal.SIGKILL else -signal.SIGKILL)
    assert all(gone(pid) for pid in pids)
    assert port_is_free(first)
    assert port_is_free(first + 1)


@pytest.mark.parametrize("gpu_ids", ["1,1", "1,,2", "a"])
def test_gpu_ids_that_make_no_sense_are_refused(gpu_ids, capsys):
    with pytest.raises(SystemExit):
        main([f"--gpu-ids={gpu_ids}", *DEBUG])
    assert "--gpu-ids must be" in capsys.readouterr().err


def test_killing_one_of_three_servers_while_scoring_loses_and_repeats_nothing(tmp_path):
    """300 pictures, three servers: one dies in the middle. All are scored, in order, none is a
    made-up 0."""
    import threading

    first = free_ports(3)
    servers = [
        ServerProcess(DEBUG, port=first + place, log_path=tmp_path / f"{place}.log")
        for place in range(3)
    ]
    try:
        for server in servers:
            server.wait_healthy(180)
        items = [
            RewardItem(noisy_png(3 + number % 7), "p", text=f"t{number}") for number in range(300)
        ]
        with RewardClient(
            [server.url for server in servers], rank=1, chunk_size=2, concurrency=2
        ) as client:
            threading.Timer(0.15, lambda: os.kill(servers[1].pid, signal.SIGKILL)).start()
            results = client.score_batch(items)
        assert gone(servers[1].pid)
        assert [result.ocr_text for result in results] == [f"t{number}" for number in range(300)]
        assert all(not result.errors for result in results)
    finally:
        for server in servers:
            server.stop()


SLOW = """
import sys, threading, time
from reward_server.processes import serve
from reward_server.scorers import load
from reward_server.scorers.base import Outcome


class Slow:
    name, fields, info = "ocr", ("ocr_accuracy",), {}
    parallel, max_batch, max_wait_s = 12, 1, 0.0

    def score_items(self, items):
        if items[0].text != "ll":
            time.sleep(float(items[0].text))
        return [Outcome({"ocr_accuracy": 1.0}) for _ in items]

    def close(self):
        pass


load.load_scorers = lambda settings: [Slow()]
serve._UNDER_WAY_S = 2
sys.exit(serve.main(sys.argv[1:]))
"""


def test_a_server_that_is_told_to_stop_finishes_what_it_can_and_says_503_to_the_rest(tmp_path):
    """Twelve requests under way, some done within the grace: no plain-text 500, no traceback."""
    import concurrent.futures

    import requests
    from fakes import png

    port, log_path = free_ports(1), tmp_path / "log"
    with log_path.open("wb") as log_file:
        server = subprocess.Popen(
            [sys.executable, "-c", SLOW, f"--port={port}"],
            stdout=log_file, stderr=log_file, cwd=ROOT,
        )  # fmt: skip
    url = f"http://127.0.0.1:{port}"

    def ask(text):
        return requests.post(
            url + "/score", json={"image": png(), "prompt": "p", "text": text}, timeout=30
        )

    try:
        stop_at = time.monotonic() + 60
        while port_is_free(port) or requests.get(url + "/readyz", timeout=5).status_code != 200:
            assert time.monotonic() < stop_at, log_path.read_text()
            time.sleep(0.05)
        half = socket.create_connection(("127.0.0.1", port), timeout=20)
        half.sendall(b"POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
                     b"Content-Length: 99\r\n\r\n{")  # fmt: skip
        with concurrent.futures.ThreadPoolExecutor(12) as pool:
            asked = [pool.submit(ask, text) for text in ["0.7", *["30"] * 11]]
            time.sleep(0.4)
            started = time.monotonic()
            server.terminate()
            answers = [future.result() for future in asked]
        halved = half.recv(4096)
        half.close()
        status = server.wait(20)
    finally:
        server.kill()
        server.wait()
    told = log_path.read_text()
    assert answers[0].status_code == 200
    assert [answer.status_code for answer in answers[1:]] == [503] * 11
    assert all("stopping" in answer.json()["detail"] for answer in answers[1:])
    assert all("retry-after" in answer.headers for answer in answers[1:])
    assert b" 503 " in halved.split(b"\r\n")[0]
    assert "Traceback" not in told
    assert len(told.splitlines()) < 10
    assert status == -signal.SIGTERM  # as uvicorn ends: by the signal itself, everything closed
    assert time.monotonic() - started < 13


@pytest.mark.parametrize("there", [[], ["0", "1"]])
def test_gpus_that_are_not_there_are_refused_before_anything_is_started(
    there, capsys, monkeypatch, tmp_path
):
    from reward_server.processes import launch

    monkeypatch.setattr(launch, "gpus", lambda: there)
    monkeypatch.setattr(launch, "Fleet", None)
    with pytest.raises(SystemExit) as ended:
        main(["--gpu-ids=1,5", f"--log-dir={tmp_path}"])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert ("Got 5." if there else "it has none). Got 1, 5.") in line


def test_gpus_are_asked_of_the_driver_and_else_of_torch(tmp_path, monkeypatch):
    from reward_server.processes.launch import gpus

    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", str(tmp_path))
    for told, found in (("printf '0\\n3\\n'", ["0", "3"]), ("exit 9", [])):
        tool.write_text(f"#!/bin/sh\n{told}\n")
        tool.chmod(0o755)
        monkeypatch.setattr("reward_server.processes.launch.sys.executable", "/bin/false")
        assert gpus() == found


def test_run_server_is_the_same_command(capsys):
    from flows.cli.main import main as calligrapher

    with pytest.raises(SystemExit) as ended:
        calligrapher(["run_server", "--vlm-model-path", "/none", "--port=8000", "--gpu-ids", "4,5"])
    assert ended.value.code == 2
    assert "vlm_model_path must be a folder" in capsys.readouterr().err


def test_scorers_of_ones_own_are_handed_on_one_flag_each(tmp_path, monkeypatch):
    (tmp_path / "r.py").write_text("class A:\n    pass\n\n\nclass B:\n    pass\n")
    monkeypatch.chdir(tmp_path)
    given = []

    class StartedError(Exception):
        pass

    def fleet(*args, flags, **how):
        given.extend(flags)
        raise StartedError

    monkeypatch.setattr("reward_server.processes.launch.Fleet", fleet)
    with pytest.raises(StartedError):
        main(["--scorer", "a=r.py:A", "--scorer=b=r.py:B?x=1", "--disable-reward-model"])
    assert given == ["--scorer=a=r.py:A", "--scorer=b=r.py:B?x=1", "--disable-reward-model"]


def test_a_scorer_that_is_not_there_is_told_in_one_line_and_nothing_is_started(tmp_path, capsys):
    (tmp_path / "r.py").write_text("class A:\n    pass\n")
    with pytest.raises(SystemExit) as end:
        main(["--scorer", f"a={tmp_path}/r.py:B"])
    assert end.value.code == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert "scorer a must be a class of" in told
