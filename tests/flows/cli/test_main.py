"""How the command line is read."""

from contextlib import nullcontext

import pytest

from calligrapher import __version__
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

    monkeypatch.setattr(tasks.runs.preflight, "preflight", lambda *given: None)
    monkeypatch.setattr(flows.services.prefect_api, "prefect_api", nullcontext)
    monkeypatch.setattr(flows.rl_train, "rl_train", rl_train)
    with pytest.raises(ToldError) as caught:
        main(["train", "tiny-nft", *settings, "runs_dir=r"])
    assert caught.value.args == ("tiny-nft.yaml", settings[1:], run, "r")


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"calligrapher {__version__}\n"
