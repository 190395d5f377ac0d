import base64
import concurrent.futures
import json
import threading
import time

import pytest
from fakes import FakeScorer, png

from reward_server.components import NAMES
from reward_server.scorers.base import Outcome

GOOD = {"image": png(), "prompt": "The text is 'abcd'.", "mask": png()}


def test_a_picture_is_scored_and_unconfigured_components_are_null_with_a_reason(serve):
    with serve(FakeScorer()) as client:
        response = client.post("/score", json={**GOOD, "timestep": 500})
    assert response.status_code == 200
    score = response.json()
    assert score["ocr_text"] == "abcd"
    assert score["ocr_accuracy"] == 4 / 256
    assert score["vlm_score"] is None
    assert set(score["errors"]) == set(NAMES) - set(FakeScorer.fields)
    assert score["errors"]["style_score"].endswith("start the reward server with --siglip-path")
    assert score["reward_model_disabled"] is False


def test_given_text_wins_over_the_prompt(serve):
    with serve(FakeScorer()) as client:
        assert (
            client.post("/score", json={**GOOD, "text": "it's, - “x”"}).json()["ocr_text"]
            == "it's, - “x”"
        )
        assert (
            client.post("/score", json={**GOOD, "prompt": "whatever", "text": "t"}).json()[
                "ocr_text"
            ]
            == "t"
        )


@pytest.mark.parametrize("text", ["boom", "gone", "half"])
def test_a_component_is_null_exactly_when_errors_names_it(serve, text):
    with serve(FakeScorer()) as client:
        score = client.post("/score", json={**GOOD, "text": text}).json()
    assert {field for field in NAMES if score[field] is None} == set(score["errors"])
    assert score["ocr_likelihood"] is None


def test_a_scorer_that_hangs_costs_its_component_only(serve):
    with serve(FakeScorer(), score_timeout=0.2) as client:
        score = client.post("/score", json={**GOOD, "text": "slow"}).json()
    assert "took longer than 0.2 s" in score["errors"]["ocr_text"]


BAD = {
    "no prompt": ({"image": png()}, "prompt"),
    "no image": ({"prompt": "The text is 'a'."}, "image"),
    "components nobody knows": ({**GOOD, "components": ["colour"]}, "components must be some of"),
    "no components": ({**GOOD, "components": []}, "components must be some of"),
    "no text": ({**GOOD, "prompt": "write something"}, "The text is 'X'"),
    "blank text": ({**GOOD, "text": " \t "}, "text must hold"),
    "long text": ({**GOOD, "text": "a" * 257}, "256"),
    "long prompt": ({**GOOD, "prompt": "a" * 4097}, "4096"),
    "not base64": ({**GOOD, "image": "@@@@"}, "image must be base64"),
    "a path": ({**GOOD, "image": "/etc/passwd"}, "image must be"),
    "another mask size": ({**GOOD, "mask": png(3, 3)}, "mask must be of the image's size"),
    "black mask": ({**GOOD, "mask": png(colour="black")}, "mask must be white"),
    "timestep out of range": ({**GOOD, "timestep": 1001}, "timestep"),
    "timestep as text": ({**GOOD, "timestep": "5"}, "timestep"),
    "timestep as truth": ({**GOOD, "timestep": False}, "timestep"),
    "a list": ([GOOD], "body"),
    "a number": (7, "body"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_wrong_request_is_4xx_with_a_reason_and_the_next_good_one_is_answered(serve, kind):
    body, told = BAD[kind]
    with serve(FakeScorer()) as client:
        response = client.post("/score", json=body)
        assert response.status_code == 422
        assert told in response.json()["detail"]
        assert client.post("/score", json=GOOD).status_code == 200


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b'{"image": NaN, "prompt": "x"}',
        b'{"image": "a", "prompt": "\\ud800", "timestep": NaN}',
        b'{"image": "a", "prompt": "b", "timestep": Infinity}',
        b"[" * 100_000,
        b'{"timestep": ' + b"9" * 5000 + b"}",
        b"null",
    ],
)
def test_what_is_no_json_is_refused_in_json(serve, raw):
    with serve(FakeScorer()) as client:
        response = client.post("/score", content=raw, headers={"content-type": "application/json"})
        assert response.status_code in (400, 422)
        assert response.json()["detail"]
        assert len(response.content) < 5000


def test_an_error_does_not_repeat_what_was_sent(serve):
    with serve(FakeScorer()) as client:
        response = client.post("/score", json={**GOOD, "prompt": "secret" * 5000})
    assert "secret" not in response.text


