"""The pulse of a thread that computes, and of one that waits."""

import threading
import time

from tasks.launch.pulse import Pulse
from tasks.launch.rank_process import RankProgress


def test_the_pulse_moves_while_the_thread_computes_and_stands_while_it_waits():
    found, go_on, waits = [], threading.Event(), threading.Event()

    def work():
        found.append(Pulse())
        sum(range(1000))
        waits.set()
        go_on.wait()

    thread = threading.Thread(target=work)
    thread.start()
    waits.wait()
    time.sleep(0.1)
    assert found[0].has_moved()
    assert not found[0].has_moved()
    go_on.set()
    thread.join()


def test_the_place_is_the_innermost_of_the_project():
    found = []
    pulse = Pulse()

    def ask(message):
        asker = threading.Thread(target=lambda: found.append(pulse.place()))
        asker.start()
        asker.join()

    RankProgress(ask, "rollout", 3, "img")
    assert found[0].startswith("tasks.launch.rank_process.RankProgress.__init__, line ")
    ask({})
    assert found[1] == "an unknown place"
