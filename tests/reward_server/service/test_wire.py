"""What the wire bears: newer and older sides, wrong items, other types, forms, slow bodies."""

import base64
import concurrent.futures
import gzip
import io
import json
import socket
import threading
import time

import pytest
from fakes import FakeScorer, noisy_png, png
from PIL import Image

from reward_server.scorers.base import Outcome
from reward_server.service.forms import FormError, parts_of

GOOD = {"image": png(), "prompt": "The text is 'abcd'.", "mask": png()}


def file(kind="PNG", colour="white", size=(12, 8), mode="RGB") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, format=kind)
    return buffer.getvalue()


def form(items, **parts) -> dict:
    """What httpx sends as a form."""
    return {"files": {"items": (None, json.dumps({"items": items})), **parts}}


class Counts(FakeScorer):
    """Scores its one field, and notes what it was shown."""

    def __init__(self, name, field):
        super().__init__()
        self.name, self.fields = name, (field,)
        self.items = []

    def score_items(self, items):
        self.gate.wait(20)
        self.items += [item for item in items if item.text != "ll"]  # the probe's
        return [Outcome({self.fields[0]: 0.5}) for _ in items]


@pytest.mark.parametrize(
    ("text", "kind"),
    [("boom", "exception"), ("gone", "unavailable"), ("half", "refused"), ("slow", "timeout")],
)
def test_every_null_has_a_kind(serve, text, kind):
    with serve(FakeScorer(), score_timeout=0.3) as client:
        score = client.post("/score", json={**GOOD, "text": text}).json()
    assert set(score["kinds"]) == set(score["errors"])
    assert score["kinds"]["ocr_likelihood"] == kind
    assert score["kinds"]["vlm_score"] == score["kinds"]["style_score"] == "not_configured"


def test_a_number_out_of_range_does_not_change_the_kind_of_the_fields_beside_it(serve):
    class Dizzy(FakeScorer):
        def score_items(self, items):
            outcomes = super().score_items(items)
            for item, outcome in zip(items, outcomes, strict=True):
                if item.text == "half":
                    outcome.values["ocr_accuracy"] = float("nan")
            return outcomes

    with serve(Dizzy()) as client:
        score = client.post("/score", json={**GOOD, "text": "half"}).json()
        text = client.get("/metrics").text
    assert score["kinds"]["ocr_accuracy"] == "no_number"
    assert score["kinds"]["ocr_likelihood"] == "refused"
    assert 'reward_failures_total{kind="no_number",scorer="ocr"} 1.0' in text
    assert 'reward_failures_total{kind="refused",scorer="ocr"} 1.0' in text


def test_fields_that_a_newer_client_sends_are_passed_over(serve):
    with serve(FakeScorer()) as client:
        alone = client.post("/score", json={**GOOD, "colour": "red"})
        batch = client.post("/score_batch", json={"items": [{**GOOD, "colour": 1}], "more": []})
    assert (alone.status_code, batch.status_code) == (200, 200)
    assert batch.json()["results"][0]["score"] == alone.json()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ({**GOOD, "text": "a" * 257}, "text must have at most 256"),
        ({**GOOD, "text": 7}, "text: Input should be a valid string"),
        ({**GOOD, "timestep": "5"}, "timestep"),
        ({"image": png()}, "prompt: Field required"),
        ({**GOOD, "prompt": None}, "prompt"),
        ({**GOOD, "text": "\ud800"}, "text"),
        (None, "valid dictionary"),
        ([], "valid dictionary"),
    ],
)
def test_an_item_of_a_wrong_form_costs_itself_and_not_its_batch(serve, wrong, told):
    with serve(FakeScorer()) as client:
        body = json.dumps({"items": [GOOD, wrong, GOOD]})
        headers = {"content-type": "application/json"}
        response = client.post("/score_batch", content=body, headers=headers)
    first, refused, last = response.json()["results"]
    assert response.status_code == 207
    assert first == last
    assert first["score"]["ocr_text"] == "abcd"
    assert refused["score"] is None
    assert told in refused["error"]


