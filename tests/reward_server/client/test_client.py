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
from reward_server.components import NAMES, Letter

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


def test_each_rank_begins_with_its_own_server():
    with scripts(None, None, None) as servers:
        urls = [server.url for server in servers]
        for rank in (0, 1, 2, 3, 4, 4):
            with RewardClient(urls, rank=rank) as client:
                client.score_batch(items(1))
        assert [len(server.bodies) for server in servers] == [2, 3, 1]


def test_single_requests_go_round():
    with (
        scripts(None, None, None, None) as servers,
        RewardClient([server.url for server in servers], chunk_size=1, concurrency=1) as client,
    ):
        client.score_batch(items(9))
        assert [len(server.bodies) for server in servers] == [3, 2, 2, 2]


def test_the_server_with_the_fewest_requests_under_way_is_asked_first():
    gate = threading.Event()

    def waits(number, body):
        gate.wait(20)
        return 200, {}, scored(body)

    with scripts(waits, None, None) as servers:
        slow, *quick = servers
        client = RewardClient([server.url for server in servers], chunk_size=1, concurrency=2)
        scoring = threading.Thread(target=client.score_batch, args=[items(9)])
        scoring.start()
        stop_at = time.monotonic() + 10
        while sum(len(server.bodies) for server in quick) < 8 and time.monotonic() < stop_at:
            time.sleep(0.01)
        gate.set()
        scoring.join(10)
        client.close()
        assert len(slow.bodies) == 1
        assert [len(server.bodies) for server in quick] == [4, 4]


def test_a_few_items_are_shared_out_over_all_servers_at_the_same_time():
    together = threading.Barrier(5, timeout=10)

    def waits_for_the_others(number, body):
        together.wait()
        return 200, {}, scored(body)

    with (
        scripts(*[waits_for_the_others] * 5) as servers,
        RewardClient([server.url for server in servers], request_timeout_s=20) as client,
    ):
        assert texts(client.score_batch(items(13))) == [f"t{number}" for number in range(13)]
        assert sorted(len(server.bodies[0]["items"]) for server in servers) == [1, 3, 3, 3, 3]


def test_a_server_that_comes_back_is_not_flooded():
    def down_at_first(number, body):
        return (500, {}, b"") if number == 1 else (200, {}, scored(body))

    with (
        scripts(down_at_first, None) as servers,
        RewardClient([server.url for server in servers], concurrency=1, trip_after=1) as client,
    ):
        client.score_batch(items(1))
        for _ in range(6):
            client.score_batch(items(1))
        time.sleep(0.6)  # the pause after the failure
        before = [len(server.bodies) for server in servers]
        for _ in range(6):
            client.score_batch(items(1))
        after = [len(server.bodies) for server in servers]
    assert before == [1, 7]
    assert [b - a for a, b in zip(before, after, strict=True)] == [3, 3]


def test_servers_that_are_set_up_unlike_are_refused_at_the_start():
    with scripts(None, None, None) as servers:
        servers[2].fingerprint = "two"
        urls = [server.url for server in servers]
        with (
            RewardClient([DEAD, *urls]) as client,
            pytest.raises(RewardRejectedError, match=f"set up alike. Got {urls[2]}.*two.*one"),
        ):
            client.info()
        with RewardClient([DEAD, *urls[:2]]) as client:
            assert client.info() == {"scorers": {"ocr": {"engine": "scripted"}}}


def test_a_check_waits_for_nobody():
    with RewardClient([DEAD, DEAD], deadline_s=600) as client:
        started = time.monotonic()
        with pytest.raises(RewardUnavailableError, match=r"there \(.*:9: Connection refused; "):
            client.check()
        assert time.monotonic() - started < 10


def test_a_check_passes_while_a_server_is_loading_and_looks_at_all_that_answer():
    with scripts(None, None, None) as servers:
        loading, first, second = servers
        loading.info_status = 503
        urls = [server.url for server in servers]
        with RewardClient([loading.url]) as client:
            assert client.check() == []
        with RewardClient([DEAD, *urls]) as client:
            assert client.check() == [first.info, second.info]
        second.fingerprint = "two"
        with RewardClient(urls) as client, pytest.raises(RewardRejectedError, match="alike"):
            client.check()
        first.info_status = 401
        with RewardClient(urls) as client, pytest.raises(RewardRejectedError, match="401"):
            client.check()


