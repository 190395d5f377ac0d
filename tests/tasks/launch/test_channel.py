"""What parent and ranks say to each other arrives at once, and whole."""

import socket
import threading
import time

import pytest

from tasks.launch.channel import Invitation, Switchboard


@pytest.fixture
def switchboard():
    board = Switchboard("127.0.0.1")
    yield board
    board.close()


def received(switchboard, count):
    """The next `count` messages of all ranks."""
    found = []
    stop_at = time.monotonic() + 30
    while len(found) < count and time.monotonic() < stop_at:
        found += switchboard.messages(0.2)
    return found


def arrived(switchboard, rank):
    """The parent's end of the channel to `rank`, when it is there."""
    stop_at = time.monotonic() + 30
    while rank not in switchboard.channels and time.monotonic() < stop_at:
        time.sleep(0.005)
    return switchboard.channels[rank]


def test_two_small_messages_in_a_row_are_answered_within_20_ms(switchboard):
    """The shortest of some: on a busy machine any one may be late, but none can be early."""
    channel = Invitation.from_json(switchboard.invitation(0).to_json()).accept()
    parent = arrived(switchboard, 0)

    def play():
        while "end" not in channel.receive():
            channel.send({"bar": {"total": 1}})
            channel.send({"answer": {}, "cost": {}})

    threading.Thread(target=play, daemon=True).start()
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        parent.send({"call": "update"})
        assert [message.keys() for _, message in received(switchboard, 2)] == [
            {"bar"},
            {"answer", "cost"},
        ]
        seconds.append(time.perf_counter() - began)
    parent.send({"end": True})
    assert min(seconds) < 0.02


def test_a_rank_in_a_thread_of_this_process_talks_without_a_network(switchboard):
    channel = switchboard.local(0)
    channel.send({"ready": True})
    assert received(switchboard, 1) == [(0, {"ready": True})]
    assert switchboard.hosts == {0: socket.gethostname()}


def test_a_rank_that_is_gone_is_heard_of_once(switchboard):
    channel = switchboard.invitation(3).accept()
    arrived(switchboard, 3)
    channel.send({"last": "word"})
    channel.close()
    assert received(switchboard, 2) == [(3, {"last": "word"}), (3, None)]
    assert switchboard.channels == {}
    assert not list(switchboard.messages(0.0))
