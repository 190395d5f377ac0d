"""How the command line is read."""

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


def test_the_version_is_the_package_s(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"calligrapher {__version__}\n"
