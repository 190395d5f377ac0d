"""Ranks as processes: what a signal does while they are started."""

import signal

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException

from tasks.launch import spawned


def test_a_signal_that_comes_while_ranks_start_goes_to_the_run_s_own_handler(monkeypatch, tmp_path):
    got = []

    def interrupted(**_):
        # As torch's launcher does: handlers of its own, which raise.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise SignalException("got signal: 15", sigval=signal.SIGTERM)

    monkeypatch.setattr(spawned, "start_processes", interrupted)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = signal.signal(signal.SIGTERM, lambda number, _: got.append(number))
    try:
        with pytest.raises(SignalException):
            spawned.Spawned(tmp_path, []).start([], None)
        assert got == [signal.SIGTERM]
    finally:
        signal.signal(signal.SIGTERM, before)
