"""What the parent makes of what its ranks say, do not say, and die of. The ranks here are threads
that play their part; the real ones are in test_real_ranks.py."""

import contextlib
import threading
import time
from pathlib import Path

import pytest

from calligrapher.errors import DataError, RankError, RankLostError
from tasks.launch.calls import StageCall
from tasks.launch.failures import describe
from tasks.launch.rank_group import RankGroup
from tasks.progress import Progress

CALL = StageCall("round-0001/rollout", {"old": Path("old")}, ahead=Path("ahead"))
UPDATE = StageCall("round-0000/update", {})


def lost():
    """What a collective raises when another rank is gone."""
    import torch.distributed as dist

    return dist.DistNetworkError("Connection closed by peer")


class Player:
    """One rank's part: `join`, then what the test adds."""

    def __init__(self, channel):
        self.channel, self.setup = channel, None

    def join(self):
        self.setup = self.channel.receive()["setup"]
        self.channel.send({"ready": True})
        return self.channel.receive()

    def answer(self, **meta):
        self.channel.send({"answer": meta, "cost": {"gpu_peak_gib": meta.get("peak", 0.0)}})
        return self.channel.receive()


class Threads:
    """A backend whose ranks are threads that run `parts[rank](player)`; they are heard in order."""

    host, everywhere = "127.0.0.1", False

    def __init__(self, *parts, replaces=0):
        self.parts, self.replaces = parts, replaces
        self.starts, self.stopped, self.status = 0, [], {}

    def start(self, invitations, switchboard):
        self.starts, self.status, self.switchboard = self.starts + 1, {}, switchboard
        for invitation in invitations:
            rank, part = invitation.rank, self.parts[invitation.rank]
            if part is None:
                self.status[rank] = "ended with status 1"
                continue
            play = (rank, part, invitation.accept())
            threading.Thread(target=self._play, args=play, daemon=True).start()

    def _play(self, rank, part, channel):
        with contextlib.suppress(EOFError, OSError):
            try:
                part(Player(channel))
            finally:
                self.status.setdefault(rank, "was killed by SIGKILL")
                channel.close()

    def ended(self, rank):
        return self.status.get(rank)

    def stop(self, patience_s):
        self.stopped.append(patience_s)

    def close(self):
        self.stopped.append("closed")


@pytest.fixture
def group(make_resources, tmp_path):
    """`group(part, part, timeout_s=..)` -> the group of these ranks; closed at the end."""
    groups = []

    def group(*parts, timeout_s=20.0, replaces=0, progress=Progress, servers=list, samplers=0):
        resources = make_resources(launch={"timeout_s": timeout_s})
        resources.progress = progress
        groups.append(
            RankGroup(
                resources,
                Threads(*parts, replaces=replaces),
                size=len(parts),
                samplers=samplers,
                servers=servers,
                runs_dir=tmp_path,
                logs=tmp_path / "logs",
            )
        )
        return groups[-1]

    yield group
    for one in groups:
        one.close()


def idle(player):
    player.join()
    player.channel.receive()


def test_meta_is_rank_0s_and_each_cost_that_of_the_rank_with_the_most(group):
    seen = {}

    def part(player):
        seen["call"] = player.join()
        rank = len(seen)
        player.answer(rank=rank, peak=2.0)

    def other(player):
        player.join()
        player.answer(rank="other", peak=5.0)

    ranks = group(part, other)
    answer = ranks.run(CALL, Path("out"))
    assert answer.meta["rank"] == 1
    assert answer.cost == {"gpu_peak_gib": 5.0}
    call = StageCall.from_json(seen["call"]["call"])
    assert (call.name, call.inputs["old"]) == (CALL.name, Path("old").absolute())
    assert seen["call"]["out"] == str(Path("out").absolute())


def test_a_stage_of_the_driver_starts_no_rank(group, monkeypatch):
    from tasks.launch import rank_group

    monkeypatch.setattr(rank_group, "do", lambda call, resources, out: {"kept": 3})
    ranks = group(idle)
    assert ranks.run(StageCall("round-0000/advantage", {}), Path("out")).meta == {"kept": 3}
    assert ranks.backend.starts == 0


