"""The client against scripted servers on loopback."""

import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
from PIL import Image
from scripted import Script, scored

from reward_server.client import (
    RewardClient,
    RewardItem,
    RewardRejectedError,
    RewardUnavailableError,
    server_urls,
)
from reward_server.client.failover import Server
from reward_server.components import NAMES

PICTURE = b"\x89PNG not looked at by the client"


@contextmanager
def scripts(*answers):
    servers = [Script(answer) if answer else Script() for answer in answers]
    try:
        yield servers
    finally:
        for server in servers:
            server.close()


def items(count: int) -> list[RewardItem]:
    return [RewardItem(PICTURE, "p", text=f"t{number}") for number in range(count)]


def texts(results) -> list[str]:
    return [result.ocr_text for result in results]


DEAD = "http://127.0.0.1:9"  # the discard port: nothing listens


def test_items_travel_in_chunks_and_keep_their_order():
    with (
        scripts(None) as (server,),
        RewardClient([server.url], chunk_size=3, concurrency=2) as client,
    ):
        results = client.score_batch(items(8))
    assert texts(results) == [f"t{number}" for number in range(8)]
    assert sorted(len(body["items"]) for body in server.bodies) == [2, 3, 3]
    assert results[0].ocr_accuracy == 0.5
    assert results[0].vlm_score is None
    assert results[0].errors["vlm_score"] == "not here"


def test_large_pictures_travel_in_smaller_chunks():
    with scripts(None) as (server,), RewardClient([server.url], max_request_bytes=100) as client:
        client.score_batch(items(5))
    assert [len(body["items"]) for body in server.bodies].count(2) == 2


def test_connections_are_reused():
    with (
        scripts(None) as (server,),
        RewardClient([server.url], chunk_size=1, concurrency=1) as client,
    ):
        for _ in range(3):
            client.score_batch(items(4))
    assert len(server.bodies) == 12
    assert server.connections == 1


def test_each_rank_asks_its_own_server():
    with scripts(None, None, None) as servers:
        urls = [server.url for server in servers]
        for rank, count in enumerate([1, 2, 3, 4]):
            with RewardClient(urls, rank=rank, chunk_size=1) as client:
                client.score_batch(items(count))
        assert [len(server.bodies) for server in servers] == [1 + 4, 2, 3]


def test_a_dead_server_is_passed_over():
    with scripts(None) as (server,), RewardClient([DEAD, server.url], chunk_size=1) as client:
        assert texts(client.score_batch(items(6))) == [f"t{number}" for number in range(6)]


