"""Shell completion, asked as a shell asks."""

import shutil
import subprocess

import pytest

from flows.cli.main import main


def printed(capsys, shell):
    assert main(["completion", shell]) == 0
    return capsys.readouterr().out


@pytest.mark.skipif(shutil.which("bash") is None, reason="there is no bash")
@pytest.mark.parametrize(
    ("words", "offered"),
    [
        (["st"], ["status"]),
        (["status", "fi"], ["first"]),
        (["status", "--ver"], ["--verify"]),
        (["train", "tiny-n"], ["tiny-nft"]),
        (["train", "tiny-nft", "nft.nft_b"], ["nft.nft_beta="]),
        (["init", "x", "--gpu", "8x"], ["8x24", "8x48", "8x80"]),
    ],
)
def test_bash_completes_commands_options_runs_files_and_keys(capsys, tmp_path, words, offered):
    (tmp_path / "script").write_text(printed(capsys, "bash"))
    (tmp_path / "runs/first").mkdir(parents=True)
    line = " ".join(["calligrapher", *words])
    ask = f"""
        source ./script
        COMP_WORDS=({line}); COMP_CWORD={len(words)}; COMP_LINE="{line}"; COMP_POINT={len(line)}
        function=$(complete -p calligrapher | sed 's/.*-F \\([^ ]*\\).*/\\1/')
        $function calligrapher "{words[-1]}" "{words[-2] if len(words) > 1 else "calligrapher"}"
        printf '%s\\n' "${{COMPREPLY[@]}}"
    """
    answer = subprocess.run(
        ["bash", "--norc", "-c", ask], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert answer.stdout.split() == offered, answer.stderr


def test_zsh_gets_a_script_that_names_every_command(capsys):
    script = printed(capsys, "zsh")
    assert script.startswith("#compdef calligrapher")
    for command in ("train", "report", "init", "sync"):
        assert f"\n    {command}:'" in script
    assert "nft.nft_beta=" in script