def test_images_of_all_ranks_add_up_in_one_line_and_steps_are_counted_once(group):
    counted = []

    class Counted(Progress):
        def __init__(self, label, total, unit, *, done=0):
            super().__init__(label, total, unit, done=done)
            counted.append([label, total, unit, 0])

        def advance(self, count=1, **values):
            counted[-1][-1] += count

    def part(player):
        player.join()
        for unit in ("img", "step"):
            bar = {"label": "round 1", "total": 6, "unit": unit, "done": 0}
            player.channel.send({"bar": bar})
            for _ in range(3):
                player.channel.send({"advance": 1, "values": {"loss": 0.5}})
            player.answer()

    ranks = group(part, part, progress=Counted)
    for _ in range(2):
        ranks.run(CALL, Path("out"))
    assert counted == [["round 1", 12, "img", 6], ["round 1", 6, "step", 3]]


def test_an_error_that_one_rank_meets_is_raised_as_it_was_there(group):
    def breaks(player):
        player.join()
        time.sleep(0.1)  # the others' collectives fail first
        player.channel.send({"error": describe(DataError("test3_mask.png must be a picture."))})
        player.channel.receive()

    def collective(player):
        player.join()
        player.channel.send({"error": describe(lost())})
        player.channel.receive()

    ranks = group(collective, breaks)
    with pytest.raises(DataError) as caught:
        ranks.run(CALL, Path("out"))
    assert str(caught.value) == "test3_mask.png must be a picture."
    (note,) = caught.value.__notes__
    assert note.startswith("(Rank 1 of 2 on ")
    assert "round-0001/rollout" in note
    assert note.endswith("rank-1.log)")
    assert ranks.backend.stopped == [0.0]


def test_a_file_that_one_rank_cannot_write_is_named_with_what_the_system_said(group):
    def breaks(player):
        player.join()
        full = OSError(28, "No space left on device", "out/shard-0001.parquet")
        player.channel.send({"error": describe(full)})
        player.channel.receive()

    with pytest.raises(OSError, match="No space left") as caught:
        group(idle, breaks).run(CALL, Path("out"))
    assert caught.value.filename == "out/shard-0001.parquet"


def test_what_nobody_foresaw_comes_with_its_traceback(group):
    def breaks(player):
        player.join()
        try:
            {}["x"]
        except KeyError as error:
            player.channel.send({"error": describe(error)})
        player.channel.receive()

    with pytest.raises(RankError, match="KeyError: 'x'") as caught:
        group(breaks, idle).run(CALL, Path("out"))
    assert not isinstance(caught.value, RankLostError)
    assert "test_rank_group.py" in str(caught.value)


def test_a_rank_that_dies_is_named_with_host_stage_and_the_end_of_its_log(group, tmp_path):
    def dies(player):
        player.join()

    def collective(player):
        player.join()
        player.channel.send({"error": describe(lost())})
        player.channel.receive()

    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-1.log").write_text("".join(f"line {n}\n" for n in range(40)))
    started = time.monotonic()
    with pytest.raises(RankLostError) as caught:
        group(collective, dies).run(CALL, Path("out"))
    assert time.monotonic() - started < 5
    told = str(caught.value)
    assert "Rank 1 of 2 on " in told
    assert "was killed by SIGKILL in round-0001/rollout" in told
    assert "too little memory" in told
    assert told.count("line ") == 15
    assert "line 39" in told
    assert told.endswith("The same command goes on from here.")


def test_a_rank_that_never_starts_is_named(group):
    with pytest.raises(RankError, match=r"Rank 1 must start. It ended with status 1"):
        group(idle, None).run(CALL, Path("out"))


def test_a_rank_that_gives_no_sign_of_life_is_taken_for_hung(group):
    def lives(player):
        player.join()
        while True:
            player.channel.send({"alive": True})
            time.sleep(0.05)

    started = time.monotonic()
    with pytest.raises(RankLostError, match=r"Rank 0 of 2 .* for 0.6 s \(launch.timeout_s\)"):
        group(idle, lives, timeout_s=0.6).run(CALL, Path("out"))
    assert time.monotonic() - started < 5


def alive(moves, at):
    """A rank at work whose process lives, and which computes or does not."""

    def part(player):
        player.join()
        for _ in range(30):
            player.channel.send({"alive": True, "moves": moves, "at": at})
            time.sleep(0.05)
        player.answer()

    return part