def test_a_server_that_is_set_up_anew_while_it_is_asked_is_refused():
    with scripts(None) as (server,), RewardClient([server.url]) as client:
        client.score_batch(items(1))
        server.fingerprint = "another"
        with pytest.raises(RewardRejectedError, match="set up alike"):
            client.score_batch(items(1))


def test_a_server_that_takes_over_must_be_set_up_as_the_one_that_died():
    with scripts(None, None) as (first, second):
        second.fingerprint = "made up"
        with RewardClient([first.url, second.url], concurrency=1) as client:
            client.score_batch(items(1))
            first.close()
            with pytest.raises(RewardRejectedError, match=f"Got {second.url}"):
                client.score_batch(items(1))


def test_a_server_of_before_names_no_setup_and_is_asked_as_before():
    with scripts(None, None) as (first, second):
        second.fingerprint = None
        with RewardClient([first.url, second.url], chunk_size=1, concurrency=1) as client:
            assert texts(client.score_batch(items(4))) == ["t0", "t1", "t2", "t3"]
        assert len(second.bodies) == 2


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

    with (
        scripts(flaky) as (server,),
        RewardClient([DEAD, server.url], trip_after=9, concurrency=1) as client,
    ):
        client.score_batch([*items(3), RewardItem(b"another", "p", mask=PICTURE, text="t3")])
    assert len(server.bodies) == 3
    assert encoded == [PICTURE, b"another"]
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


def test_the_token_may_stand_in_the_environment(monkeypatch):
    monkeypatch.setenv("CALLIGRAPHER_REWARD_TOKEN", "from the environment")
    with scripts(None) as (server,):
        for token in (None, "given"):
            with RewardClient([server.url], token=token) as client:
                client.score_batch(items(1))
    sent = [headers["Authorization"] for headers in server.headers]
    assert sent == ["Bearer from the environment", "Bearer given"]


def test_urls_are_built_from_host_first_port_and_count():
    assert server_urls("10.0.0.5", 8000, 3) == [
        "http://10.0.0.5:8000",
        "http://10.0.0.5:8001",
        "http://10.0.0.5:8002",
    ]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"urls": []}, "at least"),
        ({"urls": ["http://a"], "chunk_size": 0}, "at least"),
        ({"urls": ["http://a", "localhost:8000"]}, "begin with http.*localhost:8000"),
    ],
)
def test_a_client_without_servers_or_chunks_is_refused(options, told):
    with pytest.raises(ValueError, match=told):
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


def unavailable(body: dict, kind="unavailable", field="vlm_score") -> dict:
    """A good answer but for one component."""
    answer = scored(body)
    for result in answer["results"]:
        result["score"] |= {field: None}
        result["score"]["errors"][field] = "the judge is down"
        result["score"]["kinds"] = dict.fromkeys(result["score"]["errors"], "not_configured")
        result["score"]["kinds"][field] = kind
    return answer


def judged(body: dict) -> dict:
    answer = unavailable(body)
    for result in answer["results"]:
        del result["score"]["errors"]["vlm_score"], result["score"]["kinds"]["vlm_score"]
        result["score"]["vlm_score"] = 0.25
    return answer


@pytest.fixture
def no_pause(monkeypatch):
    monkeypatch.setattr("reward_server.client.client._FIRST_PAUSE_S", 0.01)