def test_a_batch_keeps_order_and_errs_item_by_item(serve):
    texts = ["a", "bb", "boom", "dddd"]
    items = [{**GOOD, "text": text} for text in texts]
    items.insert(2, {**GOOD, "image": "broken"})
    with serve(FakeScorer(max_batch=3)) as client:
        response = client.post("/score_batch", json={"items": items})
        whole = client.post("/score_batch", json={"items": items[:2]})
    results = response.json()["results"]
    assert response.status_code == 207
    assert whole.status_code == 200
    assert [result["score"] and result["score"]["ocr_text"] for result in results] == [
        "a",
        "bb",
        None,
        None,
        "dddd",
    ]
    assert "image must be" in results[2]["error"]
    assert results[3]["error"] is None
    assert "ocr_text" in results[3]["score"]["errors"]


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"text": "a" * 257}, "text must have at most 256 characters. Got 257"),
        ({"prompt": "a" * 4097}, "prompt must have at most 4096 characters. Got 4097"),
        ({"text": ""}, "text must hold at least one character"),
        ({"image": ""}, "image must be a PNG file. Got 0 bytes"),
        ({"mask": ""}, "mask must be a PNG file. Got 0 bytes"),
    ],
)
def test_what_is_wrong_with_an_item_fails_that_item_and_not_its_batch(serve, change, told):
    with serve(FakeScorer()) as client:
        items = [GOOD, {**GOOD, **change}, GOOD]
        response = client.post("/score_batch", json={"items": items})
    first, wrong, last = response.json()["results"]
    assert response.status_code == 207
    assert first == last
    assert first["error"] is None
    assert told in wrong["error"]


class Looks(FakeScorer):
    """Scores its one field, by the reference if the field is one that depends on it."""

    def __init__(self, name, field):
        super().__init__()
        self.name, self.fields = name, (field,)

    def score_items(self, items):
        self.seen += [item.text for item in items]
        return [Outcome({self.fields[0]: 0.5}) for _ in items]


def _reference(kind):
    return {
        "too large": png(13, 8),
        "no PNG": "AAAA",
        "empty": "",
        "not base64": "@@",
        "breaks off": base64.b64encode(base64.b64decode(png(9, 9))[:40]).decode(),
    }[kind]


@pytest.mark.parametrize("kind", ["too large", "no PNG", "empty", "not base64", "breaks off"])
@pytest.mark.parametrize("path", ["/score", "/score_batch"])
def test_a_bad_reference_costs_those_who_look_at_it_and_not_the_reading(serve, kind, path):
    style, vlm = Looks("style", "style_score"), Looks("vlm", "vlm_score")
    body = {**GOOD, "reference": _reference(kind)}
    with serve(FakeScorer(), style, vlm, max_pixels=100) as client:
        response = client.post(path, json=body if path == "/score" else {"items": [body]})
        text = client.get("/metrics").text
    score = response.json() if path == "/score" else response.json()["results"][0]["score"]
    assert response.status_code == 200
    assert (score["ocr_text"], score["ocr_accuracy"]) == ("abcd", 4 / 256)
    lost = {name for name, kind in score["kinds"].items() if kind == "refused"}
    assert lost == {"style_score", "vlm_score"}
    assert all(
        "reference must be" in told or "reference must have" in told
        for told in map(score["errors"].get, lost)
    )
    assert "abcd" not in [*style.seen, *vlm.seen]
    assert 'reward_failures_total{kind="refused",scorer="style"} 1.0' in text


def test_too_many_items_and_none_are_refused(serve):
    with serve(FakeScorer(), max_items=2) as client:
        assert client.post("/score_batch", json={"items": []}).status_code == 422
        response = client.post("/score_batch", json={"items": [GOOD] * 3})
    assert response.status_code == 422
    assert "at most 2. Got 3" in response.json()["detail"]


def test_a_full_queue_is_429_with_retry_after_and_recovers(serve):
    scorer = FakeScorer()
    with serve(scorer, queue_size=2) as client, concurrent.futures.ThreadPoolExecutor(2) as pool:
        scorer.gate.clear()
        held = pool.submit(client.post, "/score_batch", json={"items": [GOOD, GOOD]})
        while client.service.admission.items < 2:
            time.sleep(0.01)
        refused = client.post("/score", json=GOOD)
        scorer.gate.set()
        assert held.result(10).status_code == 200
        assert client.post("/score", json=GOOD).status_code == 200
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert client.service.admission.items == client.service.admission.pixels == 0


