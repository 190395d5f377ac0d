"""How the command line is read."""

import errno
import io
import json
import logging
from contextlib import nullcontext

import pytest

from calligrapher import __version__
from calligrapher.errors import RewardError
from flows.cli.main import main, parsed

ORDERS = [
    ("gc RUN --dry-run retention.keep_last=1", ["retention.keep_last=1"]),
    ("gc --dry-run RUN a=1 b=2", ["a=1", "b=2"]),
    ("plan FILE --gpu h200 nft.kl_coef=0", ["nft.kl_coef=0"]),
    ("plan FILE a=1 --json b=2", ["a=1", "b=2"]),
    ("why RUN --runs-dir R STAGE", ["STAGE"]),
    ("why --runs-dir R RUN STAGE a=1", ["STAGE", "a=1"]),
    ("rerun RUN --fork x STAGE", ["STAGE"]),
    ("rerun RUN STAGE --fork x a=1 --downstream b=2", ["STAGE", "a=1", "b=2"]),
    ("replay RUN --fork x rounds=2", ["rounds=2"]),
    ("train FILE run=a rounds=2", ["run=a", "rounds=2"]),
    ("train FILE", []),
]


@pytest.mark.parametrize(("command", "settings"), ORDERS)
def test_settings_may_stand_anywhere_among_the_options(command, settings):
    assert parsed(command.split()).settings == settings


@pytest.mark.parametrize(
    ("command", "left"),
    [
        ("gc RUN --dryrun a=1", "--dryrun"),
        ("status RUN --json other", "other"),
        ("plan FILE a=1 -x", "-x"),
    ],
)
def test_what_no_command_knows_is_still_refused(command, left, capsys):
    with pytest.raises(SystemExit) as caught:
        parsed(command.split())
    assert caught.value.code == 2
    assert f"unrecognized arguments: {left}" in capsys.readouterr().err


@pytest.mark.parametrize(("settings", "run"), [([], "tiny-nft"), (["run=b", "rounds=2"], "b")])
def test_the_flow_is_told_file_overrides_and_the_name_of_the_run(monkeypatch, settings, run):
    import flows.rl_train
    import flows.services.prefect_api
    import tasks.runs.preflight

    class ToldError(Exception):
        pass

    def rl_train(params, overrides, run, runs_dir):
        raise ToldError(params.rpartition("/")[2], overrides, run, runs_dir)

    monkeypatch.setattr(tasks.runs.preflight, "preflight", lambda *given, run: None)
    monkeypatch.setattr(flows.services.prefect_api, "prefect_api", nullcontext)
    monkeypatch.setattr(flows.rl_train, "rl_train", rl_train)
    with pytest.raises(ToldError) as caught:
        main(["train", "tiny-nft", *settings, "runs_dir=r"])
    assert caught.value.args == ("tiny-nft.yaml", settings[1:], run, "r")


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"calligrapher {__version__}\n"


def sentence_of(capsys, *arguments):
    """What the command says of a mistake: one line."""
    assert main([str(argument) for argument in arguments]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    (line,) = told.err.splitlines()
    return line


def test_a_place_that_cannot_be_written_to_is_told_in_one_sentence(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    within = tmp_path / "file" / "cases"
    told = sentence_of(capsys, "tiny", "cases", within)
    assert told == f"{within} must be usable. Found: Not a directory."
    assert sentence_of(capsys, "tiny", "pretrain", within).startswith(f"{within}/")
    told = sentence_of(capsys, "train", "tiny-nft", f"runs_dir={tmp_path / 'file'}")
    assert told.startswith(f"{tmp_path / 'file'}/")


def test_a_full_disk_is_told_and_a_failing_socket_is_a_traceback(monkeypatch, capsys):
    import calligrapher.tiny.world

    def fail(*given, **named):
        raise error

    monkeypatch.setattr(calligrapher.tiny.world, "write_bench", fail)
    error = OSError(errno.ENOSPC, "No space left on device")
    told = sentence_of(capsys, "tiny", "cases", "x")
    assert told == "The disk must have room. Found: No space left on device."
    error = ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")
    with pytest.raises(ConnectionResetError):
        main(["tiny", "cases", "x"])


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("tiny cases c --num -3", "--num: must be a whole number from 1. Got '-3'."),
        ("tiny cases c --num 0", "--num: must be a whole number from 1. Got '0'."),
        ("tiny cases c --seed -1", "--seed: must be a whole number from 0. Got '-1'."),
        ("tiny cases c --seed 1.5", "--seed: must be a whole number from 0. Got '1.5'."),
    ],
)
def test_a_number_that_cannot_be_is_refused_before_anything_is_drawn(arguments, told, capsys):
    with pytest.raises(SystemExit) as caught:
        main(arguments.split())
    assert caught.value.code == 2
    assert told in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ("--gpu-memory inf", "ParamsError: --gpu-memory must be a number of GiB above the 2"),
        ("--gpu-memory nan", "ParamsError: --gpu-memory must be a number of GiB above the 2"),
        ("--gpu h100 --gpu-memory 3", "ParamsError: --gpu-memory must not be given beside --gpu."),
    ],
)
def test_a_gpu_that_cannot_be_is_told(arguments, told, capsys):
    assert sentence_of(capsys, "plan", "tiny-nft", *arguments.split()).startswith(told)