def test_ranks_that_live_but_compute_nothing_are_taken_for_hung_and_told_where(group):
    hung, waits = alive(False, "a.load, line 3"), alive(False, "b.barrier, line 5")
    started = time.monotonic()
    with pytest.raises(
        RankLostError, match=r"none has .* for 0.6 s \(launch.timeout_s\)"
    ) as caught:
        group(waits, hung, timeout_s=0.6).run(CALL, Path("out"))
    assert time.monotonic() - started < 1.4
    lines = str(caught.value).splitlines()
    assert lines[1].startswith("Rank 0 of 2 on ")
    assert "is in b.barrier, line 5; its log: " in lines[1]
    assert "is in a.load, line 3; its log: " in lines[2]


def test_a_rank_that_computes_while_the_others_wait_is_given_its_time(group):
    group(alive(False, "waits"), alive(True, "works"), timeout_s=0.6).run(CALL, Path("out"))


def test_an_idle_group_is_not_taken_for_hung(group):
    def part(player):
        player.join()
        for _ in range(2):
            player.answer()

    ranks = group(part, part, timeout_s=0.6)
    ranks.run(CALL, Path("out"))
    time.sleep(1.0)  # stages of the driver, an evaluation elsewhere
    ranks.run(CALL, Path("out"))


def test_a_parent_that_starts_servers_takes_nobody_for_hung(group):
    def slow():
        time.sleep(1.0)
        return ["http://one:1"]

    answers = []

    def part(player):
        player.join()
        player.channel.send({"servers?": True})
        answers.append(player.channel.receive())
        player.answer()

    group(part, part, timeout_s=0.6, servers=slow).run(CALL, Path("out"))
    assert answers == [{"servers": ["http://one:1"]}] * 2


def test_where_a_lost_rank_can_be_replaced_the_stage_goes_on(group, caplog):
    starts = []

    def part(player):
        player.join()
        starts.append(1)
        if len(starts) > 2:  # the first two starts lose a rank
            player.answer(images=4)

    ranks = group(part, replaces=2)
    assert ranks.run(CALL, Path("out")).meta == {"images": 4}
    assert ranks.backend.starts == 3
    assert caplog.text.count("The ranks are started again.") == 2


def test_a_stage_that_is_stopped_by_hand_leaves_no_rank(group):
    def presses(player):
        player.join()
        player.channel.send({"bar": {"label": "x", "total": 1, "unit": "img", "done": 0}})
        player.channel.receive()

    def interrupted(*given, **named):
        raise KeyboardInterrupt

    ranks = group(presses, progress=interrupted)
    with pytest.raises(KeyboardInterrupt):
        ranks.run(CALL, Path("out"))
    assert ranks.backend.stopped == [0.0]


def test_a_stranger_without_the_key_is_not_let_in(group):
    from multiprocessing import AuthenticationError
    from multiprocessing.connection import Client

    def part(player):
        player.join()
        player.answer(images=2)

    ranks = group(part)
    real = ranks.backend.start

    def start(invitations, switchboard):
        with pytest.raises((AuthenticationError, EOFError, ConnectionError)):
            Client((invitations[0].host, invitations[0].port), authkey=b"guess")
        real(invitations, switchboard)

    ranks.backend.start = start
    assert ranks.run(CALL, Path("out")).meta == {"images": 2}


def test_a_rollout_that_was_begun_goes_on_beside_other_stages_and_is_asked_for_once(group):
    asked, setups, done, shown = [], {}, threading.Event(), []

    class Shown(Progress):
        def __init__(self, label, total, unit, *, done=0):
            super().__init__(label, total, unit, done=done)
            shown.append((label, len(asked)))

    def samples(player):
        asked.append(StageCall.from_json(player.join()["call"]).name)
        setups["samples"] = player.setup
        player.channel.send({"bar": {"label": "begun", "total": 6, "unit": "img", "done": 0}})
        done.wait()
        player.answer(images=6)

    def updates(player):
        asked.append(StageCall.from_json(player.join()["call"]).name)
        setups.setdefault("updates", []).append((player.setup["first"], player.setup["size"]))
        player.channel.send({"bar": {"label": "update", "total": 2, "unit": "step", "done": 0}})
        player.answer(steps=2)

    ranks = group(samples, updates, updates, samplers=1, progress=Shown)
    ranks.begin(CALL, Path("out"))
    assert ranks.run(UPDATE, Path("out")).meta == {"steps": 2}
    assert not done.is_set()
    done.set()
    assert ranks.run(CALL, Path("out")).meta == {"images": 6}
    assert sorted(asked) == ["round-0000/update"] * 2 + ["round-0001/rollout"]
    assert (setups["samples"]["first"], setups["samples"]["size"]) == (0, 1)
    assert setups["updates"] == [(1, 2)] * 2
    assert [label for label, _ in shown] == ["update", "begun"]