def test_a_batch_larger_than_the_queue_is_taken_by_an_empty_house(serve):
    with serve(FakeScorer(), queue_size=2) as client:
        assert client.post("/score_batch", json={"items": [GOOD] * 5}).status_code == 200


def test_too_many_requests_at_once_are_503_with_retry_after(serve):
    scorer = FakeScorer()
    with serve(scorer, queue_size=1) as client, concurrent.futures.ThreadPoolExecutor(1) as pool:
        scorer.gate.clear()
        held = pool.submit(client.post, "/score", json=GOOD)
        while client.service.admission.items < 1:
            time.sleep(0.01)
        refused = client.get("/info")
        assert client.get("/health").status_code == 200
        scorer.gate.set()
        held.result(10)
    assert refused.status_code == 503
    assert refused.headers["retry-after"] == "1"


def test_the_bodies_under_way_are_bounded_together(serve):
    scorer = FakeScorer()
    body = {**GOOD, "prompt": "The text is 'a'." + " " * 900}
    with (
        serve(scorer, max_body_bytes=2000) as client,
        concurrent.futures.ThreadPoolExecutor(40) as pool,
    ):
        scorer.gate.clear()
        asked = [pool.submit(client.post, "/score", json=body) for _ in range(40)]
        while client.service.admission.items + sum(future.done() for future in asked) < 40:
            time.sleep(0.01)
        refused = [future for future in asked if future.done()]
        scorer.gate.set()
        statuses = [future.result(20).status_code for future in asked]
        assert client.post("/score", json=body).status_code == 200  # the room was given back
    assert 0 < len(refused) < 40
    assert all(future.result().headers["retry-after"] == "1" for future in refused)
    assert "bytes of requests are under way" in refused[0].result().json()["detail"]
    assert sorted(set(statuses)) == [200, 503]
    assert statuses.count(503) == len(refused)


def test_large_bodies_and_pictures_are_refused(serve):
    limits = {"max_body_bytes": 20_000, "max_pixels": 100}
    with serve(FakeScorer(), **limits) as client:
        big = client.post("/score", json={**GOOD, "image": "A" * 30_000})
        wide = client.post("/score", json={**GOOD, "image": png(13, 8)})
        chunks = (b" " * 1000 for _ in range(50))
        streamed = client.post(
            "/score", content=chunks, headers={"content-type": "application/json"}
        )
        small = client.post("/score", json={"image": png(10, 10), "prompt": "The text is 'a'."})
        many = client.post(
            "/score_batch",
            json={"items": [{"image": png(10, 10), "prompt": "x", "text": "a"}] * 40},
        )
    assert (big.status_code, streamed.status_code) == (413, 413)
    assert "at most 20000 bytes" in big.json()["detail"]
    assert wide.status_code == 422
    assert "at most 100 pixels" in wide.json()["detail"]
    assert small.status_code == 200
    assert many.status_code == 413
    assert "split the batch" in many.json()["detail"]


def test_not_ready_is_503_until_every_scorer_has_scored_its_probe(serve):
    scorer = FakeScorer()
    scorer.gate.clear()
    with serve(scorer, wait=False) as client:
        health = client.get("/health")
        assert health.status_code == 503
        assert health.json()["status"] == "loading"
        assert health.headers["retry-after"] == "1"
        for response in (client.post("/score", json=GOOD), client.get("/info")):
            assert response.status_code == 503
            assert response.headers["retry-after"] == "1"
        scorer.gate.set()
        while client.get("/health").status_code != 200:
            time.sleep(0.01)
        assert client.get("/health").json()["scorers"] == {"ocr": "ready"}
        assert client.post("/score", json=GOOD).status_code == 200


def test_a_scorer_that_fails_its_probe_stops_the_server():
    from reward_server.service.service import RewardService
    from reward_server.settings import Settings

    class Broken(FakeScorer):
        def score_items(self, items):
            raise OSError("no weights")

    service = RewardService(Settings(), lambda: [Broken()])
    with pytest.raises(RuntimeError, match="no weights"):
        service.start()
    assert not service.ready
    service.close()