@pytest.mark.parametrize("path", ["/score", "/score_batch"])
@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"content-type": "application/x-www-form-urlencoded"}, "Content-Type"),  # curl -d
        ({"content-type": "multipart/form-data; boundary=b"}, "/score_files"),
        ({"content-type": ""}, "Content-Type"),
        ({"content-type": "application/json", "content-encoding": "gzip"}, "Content-Encoding"),
    ],
)
def test_a_body_of_another_type_is_415_and_the_header_is_named(serve, path, headers, named):
    body = json.dumps(GOOD).encode()
    if "content-encoding" in headers:
        body = gzip.compress(body)
    with serve(FakeScorer()) as client:
        response = client.post(path, content=body, headers=headers)
        kinds = ("application/json; charset=utf-8", "Application/JSON", "application/vnd.x+json")
        fine = [
            client.post("/score", content=json.dumps(GOOD), headers={"content-type": kind})
            for kind in kinds
        ]
    assert response.status_code == 415
    assert named in response.json()["detail"]
    assert [one.status_code for one in fine] == [200] * 3


def test_pictures_travel_as_files_and_are_scored_as_in_json(serve):
    colours = ("red", "blue")
    with serve(FakeScorer(), Counts("style", "style_score")) as client:
        items = [
            {"image": name, "mask": "m", "reference": "r", "prompt": "p", "text": name}
            for name in colours
        ]
        parts = {name: file("BMP", name) for name in colours}
        shared = {"m": file(mode="L"), "r": file("BMP", "green", (3, 2))}
        sent = client.post("/score_files", **form(items, **parts, **shared))
        in_json = [
            {
                **item,
                "image": base64.b64encode(file(colour=item["image"])).decode(),
                "mask": png(mode="L"),
                "reference": png(3, 2, "green"),
            }
            for item in items
        ]
        usual = client.post("/score_batch", json={"items": in_json})
        seen = client.service._batchers[1].scorer.items
    assert sent.status_code == 200
    assert sent.json() == usual.json()
    assert sent.headers["X-Reward-Protocol"] == usual.headers["X-Reward-Protocol"] == "2"
    assert sorted(item.text for item in seen) == ["blue", "blue", "red", "red"]
    for text in colours:
        first, second = (item for item in seen if item.text == text)
        assert (first.image == second.image).all()
        assert (first.reference == second.reference).all()
        assert first.mask.all()
        assert first.box == second.box == (0, 8, 0, 12)


def test_what_is_wrong_with_a_form_is_422_and_with_an_item_the_items_error(serve):
    item = {"image": "a", "prompt": "p", "text": "t"}
    with serve(FakeScorer(), max_items=3) as client:
        refused = client.post(
            "/score_files", **form([item, {**item, "image": "b"}, {**item, "mask": "m"}], a=file())
        )
        for items in ("{", json.dumps([item]), json.dumps({"items": []})):
            wrong = client.post("/score_files", files={"items": (None, items), "a": file()})
            assert wrong.status_code == 422, items
        none = client.post("/score_files", files={"a": file()})
        cut = client.post(
            "/score_files",
            content=b"--b\r\n",
            headers={"content-type": "multipart/form-data; boundary=b"},
        )
        gif = client.post("/score_files", **form([item], a=file("GIF")))
        many = client.post("/score_files", **form([item] * 4, a=file()))
    assert refused.status_code == 207
    errors = [result["error"] for result in refused.json()["results"]]
    assert errors[0] is None
    assert all("one of the parts" in error for error in errors[1:])
    assert (none.status_code, cut.status_code, many.status_code) == (422, 422, 422)
    assert "PNG or BMP" in gif.json()["results"][0]["error"]


def test_a_form_is_taken_apart_whatever_its_parts_hold():
    parts = {"a": b"", "b": b"\r\n--x\r\n\r\n--", "c": bytes(range(256)) * 9}
    body = b"".join(
        b'--b0\r\nContent-Type: x\r\ncontent-disposition: form-data; filename="f"; name="%s"'
        b"\r\n\r\n%s\r\n" % (name.encode(), content)
        for name, content in parts.items()
    )
    assert parts_of("multipart/form-data; boundary=b0", body + b"--b0--\r\n") == parts
    assert parts_of('multipart/form-data; boundary="b0"', b"pre\r\n" + body + b"--b0--") == parts
    for kind, wrong in (
        ("multipart/form-data", body + b"--b0--"),
        ("multipart/form-data; boundary=b0", body),
        ("multipart/form-data; boundary=b0", b"--b0\r\n\r\nno name\r\n--b0--"),
        ("multipart/form-data; boundary=b0", body + body + b"--b0--"),
        ("multipart/form-data; boundary=b0", b""),
    ):
        with pytest.raises(FormError):
            parts_of(kind, wrong)


def test_a_reference_that_nobody_looks_at_is_not_even_opened(serve):
    with serve(FakeScorer()) as client:
        score = client.post("/score", json={**GOOD, "reference": "no picture"}).json()
    assert score["ocr_text"] == "abcd"
    assert score["kinds"]["style_score"] == "not_configured"


