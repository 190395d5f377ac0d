import errno
import json
import os
import threading

import pytest

from tasks.tracking.journal import Journal


def open_journal(path):
    return Journal(path, key=lambda record: (record["stage"], record["step"]))


def rows(*steps, value=1):
    return [{"stage": "update", "step": step, "value": value} for step in steps]


def test_a_record_stands_once_and_the_first_one_stays(tmp_path):
    path = tmp_path / "a.jsonl"
    assert open_journal(path).append(rows(1, 2, 2)) == 2
    again = open_journal(path)
    assert again.append(rows(2, 3, value=9)) == 1
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows(1, 2) + rows(
        3, value=9
    )


def test_records_are_read_from_where_the_last_reading_ended(tmp_path):
    journal = open_journal(tmp_path / "a.jsonl")
    assert journal.read() == []
    journal.append(rows(1, 2))
    offset = journal.end
    journal.append(rows(3))
    assert journal.read(offset) == rows(3)
    assert journal.read(0, offset) == rows(1, 2)


def test_a_half_line_of_a_killed_writer_is_cut_off(tmp_path):
    path = tmp_path / "a.jsonl"
    open_journal(path).append(rows(1))
    with path.open("a") as file:
        file.write('{"stage": "update", "st')
    journal = open_journal(path)
    assert journal.append(rows(2)) == 1
    assert open_journal(path).read() == rows(1, 2)


def test_a_full_disk_leaves_only_whole_lines(tmp_path, monkeypatch):
    journal = open_journal(tmp_path / "a.jsonl")
    journal.append(rows(1))

    def full(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            journal.append(rows(2))
    assert journal.append(rows(2)) == 1
    assert open_journal(tmp_path / "a.jsonl").read() == rows(1, 2)


def test_threads_do_not_mix_their_lines(tmp_path):
    journal = open_journal(tmp_path / "a.jsonl")
    threads = [
        threading.Thread(target=lambda i=i: [journal.append(rows(s)) for s in range(i, i + 20)])
        for i in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(r["step"] for r in open_journal(tmp_path / "a.jsonl").read()) == list(range(23))