@pytest.mark.parametrize(("command", "goes_on"), [("tiny pretrain x", True), ("sync x", False)])
def test_only_a_command_that_goes_on_says_so_when_it_is_stopped(
    command, goes_on, monkeypatch, capsys
):
    import calligrapher.tiny.pretrain
    import tasks.tracking.mirror

    def interrupted(*given, **named):
        raise KeyboardInterrupt

    monkeypatch.setattr(calligrapher.tiny.pretrain, "pretrain", interrupted)
    monkeypatch.setattr(tasks.tracking.mirror, "sync", interrupted)
    assert main(command.split()) == 130
    assert (
        capsys.readouterr().err
        == "Stopped." + goes_on * " The same command goes on from here." + "\n"
    )


@pytest.mark.filterwarnings("ignore:Logger 'prefect")
def test_prefect_s_copies_of_what_ends_a_run_are_not_printed_and_the_traceback_is_kept(
    monkeypatch, tmp_path, capsys
):
    import flows.rl_train
    import flows.services.prefect_api
    import tasks.runs.preflight

    def rl_train(params, overrides, run, runs_dir):
        for name in ("prefect.flow_runs", "prefect.task_runs", "tasks.runs.run"):
            logging.getLogger(name).error("seen by %s", name)
        raise RewardError("The reward servers must answer.")

    handler = logging.StreamHandler(told := io.StringIO())
    monkeypatch.setattr(logging.getLogger(), "handlers", [handler])
    monkeypatch.setattr(tasks.runs.preflight, "preflight", lambda *given, run: None)
    monkeypatch.setattr(flows.services.prefect_api, "prefect_api", nullcontext)
    monkeypatch.setattr(flows.rl_train, "rl_train", rl_train)
    (tmp_path / "a").mkdir()
    said = sentence_of(capsys, "train", "tiny-nft", "run=a", f"runs_dir={tmp_path}")
    assert said == "RewardError: The reward servers must answer."
    assert told.getvalue() == "seen by tasks.runs.run\n"
    kept = (tmp_path / "a/errors.log").read_text()
    assert "Traceback" in kept
    assert kept.rstrip().endswith("RewardError: The reward servers must answer.")


def test_a_dry_run_prints_and_neither_asks_prefect_nor_makes_the_run(monkeypatch, tmp_path, capsys):
    import flows.services.prefect_api
    import tasks.runs.preflight

    monkeypatch.setattr(tasks.runs.preflight, "preflight", lambda *given, **also: None)
    monkeypatch.setattr(flows.services.prefect_api, "prefect_api", lambda: pytest.fail("asked"))
    assert main(["train", "tiny-nft", "--dry-run", "rounds=2", f"runs_dir={tmp_path}/r"]) == 0
    told = capsys.readouterr().out
    assert f"{tmp_path}/r/tiny-nft: nft, 2 rounds, 0 of 14 artifacts are there" in told
    assert (
        main(["train", "tiny-nft", "--dry-run", "--json", "rounds=2", f"runs_dir={tmp_path}/r"])
        == 0
    )
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["rounds"]) == (f"{tmp_path}/r/tiny-nft", 2)
    assert [step["state"] for step in found["steps"]] == ["missing"] * 14
    assert list(tmp_path.iterdir()) == []
