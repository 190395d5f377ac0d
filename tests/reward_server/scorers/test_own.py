"""A scorer of one's own: what it gives, and that whatever it does costs its own component only."""

import math
import threading
import time
from dataclasses import replace

import numpy as np
import pytest
from fakes import FakeScorer, png

from reward_server.scorer_files import ScorerFile
from reward_server.scorers.base import ScorerUnavailableError, probe_item
from reward_server.scorers.load import load_scorers
from reward_server.scorers.own import OwnScorer, load_own
from reward_server.settings import Settings

GOOD = {"image": png(), "prompt": "The text is 'abcd'.", "mask": png()}


class Obeys:
    """Gives what the items' texts say."""

    timeout_s = 0.2

    def __init__(self):
        self.gate, self.batches = threading.Event(), []

    def score(self, items):
        self.batches.append(len(items))
        return [n for item in items for n in self._numbers(item)]

    def _numbers(self, item):
        match item.text:
            case "boom":
                raise KeyError("nobody has seen it")
            case "exit":
                raise SystemExit(3)
            case "gone":
                raise ScorerUnavailableError("nobody there")
            case "few":
                return []
            case "hang":
                self.gate.wait(20)
            case "none":
                return [None]
            case "nan":
                return [math.nan]
            case "high":
                return [1.5]
            case "word":
                return ["0.5"]
            case "true":
                return [True]
            case "numpy":
                return [np.float32(0.25)]
        return [len(item.text) / 10]


def items(*texts):
    return [replace(probe_item(), text=text) for text in texts]


def answers(scorer, *texts):
    outcomes = scorer.score_items(items(*texts))
    assert len(outcomes) == len(texts)
    return [one.values.get("mine", one.kind) for one in outcomes]


@pytest.fixture
def mine():
    scorer = OwnScorer("mine", Obeys())
    yield scorer
    scorer._scorer.gate.set()


def test_numbers_come_back_in_order_and_none_is_null_with_a_reason(mine):
    assert answers(mine, "a", "none", "abc", "numpy") == [0.1, "refused", 0.3, 0.25]
    assert mine.score_items(items("none"))[0].errors == {"mine": "mine gave none"}


@pytest.mark.parametrize("text", ["nan", "high", "word", "true"])
def test_what_is_no_number_in_range_is_null(mine, text):
    assert answers(mine, "a", text, "ab") == [0.1, "no_number", 0.2]
    assert "which is no number in 0..1" in mine.score_items(items(text))[0].errors["mine"]


@pytest.mark.parametrize(
    ("text", "told"),
    [("boom", "raised KeyError"), ("exit", "raised SystemExit"), ("few", "give 1 numbers. Got 0")],
)
def test_one_bad_item_fails_alone(mine, text, told):
    assert answers(mine, "a", text, "abc") == [0.1, "exception", 0.3]
    assert told in mine.score_items(items(text))[0].errors["mine"]
    assert mine._scorer.batches[0] == 3


def test_what_is_not_there_now_is_unavailable(mine):
    assert answers(mine, "a", "gone") == ["unavailable"] * 2


def test_a_call_that_hangs_is_given_up_and_the_next_ones_at_once_until_it_returns(mine):
    assert answers(mine, "a", "hang") == ["timeout"] * 2
    started = time.monotonic()
    assert answers(mine, "a") == ["timeout"]
    assert time.monotonic() - started < 0.1
    assert "still works" in mine.score_items(items("a"))[0].errors["mine"]
    mine._scorer.gate.set()
    stop_at = time.monotonic() + 5
    while answers(mine, "a") == ["timeout"] and time.monotonic() < stop_at:
        time.sleep(0.01)
    assert answers(mine, "a") == [0.1]


def test_a_reference_that_cannot_be_used_costs_who_looks_at_one():
    scorer = Obeys()
    broken = [replace(one, reference_error="no PNG") for one in items("a", "ab")]
    mixed = [*items("abc"), *broken]
    blind = OwnScorer("mine", scorer).score_items(mixed)
    assert [one.values["mine"] for one in blind] == [0.3, 0.1, 0.2]
    scorer.sees_reference = True
    seeing = OwnScorer("mine", scorer).score_items(mixed)
    assert seeing[0].values == {"mine": 0.3}
    assert [one.errors for one in seeing[1:]] == [{"mine": "no PNG"}] * 2


def test_a_range_may_begin_below_zero():
    class Cosine:
        lowest = -1.0

        def score(self, items):
            return [-0.5, -1.5]

    outcomes = OwnScorer("mine", Cosine()).score_items(items("a", "b"))
    assert outcomes[0].values == {"mine": -0.5}
    assert outcomes[1].errors == {"mine": "mine gave -1.5, which is no number in -1..1"}


@pytest.mark.parametrize(
    ("member", "value"),
    [("lowest", 1), ("lowest", math.nan), ("max_batch", 0), ("timeout_s", "30"), ("parallel", 0)],
)
def test_a_member_that_does_not_fit_is_told(member, value):
    scorer = Obeys()
    setattr(scorer, member, value)
    with pytest.raises(ValueError, match=f"{member} of scorer mine must be"):
        OwnScorer("mine", scorer)


def test_what_has_no_score_is_told():
    with pytest.raises(TypeError, match="must have a method score"):
        OwnScorer("mine", object())