def test_what_is_unavailable_is_asked_again_until_it_is_there(no_pause):
    def down_at_first(number, body):
        late = {"t1", "t4"} & {item["text"] for item in body["items"]}
        answer = judged(body)
        if number <= 4 and late:
            for item, one, other in zip(
                body["items"], answer["results"], unavailable(body)["results"], strict=True
            ):
                if item["text"] in late:
                    one.update(other)
        return 200, {}, answer

    with (
        scripts(down_at_first) as (server,),
        RewardClient([server.url], chunk_size=3, concurrency=1) as client,
    ):
        results = client.score_batch(items(6))
    assert texts(results) == [f"t{number}" for number in range(6)]
    assert [result.vlm_score for result in results] == [0.25] * 6
    asked = [[item["text"] for item in body["items"]] for body in server.bodies]
    assert asked[:2] == [["t0", "t1", "t2"], ["t3", "t4", "t5"]]
    assert all(again == ["t1", "t4"] for again in asked[2:])


@pytest.mark.parametrize("kind", ["refused", "timeout", "no_number", "exception", "unheard_of"])
def test_other_kinds_of_null_are_not_asked_again(kind):
    answer = lambda number, body: (200, {}, unavailable(body, kind))  # noqa: E731
    with scripts(answer) as (server,), RewardClient([server.url]) as client:
        (result,) = client.score_batch(items(1))
    assert result.kinds["vlm_score"] == kind
    assert len(server.bodies) == 1


def test_nobody_waits_for_a_component_that_is_not_needed():
    answer = lambda number, body: (200, {}, unavailable(body))  # noqa: E731
    with (
        scripts(answer) as (server,),
        RewardClient([server.url], needed=["ocr_accuracy"]) as client,
    ):
        (result,) = client.score_batch(items(1))
    assert result.ocr_accuracy == 0.5
    assert result.errors["vlm_score"] == "the judge is down"
    assert len(server.bodies) == 1


def test_what_stays_unavailable_is_null_with_a_reason_at_the_deadline(no_pause):
    answer = lambda number, body: (200, {}, unavailable(body))  # noqa: E731
    with scripts(answer) as (server,), RewardClient([server.url], deadline_s=0.4) as client:
        started = time.monotonic()
        (result,) = client.score_batch(items(1))
        assert time.monotonic() - started < 2
    assert (result.ocr_accuracy, result.vlm_score) == (0.5, None)
    assert (result.errors["vlm_score"], result.kinds["vlm_score"]) == (
        "the judge is down",
        "unavailable",
    )
    assert len(server.bodies) > 2


def test_an_item_that_is_passed_over_while_others_are_scored_is_let_be(no_pause, monkeypatch):
    """Two of five wait: one comes at the third asking, the other never does while others come."""
    monkeypatch.setattr("reward_server.client.client._PASSED_OVER", 1)

    def one_never(number, body):
        answer = judged(body)
        for item, one, other in zip(
            body["items"], answer["results"], unavailable(body)["results"], strict=True
        ):
            if item["text"] == "t1" or (item["text"] == "t3" and number < 3):
                one.update(other)
        return 200, {}, answer

    with scripts(one_never) as (server,), RewardClient([server.url], deadline_s=60) as client:
        results = client.score_batch(items(5))
    assert [result.vlm_score for result in results] == [0.25, None, 0.25, 0.25, 0.25]
    assert [len(body["items"]) for body in server.bodies] == [5, 2, 2]


def test_what_a_newer_server_says_besides_is_passed_over():
    def newer(number, body):
        answer = scored(body)
        answer["results"][0] |= {"seconds": 0.1}
        answer["results"][0]["score"] |= {"mood": "good"}
        return 200, {}, answer | {"server": "newer"}

    with scripts(newer) as (server,), RewardClient([server.url]) as client:
        (result,) = client.score_batch(items(1))
    assert result.ocr_accuracy == 0.5
    assert result.kinds == {}  # an older one says none


def test_a_request_that_is_refused_loses_nothing_of_the_others():
    def one_refused(number, body):
        if any(item["text"] == "t2" for item in body["items"]):
            return 422, {}, b'{"detail": "no"}'
        return 200, {}, scored(body)

    with (
        scripts(one_refused) as (server,),
        RewardClient([server.url], chunk_size=1, concurrency=1) as client,
        pytest.raises(RewardRejectedError, match="422") as failed,
    ):
        client.score_batch(items(3))
    assert [one and one.ocr_text for one in failed.value.results] == ["t0", "t1", None]