def test_a_server_that_fails_is_left_alone_for_longer_and_longer(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("reward_server.client.failover.time.monotonic", lambda: now[0])
    server = Server("http://a/", trip_after=3, max_pause_s=3.0)
    pauses = []
    for _ in range(7):
        server.failed()
        pauses.append(server.pause())
    assert pauses == [0, 0, 0.5, 1, 2, 3, 3]
    now[0] += 2.5
    assert server.pause() == 0.5
    server.succeeded()
    assert server.pause() == 0


@pytest.mark.parametrize(
    "failure",
    [
        None,
        (500, {}, b"oops"),
        (502, {}, b""),
        (200, {"content-length": "999"}, b"{}"),
        (200, {}, b"<html>"),
    ],
)
def test_broken_answers_are_asked_again_and_no_item_is_scored_twice(failure):
    def flaky(number, body):
        return failure if number <= 2 else (200, {}, scored(body))

    with (
        scripts(flaky) as (server,),
        RewardClient([server.url], chunk_size=2, concurrency=1, trip_after=9) as client,
    ):
        results = client.score_batch(items(3))
    assert texts(results) == ["t0", "t1", "t2"]


def test_a_picture_is_encoded_once_however_often_it_is_sent(monkeypatch):
    encoded = []
    monkeypatch.setattr(
        "reward_server.client.client.encode_png",
        lambda picture: encoded.append(picture) or "in base64",
    )

    def flaky(number, body):
        return (500, {}, b"") if number <= 2 else (200, {}, scored(body))

    with scripts(flaky) as (server,), RewardClient([DEAD, server.url], trip_after=9) as client:
        client.score_batch(items(3))
    assert len(server.bodies) == 3
    assert len(encoded) == 3
    assert server.bodies[0] == server.bodies[2]


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_asked_again_after_the_time_it_names(status):
    def busy(number, body):
        return (status, {"Retry-After": "1"}, b"busy") if number == 1 else (200, {}, scored(body))

    with scripts(busy) as (server,), RewardClient([server.url]) as client:
        started = time.monotonic()
        assert texts(client.score_batch(items(2))) == ["t0", "t1"]
        assert 0.9 < time.monotonic() - started < 5
        assert client._servers.servers[0].pause() == 0  # busy is no failure


@pytest.mark.parametrize("status", [400, 401, 404, 413, 422])
def test_a_refused_request_is_never_retried(status):
    refused = lambda number, body: (status, {}, b'{"detail": "no"}')  # noqa: E731
    with scripts(refused, None) as (server, other):
        client = RewardClient([server.url, other.url], concurrency=1)
        with pytest.raises(RewardRejectedError, match=f"{status}.*no"):
            client.score_batch(items(2))
        assert (len(server.bodies), len(other.bodies)) == (1, 0)
        client.close()


def test_a_refused_item_has_no_number_and_a_reason():
    def one_refused(number, body):
        answer = scored(body)
        answer["results"][1] = {"score": None, "error": "mask must be white"}
        return 207, {}, answer

    with scripts(one_refused) as (server,), RewardClient([server.url]) as client:
        good, bad, last = client.score_batch(items(3))
    assert (good.ocr_text, last.ocr_text) == ("t0", "t2")
    assert all(getattr(bad, field) is None for field in NAMES)
    assert set(bad.errors) == set(NAMES)
    assert "mask must be white" in bad.errors["ocr_accuracy"]


def test_at_the_deadline_what_was_scored_is_kept_and_the_rest_counted():
    def first_only(number, body):
        return (200, {}, scored(body)) if body["items"][0]["text"] == "t0" else (500, {}, b"")

    with scripts(first_only) as (server,):
        client = RewardClient(
            [server.url, DEAD], chunk_size=2, concurrency=3, deadline_s=1.0, max_pause_s=0.2
        )
        started = time.monotonic()
        with pytest.raises(RewardUnavailableError, match="3 of 5 items are unscored") as failed:
            client.score_batch(items(5))
        assert time.monotonic() - started < 3
        client.close()
    assert [result and result.ocr_text for result in failed.value.results] == [
        "t0",
        "t1",
        None,
        None,
        None,
    ]


def test_closing_ends_what_still_waits_for_a_server():
    client = RewardClient([DEAD], deadline_s=600)

    def ask():
        with pytest.raises(RewardUnavailableError):
            client.score_batch(items(1))

    waiting = threading.Thread(target=ask)
    waiting.start()
    time.sleep(0.3)
    client.close()
    waiting.join(10)
    assert not waiting.is_alive()


def test_a_silent_server_costs_no_more_than_the_time_out():
    def silent(number, body):
        time.sleep(1.5)

    with scripts(silent, None) as (server, other):
        client = RewardClient([server.url, other.url], request_timeout_s=0.3)
        started = time.monotonic()
        assert texts(client.score_batch(items(1))) == ["t0"]
        assert time.monotonic() - started < 1.4
        client.close()


def test_an_answer_of_something_else_is_refused():
    with (
        scripts(lambda number, body: (200, {}, {"hello": 1})) as (server,),
        RewardClient([server.url]) as client,
        pytest.raises(RewardRejectedError, match="must be a reward server's"),
    ):
        client.score_batch(items(1))


def test_the_token_is_sent_and_pictures_of_every_kind_become_png():
    import base64
    import io

    array = np.arange(4 * 6 * 3, dtype=np.uint8).reshape(4, 6, 3)
    mask = np.full((4, 6), 255, dtype=np.uint8)
    with scripts(None) as (server,), RewardClient([server.url], token="0123456789abcdef") as client:
        client.score_batch(
            [RewardItem(array, "p", mask=mask, text="a", reference=Image.fromarray(array))]
        )
    assert server.headers[0]["Authorization"] == "Bearer 0123456789abcdef"
    sent = server.bodies[0]["items"][0]
    for field, pixels in (("image", array), ("mask", mask), ("reference", array)):
        assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(sent[field])))) == pixels).all()


def test_urls_are_built_from_host_first_port_and_count():
    assert server_urls("10.0.0.5", 8000, 3) == [
        "http://10.0.0.5:8000",
        "http://10.0.0.5:8001",
        "http://10.0.0.5:8002",
    ]


@pytest.mark.parametrize("options", [{"urls": []}, {"urls": ["http://a"], "chunk_size": 0}])
def test_a_client_without_servers_or_chunks_is_refused(options):
    with pytest.raises(ValueError, match="at least"):
        RewardClient(**options)


def test_the_client_imports_nothing_heavy():
    code = "import sys, reward_server.client, reward_server.processes.launch; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    ).stdout.split()
    assert not {
        "numpy",
        "PIL",
        "torch",
        "fastapi",
        "uvicorn",
        "paddleocr",
        "paddlex",
        "onnxruntime",
    } & set(loaded)


def test_the_package_imports_none_of_the_others():
    import ast
    from pathlib import Path

    import reward_server

    for path in Path(reward_server.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not {name.split(".")[0] for name in names} & {
                "calligrapher",
                "tasks",
                "flows",
                "pickle",
            }, path
