import threading
import time

import pytest
from fakes import FakeScorer

from reward_server.scorers.base import Outcome, probe_item
from reward_server.service.batching import Batcher


def item(text: str):
    from dataclasses import replace

    return replace(probe_item(), text=text)


def test_items_that_wait_together_share_a_batch_and_keep_their_answers():
    scorer = FakeScorer(max_batch=3)
    scorer.gate.clear()
    batcher = Batcher(scorer)
    futures = [batcher.submit(item("x" * length)) for length in range(1, 8)]
    scorer.gate.set()
    outcomes = [future.result(5) for future in futures]
    assert [len(outcome.values["ocr_text"]) for outcome in outcomes] == list(range(1, 8))
    assert max(scorer.batches) == 3
    assert sum(scorer.batches) == 7
    batcher.close()
    assert scorer.closed


def test_a_lone_item_waits_no_longer_than_it_is_told_to():
    scorer = FakeScorer(max_batch=64, max_wait_s=0.15)
    batcher = Batcher(scorer)
    started = time.monotonic()
    batcher.submit(item("a")).result(5)
    assert 0.1 < time.monotonic() - started < 2
    futures = [batcher.submit(item("b")) for _ in range(5)]
    [future.result(5) for future in futures]
    assert scorer.batches == [1, 5]
    batcher.close()


def test_waiting_items_are_shared_out_between_the_threads():
    scorer = FakeScorer(parallel=2, max_batch=8)
    scorer.gate.clear()
    batcher = Batcher(scorer)
    futures = [batcher.submit(item("a")) for _ in range(2)]  # one for each thread
    time.sleep(0.1)
    futures += [batcher.submit(item("b")) for _ in range(6)]
    scorer.gate.set()
    [future.result(5) for future in futures]
    assert sum(scorer.batches) == 8
    assert max(scorer.batches) <= 3  # half of those that waited, not all
    batcher.close()


def test_where_one_item_costs_as_much_as_two_the_first_waits_for_one_that_is_coming(monkeypatch):
    monkeypatch.setattr("reward_server.service.batching._COMPANY_S", 5.0)
    scorer = FakeScorer(parallel=2, max_batch=8, pairs=True)
    batcher = Batcher(scorer, under_way=lambda: 2)
    first = batcher.submit(item("a"))
    time.sleep(0.1)
    assert not first.done()
    second = batcher.submit(item("b"))
    assert first.result(2).values["ocr_text"] == "a"
    assert second.result(2).values["ocr_text"] == "b"
    assert scorer.batches == [2]  # one thread took both
    batcher.close()


def test_where_one_item_costs_as_much_as_two_a_lone_one_waits_for_nobody(monkeypatch):
    monkeypatch.setattr("reward_server.service.batching._COMPANY_S", 5.0)
    scorer = FakeScorer(pairs=True)
    batcher = Batcher(scorer, under_way=lambda: 1)
    started = time.monotonic()
    batcher.submit(item("a")).result(5)
    assert time.monotonic() - started < 2
    batcher.close()
    monkeypatch.undo()
    batcher = Batcher(scorer, under_way=lambda: 2)  # the other one never comes
    assert batcher.submit(item("a")).result(5).values["ocr_text"] == "a"
    assert scorer.batches == [1, 1]
    batcher.close()


def test_items_in_hand_are_not_waited_for(monkeypatch):
    monkeypatch.setattr("reward_server.service.batching._COMPANY_S", 5.0)
    scorer = FakeScorer(parallel=2, max_batch=8, pairs=True)
    scorer.gate.clear()
    batcher = Batcher(scorer, under_way=lambda: 3)
    in_hand = [batcher.submit(item("a")) for _ in range(2)]
    time.sleep(0.1)
    last = batcher.submit(item("b"))
    time.sleep(0.1)
    assert len(batcher) == 0  # the other thread took it at once
    scorer.gate.set()
    [future.result(5) for future in [*in_hand, last]]
    assert sorted(scorer.batches) == [1, 2]
    batcher.close()


def test_one_bad_item_fails_alone():
    scorer = FakeScorer(max_batch=4, max_wait_s=0.05)
    batcher = Batcher(scorer)
    futures = [batcher.submit(item(text)) for text in ("good", "boom", "fine")]
    good, bad, fine = (future.result(5) for future in futures)
    assert not good.errors
    assert not fine.errors
    assert bad.values == {}
    assert set(bad.errors) == set(scorer.fields)
    assert "ValueError: a number that nobody has seen" in bad.errors["ocr_text"]
    batcher.close()


def test_a_scorer_that_fails_on_the_probe_as_well_is_told_to_be_broken():
    told = []
    scorer = FakeScorer()
    batcher = Batcher(scorer, on_broken=lambda *what: told.append(what))
    batcher.submit(item("boom")).result(5)
    assert told == []
    scorer.broken = True
    batcher.submit(item("good")).result(5)
    assert told == [("ocr", "RuntimeError: the device is lost")]
    batcher.close()


def test_the_time_that_a_batch_takes_is_known_while_it_is_scored():
    scorer = FakeScorer()
    scorer.gate.clear()
    batcher = Batcher(scorer)
    assert batcher.seconds_in_hand() == 0
    future = batcher.submit(item("a"))
    time.sleep(0.2)
    assert 0.1 < batcher.seconds_in_hand() < 5
    scorer.gate.set()
    future.result(5)
    batcher.close()
    assert batcher.seconds_in_hand() == 0


def test_an_unavailable_scorer_fails_the_batch_with_its_reason_and_is_asked_once():
    scorer = FakeScorer(max_batch=4, max_wait_s=0.05)
    batcher = Batcher(scorer)
    outcome = batcher.submit(item("gone")).result(5)
    assert outcome.errors["ocr_accuracy"] == "ocr is unavailable: nobody there"
    batcher.close()


def test_closing_fails_what_still_waits_and_ends_the_threads():
    scorer = FakeScorer(max_batch=1)
    scorer.gate.clear()
    batcher = Batcher(scorer)
    first, second, left = (batcher.submit(item(text)) for text in "abc")
    left.cancel()  # whoever asked waits no longer
    time.sleep(0.1)  # the first is in the scorer's hands
    closing = threading.Thread(target=batcher.close)
    closing.start()
    assert second.result(5).errors["ocr_text"] == "the server is stopping"
    scorer.gate.set()
    closing.join(5)
    assert isinstance(first.result(5), Outcome)
    assert not [
        thread
        for thread in threading.enumerate()
        if thread.name.startswith("ocr-") and thread.is_alive()
    ]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(item("c"))
