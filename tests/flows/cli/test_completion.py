"""Shell completion, asked as a shell asks."""

import contextlib
import os
import pty
import shutil
import subprocess
import threading

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
        (["train", "tiny-nft", "rounds=2", "nft.nft_b"], ["nft.nft_beta="]),
        (["report", "first", "fi"], ["first"]),
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


ZSHRC = """
PS1='READY> '
eval "$(<./script)"
answer() { zle complete-word; print -r -- "$BUFFER" >> answers }
zle -N answer
bindkey '^I' answer
"""


@pytest.mark.skipif(shutil.which("zsh") is None, reason="there is no zsh")
def test_zsh_completes_the_same_and_every_value_of_many(capsys, tmp_path):
    (tmp_path / "script").write_text(printed(capsys, "zsh"))
    (tmp_path / ".zshrc").write_text(ZSHRC)
    for name in ("runs/first", "runs/second", "cases"):
        (tmp_path / name).mkdir(parents=True)
    asked = {
        "st": "status ",
        "status fi": "status first ",
        "status --ver": "status --verify ",
        "report first sec": "report first second ",
        "train tiny-n": "train tiny-nft ",
        "train tiny-nft rounds=2 nft.nft_b": "train tiny-nft rounds=2 nft.nft_beta=",
        "rerun first round-0000/update --fo": "rerun first round-0000/update --fork ",
        "data check ca": "data check cases/",
        "data check --ref": "data check --reference-context ",
        "init x --gpu 2": "init x --gpu 2x80 ",
    }
    driver, terminal = pty.openpty()
    shell = subprocess.Popen(
        ["zsh", "-d", "-i"],
        cwd=tmp_path,
        env=os.environ | {"ZDOTDIR": str(tmp_path), "TERM": "dumb"},
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
    )
    kill = threading.Timer(60, shell.kill)
    kill.start()
    os.close(terminal)
    shown = b""
    while b"READY> " not in shown:
        shown += os.read(driver, 4096)
    typed = "".join(f"calligrapher {words}\t\x15" for words in asked)
    os.write(driver, f"{typed}exit\r".encode())
    with contextlib.suppress(OSError):  # the terminal is gone when the shell is
        while seen := os.read(driver, 4096):
            shown += seen
    shell.wait()
    kill.cancel()
    os.close(driver)
    answers = (tmp_path / "answers").read_text().splitlines()
    assert answers == [f"calligrapher {words}" for words in asked.values()], shown.decode()


def test_zsh_gets_a_script_that_names_every_command(capsys):
    script = printed(capsys, "zsh")
    assert script.startswith("#compdef calligrapher")
    for command in ("train", "report", "init", "sync"):
        assert f"\n    {command}:'" in script
    assert "nft.nft_beta=" in script