def test_a_scorer_that_breaks_makes_the_server_refuse_and_end(serve):
    ended = threading.Event()
    scorer = FakeScorer()
    with serve(scorer, on_failure=ended.set) as client:
        assert (
            client.post("/score", json={**GOOD, "text": "boom"}).status_code == 200
        )  # the item's own fault
        assert not ended.is_set()
        scorer.broken = True
        for _ in range(2):
            refused = client.post("/score", json=GOOD)
            assert refused.status_code == 503  # no null: nothing is known about the picture
            assert refused.headers["retry-after"] == "1"
        health = client.get("/health")
    assert ended.is_set()
    assert health.status_code == 503
    assert health.json()["status"] == "broken"
    assert "device is lost" in health.json()["scorers"]["ocr"]


def test_a_batch_that_never_comes_back_makes_the_server_end(serve):
    ended = threading.Event()
    scorer = FakeScorer()
    with serve(scorer, on_failure=ended.set, score_timeout=0.02) as client:
        scorer.gate.clear()
        statuses = []
        while len(statuses) < 100 and not ended.is_set():
            statuses.append(client.post("/score", json=GOOD).status_code)
        scorer.gate.set()
    assert statuses[0] == 200  # one time-out is no proof
    assert statuses[-1] == 503


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -0.1, 1.001])
def test_what_is_no_number_of_its_range_is_null_with_a_reason(serve, number):
    class Dizzy(FakeScorer):
        def score_items(self, items):
            outcomes = super().score_items(items)
            for item, outcome in zip(items, outcomes, strict=True):
                if item.text == "dizzy":
                    outcome.values["ocr_accuracy"] = number
            return outcomes

    with serve(Dizzy()) as client:
        response = client.post("/score", json={**GOOD, "text": "dizzy"})
        text = client.get("/metrics").text
    assert response.status_code == 200
    assert response.json()["ocr_accuracy"] is None
    assert "no number in 0..1" in response.json()["errors"]["ocr_accuracy"]
    assert response.json()["ocr_text"] == "dizzy"
    assert 'reward_failures_total{kind="no_number",scorer="ocr"} 1.0' in text


def test_info_tells_engines_limits_and_a_fingerprint_that_limits_do_not_change(serve):
    answers = []
    for items in (5, 6):
        with serve(FakeScorer(), max_items=items) as client:
            answers.append(client.get("/info").json())
    assert answers[0]["scorers"] == {"ocr": {"engine": "fake"}}
    assert answers[0]["components"] == [
        "ocr_text",
        "ocr_confidence",
        "ocr_accuracy",
        "ocr_likelihood",
    ]
    assert answers[0]["limits"]["max_items"] == 5
    assert answers[0]["fingerprint"] == answers[1]["fingerprint"]


@pytest.mark.parametrize("disabled", [False, True])
def test_every_answer_names_the_setup_that_scored(serve, disabled):
    with serve(FakeScorer(), disable_reward_model=disabled) as client:
        named = client.get("/info").json()["fingerprint"]
        answers = [
            client.get("/info"),
            client.post("/score", json=GOOD),
            client.post("/score_batch", json={"items": [GOOD, {**GOOD, "image": "broken"}]}),
        ]
    assert [answer.status_code for answer in answers] == [200, 200, 207]
    assert {answer.headers["X-Reward-Fingerprint"] for answer in answers} == {named}
    other = FakeScorer()
    other.info = {"engine": "another"}
    with serve(other, disable_reward_model=disabled) as client:
        assert client.get("/info").json()["fingerprint"] != named


def test_debug_mode_is_marked_in_every_answer(serve):
    from reward_server.scorers.debug import DebugScorer

    with serve(DebugScorer(), disable_reward_model=True) as client:
        score = client.post("/score", json=GOOD).json()
        assert score == client.post("/score", json=GOOD).json()
        assert client.post("/score", json={**GOOD, "image": png(colour="red")}).json() != score
        assert client.get("/info").json()["reward_model_disabled"] is True
    assert score["reward_model_disabled"] is True
    assert score["errors"] == {}
    assert all(0 <= score[field] <= 1 for field in NAMES if field != "ocr_text")


def test_metrics_count_requests_batches_and_failures(serve):
    with serve(FakeScorer()) as client:
        client.post("/score", json=GOOD)
        client.post("/score", json={**GOOD, "text": "boom"})
        client.post("/score", json={**GOOD, "text": "gone"})
        client.post("/score", json={**GOOD, "text": "half"})
        client.post("/score", json={"image": "?"})
        client.get("/nowhere/at/all")
        text = client.get("/metrics").text
    assert 'reward_requests_total{path="/score",status="200"} 4.0' in text
    assert 'reward_requests_total{path="/score",status="422"} 1.0' in text
    assert 'reward_requests_total{path="other",status="404"} 1.0' in text
    for kind, components in (("exception", 4.0), ("unavailable", 4.0), ("refused", 1.0)):
        assert f'reward_failures_total{{kind="{kind}",scorer="ocr"}} {components}' in text
    assert 'reward_batch_items_count{scorer="ocr"}' in text
    assert 'reward_queue_items{scorer="ocr"} 0.0' in text
    assert 'reward_request_seconds_bucket{le="0.005",path="/score"}' in text


