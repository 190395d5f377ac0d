"""The HTTP backend against a scripted OpenAI-compatible endpoint on loopback."""

import base64
import io
import math

import numpy as np
import pytest
from PIL import Image
from scripted import Script

from reward_server.scorers.base import Item, ScorerUnavailableError
from reward_server.scorers.vlm.http import HttpVLMScorer
from reward_server.scorers.vlm.question import Question


def completion(digits: dict[str, float] | None = None, content: str = "7") -> dict:
    """A chat completion as the OpenAI API gives it."""
    logprobs = None
    if digits is not None:
        top = [
            {"token": token, "logprob": math.log(prob), "bytes": None}
            for token, prob in digits.items()
        ]
        logprobs = {"content": [{**top[0], "top_logprobs": top}], "refusal": None}
    message = {"role": "assistant", "content": content, "refusal": None}
    choice = {"index": 0, "message": message, "finish_reason": "length", "logprobs": logprobs}
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "judge",
        "choices": [choice],
        "usage": usage,
    }


def item(reference: bool = True) -> Item:
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    return Item(pixels, pixels, "it's", reference=pixels[:3] if reference else None)


@pytest.fixture
def endpoint():
    server = Script(lambda number, body: (200, {}, completion({"9": 0.6, "0": 0.2, "no": 0.2})))
    yield server
    server.close()


def scorer_for(endpoint, mode="expectation", **options) -> HttpVLMScorer:
    return HttpVLMScorer(endpoint.url + "/v1", "judge", Question.load(mode), **options)


def test_the_score_is_the_expectation_over_the_digits_that_the_server_reports(endpoint):
    (outcome,) = scorer_for(endpoint).score_items([item()])
    assert outcome.values["vlm_score"] == pytest.approx(0.75)


def test_pictures_are_sent_as_data_urls_before_the_question(endpoint):
    scorer_for(endpoint, api_key="k3y").score_items([item()])
    body, headers = endpoint.bodies[0], endpoint.headers[0]
    assert headers["Authorization"] == "Bearer k3y"
    assert (body["model"], body["max_tokens"], body["logprobs"], body["top_logprobs"]) == (
        "judge",
        1,
        True,
        20,
    )
    first, second, question = body["messages"][0]["content"]
    assert "it's" in question["text"]
    for part, pixels in ((first, item().image), (second, item().reference)):
        kind, data = part["image_url"]["url"].split(",")
        assert kind == "data:image/png;base64"
        assert (np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) == pixels).all()


def test_generate_mode_asks_for_text_and_parses_it(endpoint):
    endpoint.answer = lambda number, body: (200, {}, completion(content="Fine. <Score>4</Score>"))
    (outcome,) = scorer_for(endpoint, "generate").score_items([item(reference=False)])
    assert outcome.values == {"vlm_score": 0.4}
    assert "logprobs" not in endpoint.bodies[0]


@pytest.mark.parametrize(
    "failure",
    [
        (500, {}, b"cuda error"),
        (503, {}, b""),
        (429, {"Retry-After": "0"}, b""),
        None,
        (200, {"content-length": "9999"}, b'{"id"'),
        (200, {}, b"<html>"),
    ],
)
def test_a_passing_failure_is_asked_again(endpoint, failure, monkeypatch):
    monkeypatch.setattr("reward_server.scorers.vlm.http.time.sleep", lambda seconds: None)
    endpoint.answer = lambda number, body: (
        failure if number == 1 else (200, {}, completion({"9": 1.0}))
    )
    (outcome,) = scorer_for(endpoint).score_items([item()])
    assert outcome.values == {"vlm_score": 1.0}
    assert len(endpoint.bodies) == 2


def test_a_lasting_failure_is_unavailability_not_a_number(endpoint, monkeypatch):
    monkeypatch.setattr("reward_server.scorers.vlm.http.time.sleep", lambda seconds: None)
    endpoint.answer = lambda number, body: (500, {}, b"cuda error")
    with pytest.raises(ScorerUnavailableError, match="3 attempts, last: status 500: cuda error"):
        scorer_for(endpoint).score_items([item()])


def test_a_silent_endpoint_is_left_after_the_time_out(endpoint, monkeypatch):
    import time

    def silent(number, body):
        time.sleep(1)

    endpoint.answer = silent
    with pytest.raises(ScorerUnavailableError, match="ReadTimeout"):
        scorer_for(endpoint, timeout_s=0.1, attempts=1).score_items([item()])