@pytest.fixture
def real_server(serve):
    """An application behind a socket: what the client says goes through HTTP as it is."""
    import uvicorn
    from fakes import FakeScorer

    from reward_server.service.app import create_app
    from reward_server.settings import Settings

    scorer = FakeScorer()
    app = create_app(Settings(answer_cache=0), lambda: [scorer])
    server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning", access_log=False))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started or not app.state.service.ready:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    app.state.url = f"http://127.0.0.1:{port}"
    yield app.state
    server.should_exit = True
    thread.join(10)


def test_a_server_that_knows_of_files_is_sent_them_from_its_first_answer_on(real_server):
    pixels = np.random.default_rng(0).integers(0, 255, (9, 14, 3), dtype=np.uint8)
    mask = np.full((9, 14), 255, dtype=np.uint8)
    sent = [
        RewardItem(image, "p", mask=mask, text=f"t{number}")
        for number, image in enumerate([pixels, Image.fromarray(pixels), pixels])
    ]
    with RewardClient([real_server.url]) as client:
        assert texts(client.score_batch(sent)) == ["t0", "t1", "t2"]
        client.info()
        assert texts(client.score_batch(sent)) == ["t0", "t1", "t2"]
    metrics = real_server.service.metrics
    stop_at = time.monotonic() + 5
    while b"/score_files" not in metrics.text() and time.monotonic() < stop_at:
        time.sleep(0.01)  # a request is counted after its answer
    for path in (b"/score_batch", b"/score_files"):
        assert b'reward_requests_total{path="%s",status="200"} 1.0' % path in metrics.text()


def test_a_client_may_ask_for_some_components_only(real_server):
    with RewardClient([real_server.url], components=["vlm_score"]) as client:
        client.info()
        (result,) = client.score_batch([RewardItem(np.zeros((4, 6, 3), "uint8"), "p", text="a")])
    assert result.kinds["ocr_accuracy"] == "not_asked"
    assert result.kinds["vlm_score"] == "not_configured"


def test_letters_come_along_where_an_item_asks_for_them(real_server):
    pixels = np.zeros((4, 6, 3), "uint8")
    asked = [RewardItem(pixels, "p", text="ab", letters=wanted) for wanted in (True, False)]
    with RewardClient([real_server.url]) as client:
        in_json = client.score_batch(asked)
        client.info()
        in_a_form = client.score_batch(asked)
    for told, untold in (in_json, in_a_form):
        assert told.ocr_letters == (Letter(0, 0, 0, 1, 4), Letter(0.5, 1, 0, 2, 4))
        assert untold.ocr_letters is None
        assert told.components() == untold.components()


def test_a_server_that_was_set_back_to_an_older_one_is_asked_in_json():
    newer = [{"X-Reward-Protocol": "2"}]  # it says so once
    answer = lambda number, body: (200, newer.pop() if newer else {}, scored(body))  # noqa: E731
    with scripts(answer) as (server,), RewardClient([server.url], concurrency=1) as client:
        for _ in range(3):
            assert texts(client.score_batch(items(2))) == ["t0", "t1"]
    assert server.paths == ["/score_batch", "/score_files", "/score_batch", "/score_batch"]


def test_components_of_a_users_own_scorers_come_along_and_other_new_words_do_not():
    def newer(number, body):
        answer = scored(body)
        for result, mine in zip(answer["results"], (0.25, None, 1), strict=True):
            result["score"] |= {"mine": mine, "kinds": {"vlm_score": "refused"}, "cached": False}
            result["score"] |= {"note": None}
            if mine is None:
                result["score"]["errors"]["mine"] = "it slept"
        return 200, {}, answer

    with scripts(newer) as (server,), RewardClient([server.url]) as client:
        results = client.score_batch(items(3))
    assert [result.own for result in results] == [{"mine": 0.25}, {"mine": None}, {"mine": 1}]
    assert list(results[0].components()) == [*NAMES, "mine"]
    assert results[0].components()["ocr_accuracy"] == 0.5
    assert results[1].errors["mine"] == "it slept"