def test_masks_and_references_of_a_group_are_decoded_once(serve, monkeypatch):
    from reward_server.service import intake

    decoded = []
    for name in ("decode_mask", "decode_rgb"):
        usual = getattr(intake, name)
        monkeypatch.setattr(
            intake,
            name,
            lambda *a, usual=usual, **k: decoded.append(k.get("field")) or usual(*a, **k),
        )
    reference = base64.b64encode(noisy_png(9)).decode()
    with serve(Counts("style", "style_score")) as client:
        for number in range(4):
            item = {**GOOD, "text": f"t{number}", "reference": reference}
            assert client.post("/score", json=item).json()["style_score"] == 0.5
        text = client.get("/metrics").text
    assert sorted(map(str, decoded)) == ["None", *["image"] * 4, "reference"]
    assert 'reward_cache_total{cache="pictures",result="hit"} 6.0' in text
    assert 'reward_cache_total{cache="pictures",result="miss"} 2.0' in text


def test_what_is_asked_again_is_answered_from_memory_and_counted(serve):
    scorer = FakeScorer()
    with serve(scorer, answer_cache=2) as client:
        ask = lambda text: client.post("/score", json={**GOOD, "text": text}).json()  # noqa: E731
        first = ask("a")
        assert ask("a") == first
        assert scorer.seen.count("a") == 1
        for text in ("half", "half", "b", "a"):  # half is an answer; a is forgotten by then
            ask(text)
        assert scorer.seen.count("half") == 1
        assert scorer.seen.count("a") == 2
        for text in ("gone", "gone", "boom", "boom"):  # no answers: asked again each time
            ask(text)
        text = client.get("/metrics").text
    assert 'reward_cache_total{cache="answers",result="hit"} 2.0' in text
    assert 'reward_cache_total{cache="answers",result="miss"} 8.0' in text


def test_another_mask_reference_or_prompt_is_another_answer(serve):
    scorer = Counts("style", "style_score")
    with serve(scorer) as client:
        black = Image.new("L", (12, 8))
        black.putpixel((3, 3), 255)
        buffer = io.BytesIO()
        black.save(buffer, format="PNG")
        other = base64.b64encode(buffer.getvalue()).decode()
        for change in ({}, {"mask": other}, {"reference": png()}, {"prompt": "x", "text": "abcd"}):
            client.post("/score", json={**GOOD, **change})
            client.post("/score", json={**GOOD, **change})
    assert len(scorer.items) == 4


def test_only_what_is_asked_for_is_measured(serve):
    style = Counts("style", "style_score")
    with serve(FakeScorer(), style) as client:
        item = {**GOOD, "components": ["ocr_accuracy"]}
        score = client.post("/score", json=item).json()
        both = client.post("/score", json=GOOD).json()
    assert score["ocr_accuracy"] == 4 / 256
    assert score["style_score"] is None
    assert score["kinds"]["style_score"] == "not_asked"
    assert score["kinds"]["vlm_score"] == "not_configured"
    assert both["style_score"] == 0.5
    assert len(style.items) == 1


def test_a_slow_scorer_holds_up_nobody_who_does_not_ask_for_it(serve):
    """A judge with a full queue: who asks for both is told to wait, who asks for OCR is served."""
    ocr, judge = FakeScorer(), Counts("vlm", "vlm_score")
    with (
        serve(ocr, judge, queue_size=3) as client,
        concurrent.futures.ThreadPoolExecutor(1) as pool,
    ):
        judge.gate.clear()
        items = [{**GOOD, "text": f"t{number}"} for number in range(3)]
        held = pool.submit(client.post, "/score_batch", json={"items": items})
        while client.service.admission.items < 3:
            time.sleep(0.01)
        full = client.post("/score", json=GOOD)
        only = [
            client.post("/score", json={**GOOD, "components": ["ocr_text"], "text": f"o{number}"})
            for number in range(8)
        ]
        assert not held.done()
        judge.gate.set()
        assert held.result(10).status_code == 200
    assert full.status_code == 429
    assert "the queue of" in full.json()["detail"]
    assert [one.json()["ocr_text"] for one in only] == [f"o{number}" for number in range(8)]


def test_the_process_is_alive_while_it_loads_and_ready_when_all_scorers_are(serve):
    scorer = FakeScorer()
    scorer.gate.clear()
    with serve(scorer, wait=False) as client:
        assert client.get("/livez").status_code == 200
        assert client.get("/readyz").status_code == 503
        scorer.gate.set()
        while client.get("/readyz").status_code != 200:
            time.sleep(0.01)
        assert client.get("/readyz").json() == client.get("/health").json()