@pytest.mark.parametrize(
    ("reply", "told"),
    [
        ((400, {}, b"image too large"), "refused the request with status 400: image too large"),
        ((401, {}, b"who"), "status 401"),
        ((200, {}, completion()), "must return logprobs"),
        ((200, {}, completion({"yes": 0.9, "7": 0.1})), "at least 0.5"),
        ((200, {}, {"choices": [{}]}), "must return logprobs"),
        ((200, {}, {"choices": []}), "must be a chat completion"),
        ((200, {}, {"error": "x"}), "must be a chat completion"),
    ],
)
def test_a_useless_answer_is_a_reason_and_not_asked_again(endpoint, reply, told):
    endpoint.answer = lambda number, body: reply
    (outcome,) = scorer_for(endpoint).score_items([item()])
    assert outcome.values == {}
    assert told in outcome.errors["vlm_score"]
    assert len(endpoint.bodies) == 1


def test_the_contract_is_that_of_the_official_client(endpoint):
    """The body that is sent, sent by the `openai` client, and the answers here, parsed by it."""
    openai = pytest.importorskip("openai", reason="the openai client is not installed")
    body = scorer_for(endpoint).request_body(item())
    client = openai.OpenAI(base_url=endpoint.url + "/v1", api_key="k", max_retries=0)
    answer = client.chat.completions.create(**body)
    assert endpoint.bodies[0] == body
    top = answer.choices[0].logprobs.content[0].top_logprobs
    assert [one.token for one in top] == ["9", "0", "no"]


def logprobs(**given: float) -> dict:
    """A chat completion with these log-probabilities, whatever they are."""
    answer = completion({"9": 0.5})
    answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"] = [
        {"token": token.strip("_"), "logprob": value} for token, value in given.items()
    ]
    return answer


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, 0.5])
def test_what_is_no_log_probability_is_an_outage_there_and_no_number_here(endpoint, value):
    endpoint.answer = lambda number, body: (200, {}, logprobs(_9=value, _3=-1.0))
    with pytest.raises(ScorerUnavailableError, match="numbers up to 0"):
        scorer_for(endpoint).score_items([item()])


@pytest.mark.parametrize("value", ["-1", None, [1]])
def test_an_answer_of_another_form_is_an_outage_too(endpoint, value):
    endpoint.answer = lambda number, body: (200, {}, logprobs(_9=value))
    (outcome,) = scorer_for(endpoint).score_items([item()])
    assert (outcome.values, outcome.all_kinds) == ({}, {"unavailable"})


def test_impossible_digits_have_no_probability(endpoint):
    endpoint.answer = lambda number, body: (200, {}, logprobs(_9=math.log(0.75), _0=-math.inf))
    (outcome,) = scorer_for(endpoint).score_items([item()])
    assert outcome.values == {"vlm_score": 1.0}


def test_probabilities_of_more_than_all_are_refused(endpoint):
    endpoint.answer = lambda number, body: (200, {}, completion({"9": 0.8, "6": 0.4}))
    (outcome,) = scorer_for(endpoint).score_items([item()])
    assert outcome.kind_of("vlm_score") == "refused"
    assert "at most 1. Got 1.2" in outcome.errors["vlm_score"]


@pytest.mark.parametrize(
    ("reply", "kind"),
    [
        ((401, {}, b"who"), "denied"),
        ((404, {}, b"no such model"), "denied"),
        ((200, {}, completion()), "denied"),  # no logprobs
        ((200, {}, {"choices": []}), "unavailable"),
        ((200, {}, completion({"yes": 0.9})), "refused"),
    ],
)
def test_a_useless_answer_has_its_kind(endpoint, reply, kind):
    endpoint.answer = lambda number, body: reply
    (outcome,) = scorer_for(endpoint).score_items([item()])
    assert outcome.all_kinds == {kind}


@pytest.mark.parametrize(("status", "told"), [(401, "status 401"), (404, "status 404")])
def test_a_wrong_key_or_model_is_told_at_the_start(endpoint, status, told):
    from reward_server.service.service import RewardService
    from reward_server.settings import Settings

    endpoint.answer = lambda number, body: (status, {}, b"no")
    service = RewardService(Settings(), lambda: [scorer_for(endpoint)])
    with pytest.raises(RuntimeError, match=told):
        service.start()
    service.close()


def test_a_remote_that_loses_its_numbers_costs_its_component_until_they_are_back(serve, endpoint):
    """NaN from the remote: null and unavailable, the server stays; then all is well again."""
    from fakes import FakeScorer, png

    ask = {"image": png(), "prompt": "p", "text": "abc"}
    with serve(FakeScorer(), scorer_for(endpoint)) as client:
        good = endpoint.answer
        endpoint.answer = lambda number, body: (200, {}, logprobs(_9=math.nan))
        score = client.post("/score", json=ask).json()
        assert score["kinds"]["vlm_score"] == "unavailable"
        assert score["ocr_text"] == "abc"
        endpoint.answer = good
        assert client.post("/score", json=ask).json()["vlm_score"] == pytest.approx(0.75)
        assert client.get("/health").status_code == 200