SOURCE = """
from dataclasses import dataclass

@dataclass
class Share:
    of: str = "2"

    @property
    def info(self):
        return {"weights": "abc"}

    def score(self, items):
        return [1 / float(self.of)] * len(items)
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "my_rewards.py"
    path.write_text(SOURCE)
    return path


def test_a_file_is_loaded_with_its_arguments_and_says_what_it_is(file):
    scorer = load_own(ScorerFile.parse("mine", f"{file}:Share?of=4"))
    assert answers(scorer, "a", "b") == [0.25, 0.25]
    assert scorer.info.keys() == {"weights", "class", "sha256", "argument of", "lowest"}
    assert scorer.info["argument of"] == "4"
    # At once and of equal length: what is run is what was hashed, not bytecode kept of it.
    file.write_text(SOURCE.replace("1 /", "2 /"))
    changed = load_own(ScorerFile.parse("mine", f"{file}:Share?of=4"))
    assert answers(changed, "a") == [0.5]
    assert changed.info["sha256"] != scorer.info["sha256"]


def test_a_file_that_raises_is_told_in_one_line(file):
    file.write_text("import a_module_that_is_nowhere\nclass Share: pass\n")
    with pytest.raises(
        RuntimeError, match=r"scorer mine must load .* ModuleNotFoundError"
    ) as error:
        load_own(ScorerFile.parse("mine", f"{file}:Share"))
    assert "\n" not in str(error.value)
    file.write_text(SOURCE)
    with pytest.raises(RuntimeError, match="unexpected keyword argument 'to'"):
        load_own(ScorerFile.parse("mine", f"{file}:Share?to=1"))


def test_settings_make_the_scorers_that_are_named(file):
    spec = f"mine={file}:Share?of=4"
    loaded = load_scorers(Settings(ocr_engine="none", scorer=[spec, f"other={file}:Share"]))
    assert [scorer.fields for scorer in loaded] == [("mine",), ("other",)]
    (debug,) = load_scorers(Settings(disable_reward_model=True, scorer=[spec]))
    assert debug.fields[-1] == "mine"
    assert 0 <= debug.score_items(items("a"))[0].values["mine"] <= 1
    for scorer, told in (
        ([spec, spec], "each scorer once"),
        (["ocr_text=x.py:A"], "scorer's name must be"),
        (["x.py:A"], "scorer's name must be"),
    ):
        with pytest.raises(ValueError, match=told):
            Settings(scorer=scorer)
    with pytest.raises(ValueError, match=r"Got Shore; there are: Share"):
        Settings(scorer=[f"mine={file}:Shore"]).check_paths()


@pytest.mark.parametrize("text", ["a", "boom", "exit", "few", "nan", "none", "hang"])
def test_a_server_answers_everything_else_whatever_a_users_scorer_does(serve, mine, text):
    broken = []
    with serve(FakeScorer(), mine, on_failure=lambda: broken.append(1)) as client:
        for _ in range(3):
            answer = client.post("/score", json={**GOOD, "text": text})
            assert answer.status_code == 200
        health, info = client.get("/health"), client.get("/info").json()
        metrics = client.get("/metrics").text
    score = answer.json()
    assert score["ocr_accuracy"] is not None or text == "boom"
    assert (score["mine"] is None) == ("mine" in score["errors"]) == (text != "a")
    assert (health.status_code, broken) == (200, [])
    assert info["components"][-1] == "mine"
    assert info["scorers"]["mine"] == {"lowest": "0"}
    assert 'reward_batch_items_count{scorer="mine"}' in metrics
    assert ('reward_failures_total{kind="exception",scorer="mine"}' in metrics) == (
        text in ("boom", "exit", "few")
    )


def test_a_scorer_that_fails_on_the_probe_picture_is_named_and_the_server_serves(serve):
    class Fails:
        def score(self, items):
            raise ValueError("no letters")

    with serve(FakeScorer(), OwnScorer("mine", Fails())) as client:
        client.post("/score", json=GOOD)
        health = client.get("/health").json()
    assert health["status"] == "ok"
    assert (
        "failed on the probe picture: mine raised ValueError: no letters"
        in (health["scorers"]["mine"])
    )


def test_servers_with_other_files_have_other_fingerprints(serve, file):
    def fingerprint():
        scorer = load_own(ScorerFile.parse("mine", f"{file}:Share"))
        with serve(FakeScorer(), scorer) as client:
            return client.get("/info").json()["fingerprint"]

    before = fingerprint()
    assert fingerprint() == before
    file.write_text(SOURCE + "# changed\n")
    assert fingerprint() != before


def test_a_scorer_sees_picture_mask_text_and_prompt(serve):
    class Looks:
        def __init__(self):
            self.seen = []

        def score(self, items):
            self.seen += [one for one in items if one.text == "abcd"]
            return [0.0] * len(items)

    looks, blind = Looks(), Looks()
    looks.sees_reference = True
    with serve(OwnScorer("mine", looks), OwnScorer("other", blind)) as client:
        client.post("/score", json={**GOOD, "reference": png(3, 5)})
        client.post("/score", json={**GOOD, "mask": None})
        only = client.post("/score", json={**GOOD, "text": "x", "components": ["other"]}).json()
    assert (only["mine"], only["errors"]["mine"], only["other"]) == (None, "not asked for", 0.0)
    assert blind.seen[0].reference is None
    masked, whole = looks.seen
    assert masked.mask.shape == masked.image.shape[:2] == (8, 12)
    assert masked.mask.dtype == bool
    assert masked.box == (0, 8, 0, 12)
    assert masked.prompt == GOOD["prompt"]
    assert masked.reference.shape == (5, 3, 3)
    assert (whole.mask, whole.has_mask) == (None, False)