def test_an_answer_has_the_requests_id_or_one_of_its_own(serve):
    with serve(FakeScorer()) as client:
        named = client.get("/info", headers={"x-request-id": "run-7.round-3:12"})
        refused = client.post("/score", content=b"", headers={"x-request-id": "a" * 128})
        made = [client.get("/health") for _ in range(2)]
        strange = client.get("/info", headers={"x-request-id": "a b"})
    assert named.headers["x-request-id"] == "run-7.round-3:12"
    assert refused.status_code == 415
    assert refused.headers["x-request-id"] == "a" * 128
    assert len({one.headers["x-request-id"] for one in made}) == 2
    assert strange.headers["x-request-id"] != "a b"


def test_a_judge_that_refuses_the_probe_picture_does_not_keep_the_server_from_starting(serve):
    class Picky(Counts):
        def score_items(self, items):
            return [
                Outcome({}, {"vlm_score": "no digit"}) if item.text == "ll" else one
                for item, one in zip(items, super().score_items(items), strict=True)
            ]

    with serve(Picky("vlm", "vlm_score")) as client:
        assert client.get("/health").json()["scorers"] == {"vlm": "ready"}
        assert client.post("/score", json=GOOD).json()["vlm_score"] == 0.5


def test_a_remote_scorer_that_fails_never_ends_the_server(serve):
    ended = threading.Event()
    scorer = FakeScorer()
    scorer.remote = True
    with serve(scorer, on_failure=ended.set, score_timeout=0.1) as client:
        scorer.broken = True
        assert client.post("/score", json=GOOD).json()["kinds"]["ocr_text"] == "exception"
        scorer.gate.clear()
        for number in range(12):
            answer = client.post("/score", json={**GOOD, "text": f"t{number}"}).json()
            assert answer["kinds"]["ocr_text"] == "timeout"
        scorer.broken = False
        scorer.gate.set()
        assert client.get("/health").status_code == 200
    assert not ended.is_set()


def test_half_a_body_is_let_go_and_keeps_nobody_out(tmp_path):
    """Forty clients that send half a body and wait; the queue holds four requests."""
    from reward_server.processes.launch import local_server

    flags = ["--queue-size=4", "--body-timeout=1"]
    with local_server(disable_reward_model=True, flags=flags) as url:
        port = int(url.rsplit(":", 1)[1])
        head = (
            "POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
            "Content-Length: 999\r\n\r\n{"
        )
        waiting = [socket.create_connection(("127.0.0.1", port), timeout=20) for _ in range(12)]
        for sock in waiting:
            sock.sendall(head.encode())
        time.sleep(0.2)
        import requests

        started = time.monotonic()
        answer = requests.post(url + "/score", json=GOOD, timeout=20)
        assert answer.status_code == 200
        assert time.monotonic() - started < 0.8  # it waited for none of them
        replies = [sock.recv(4096) for sock in waiting]
        for sock in waiting:
            sock.close()
    assert all(b" 408 " in reply.split(b"\r\n")[0] for reply in replies)
    assert all(b"connection: close" in reply.lower() for reply in replies)
    assert time.monotonic() - started < 5


def test_letters_are_told_to_who_asks_for_them(serve):
    with serve(FakeScorer(), answer_cache=4) as client:
        ask = lambda **words: client.post("/score", json={**GOOD, "text": "ab", **words}).json()  # noqa: E731
        silent, told, again = ask(), ask(letters=True), ask()
        wrong = client.post("/score", json={**GOOD, "text": "ab", "letters": "yes"})
    height = told["ocr_letters"][0]["bottom"]
    assert told["ocr_letters"] == [
        {"likelihood": 0.0, "left": 0.0, "top": 0.0, "right": 1.0, "bottom": height},
        {"likelihood": 0.5, "left": 1.0, "top": 0.0, "right": 2.0, "bottom": height},
    ]
    assert silent == again == told | {"ocr_letters": None}
    assert "ocr_letters" not in silent["errors"]
    assert wrong.status_code == 422


def test_info_says_whether_letters_can_be_asked_about(serve):
    reads = FakeScorer()
    reads.characters = ["", "a", "b"]
    for scorer, known in ((FakeScorer(), False), (reads, True)):
        with serve(scorer) as client:
            assert client.get("/info").json()["letters"] is known