def test_a_token_is_asked_of_everybody_but_a_health_check(serve, tmp_path):
    token_file = tmp_path / "token"
    token_file.write_text("0123456789abcdef\n")
    with serve(FakeScorer(), token_file=token_file) as client:
        assert client.get("/health").status_code == 200
        for headers in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "Basic 0123456789abcdef"},
        ):
            refused = client.post("/score", json=GOOD, headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"] == "Bearer"
        for path in ("/info", "/metrics", "/openapi.json", "/nowhere"):
            assert client.get(path).status_code == 401
        good = {"authorization": "Bearer 0123456789abcdef"}
        assert client.post("/score", json=GOOD, headers=good).status_code == 200
        assert client.get("/openapi.json", headers=good).json()["components"]["securitySchemes"]


def test_the_letters_of_the_ocr_are_told_and_their_digest_stands_in_info(serve):
    scorer = FakeScorer()
    with serve(scorer) as client:
        assert client.get("/alphabet").json() == {"characters": None}
        assert client.get("/info").json()["alphabet"] is None
        scorer.characters = ["blank", "a", "é"]
        assert client.get("/alphabet").json() == {"characters": ["blank", "a", "é"]}
        assert len(client.get("/info").json()["alphabet"]) == 64


def test_openapi_tells_every_status_that_is_answered(serve):
    with serve(FakeScorer()) as client:
        paths = client.get("/openapi.json").json()["paths"]
    assert set(paths) == {
        "/score",
        "/score_batch",
        "/score_files",
        "/health",
        "/livez",
        "/readyz",
        "/info",
        "/alphabet",
        "/metrics",
    }
    assert set(paths["/score"]["post"]["responses"]) == {
        "200",
        "400",
        "401",
        "408",
        "413",
        "415",
        "422",
        "429",
        "503",
    }
    assert "207" in paths["/score_batch"]["post"]["responses"]
    problem = paths["/score"]["post"]["responses"]["422"]["content"]["application/json"]["schema"]
    assert problem == {"$ref": "#/components/schemas/Problem"}


def test_other_methods_and_paths_are_answered_in_json(serve):
    with serve(FakeScorer()) as client:
        assert client.get("/score").status_code == 405
        assert json.loads(client.get("/redoc").text)["detail"] == "Not Found"
        assert "swagger" in client.get("/docs").text


def test_concurrent_clients_share_batches(serve):
    scorer = FakeScorer(max_batch=8, delay_s=0.02)
    with serve(scorer) as client, concurrent.futures.ThreadPoolExecutor(8) as pool:
        futures = [
            pool.submit(client.post, "/score", json={**GOOD, "text": "x" * n}) for n in range(1, 33)
        ]
        answers = [future.result(30).json()["ocr_text"] for future in futures]
    assert answers == ["x" * n for n in range(1, 33)]
    assert max(scorer.batches) > 1


def test_scorers_of_one_item_work_at_the_same_time(serve):
    meeting = threading.Barrier(2)

    class Meets(FakeScorer):
        def __init__(self, name, fields):
            super().__init__()
            self.name, self.fields = name, fields

        def score_items(self, items):
            if items[0].text == "meet":
                meeting.wait(20)  # returns only when the other scorer is here too
            return [Outcome(dict.fromkeys(self.fields, 0.5)) for _ in items]

    with serve(Meets("vlm", ("vlm_score",)), Meets("style", ("style_score",))) as client:
        score = client.post("/score", json={**GOOD, "text": "meet"}).json()
    assert (score["vlm_score"], score["style_score"]) == (0.5, 0.5)


def test_a_mistake_of_the_server_is_500_in_json_and_counted(serve, monkeypatch):
    async def broken(requests):
        raise ZeroDivisionError

    with serve(FakeScorer()) as client:
        monkeypatch.setattr(client.service, "score", broken)
        response = client.post("/score", json=GOOD)
        assert response.status_code == 500
        assert "ZeroDivisionError" in response.json()["detail"]
        assert (
            'reward_requests_total{path="/score",status="500"} 1.0' in client.get("/metrics").text
        )