def test_only_ranks_that_made_an_artifact_are_told_that_it_is_there(group):
    told = {}

    def part(name):
        def part(player):
            player.join()
            told[name] = player.answer()
            if "end" not in told[name]:
                player.channel.receive()

        return part

    ranks = group(part("samples"), part("updates"), samplers=1)
    ranks.begin(CALL, Path("out"))
    ranks.run(UPDATE, Path("out"))
    ranks.committed(Path("round-0000/update"))
    ranks.run(CALL, Path("out"))
    ranks.close()
    stop_at = time.monotonic() + 5
    while len(told) < 2 and time.monotonic() < stop_at:
        time.sleep(0.01)
    assert told["updates"] == {"committed": str(Path("round-0000/update").absolute())}
    assert told["samples"] == {"end": True}


def silent(player):
    player.join()
    time.sleep(3)


def fails(player):
    player.join()
    player.channel.send({"error": describe(DataError("test3_mask.png must be a picture."))})
    player.channel.receive()


def dies(player):
    player.join()


@pytest.mark.parametrize(
    ("sampler", "error", "told"),
    [
        (fails, DataError, "test3_mask.png must be a picture"),
        (dies, RankLostError, "Rank 0 of 2 on .* was killed by SIGKILL in round-0001/rollout"),
        (silent, RankLostError, "Rank 0 of 2 on .* for 0.6 s .* in round-0001/rollout"),
        (alive(False, "a.load"), RankLostError, "computed anything for 0.6 s .* round-0001/rollo"),
    ],
)
def test_what_ends_a_rollout_that_was_begun_ends_the_update_beside_it(group, sampler, error, told):
    ranks = group(sampler, alive(True, "works"), samplers=1, timeout_s=0.6)
    ranks.begin(CALL, Path("out"))
    started = time.monotonic()
    with pytest.raises(error, match=told):
        ranks.run(UPDATE, Path("out"))
    assert time.monotonic() - started < 4
    assert ranks.backend.stopped == [0.0]


def test_a_sampler_that_dies_with_nothing_to_do_ends_the_update(group):
    def ends(player):
        player.join()
        player.answer()

    ranks = group(ends, alive(True, "works"), samplers=1)
    ranks.run(CALL, Path("out"))
    ranks.committed(Path("round-0001/rollout"))
    with pytest.raises(RankLostError, match=r"Rank 0 of 2 .* in round-0000/update"):
        ranks.run(UPDATE, Path("out"))


def test_a_rank_that_dies_when_all_have_answered_ends_what_was_waited_for(group):
    updated = threading.Event()

    def samples(player):
        player.join()
        updated.wait()
        player.answer()

    def updates(player):
        player.join()
        player.answer()

    ranks = group(samples, updates, samplers=1)
    ranks.begin(CALL, Path("out"))
    ranks.run(UPDATE, Path("out"))
    ranks.committed(Path("round-0000/update"))
    updated.set()
    # The sampler's answer and the other's end are there before either is heard.
    channels = ranks.backend.switchboard.channels
    assert all(channels[rank].connection.poll(5) for rank in (0, 1))
    with pytest.raises(RankLostError, match=r"Rank 1 of 2 .* in round-0001/rollout"):
        ranks.run(CALL, Path("out"))


def test_where_ranks_are_started_again_a_rollout_that_was_begun_is_asked_for_again(group):
    starts = []

    def samples(player):
        player.join()
        starts.append(1)
        if len(starts) == 1:
            return
        player.answer(images=6)

    ranks = group(samples, alive(True, "works"), samplers=1, replaces=1)
    ranks.begin(CALL, Path("out"))
    ranks.run(UPDATE, Path("out"))
    assert ranks.run(CALL, Path("out")).meta == {"images": 6}
    assert (len(starts), ranks.backend.starts) == (2, 2)


def test_what_was_begun_and_is_not_waited_for_is_given_up_at_once(group):
    ranks = group(silent, idle, samplers=1)
    ranks.begin(CALL, Path("out"))
    ranks.close()
    assert ranks.backend.stopped == [0.0, "closed"]
