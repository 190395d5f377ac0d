"""The command `completion`: what bash or zsh needs to complete commands, options, runs and keys.

eval "$(calligrapher completion bash)"
"""

import argparse
import re
from collections.abc import Callable, Iterator

from calligrapher.errors import CalligrapherError
from flows.cli.init import MACHINES

_RUNS = {"run", "runs", "first", "second"}
_FILES = {"params", "out", "weights", "target", "image", "mask", "reference", "source", "dir"}
_FILES |= {"path", "fonts", "words", "pictures", "bench"}
_BASH = """
_calligrapher_runs() { compgen -W "$(ls runs 2>/dev/null)" -- "$1"; compgen -d -- "$1"; }
_calligrapher_params() { compgen -W "@FILES@" -- "$1"; compgen -f -- "$1"; }
_calligrapher_settings() { compgen -W "@KEYS@" -- "$1"; }
"""
_ZSH = """
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -i; }
_calligrapher_runs() { compadd -- ${(f)"$(ls runs 2>/dev/null)"}; _files -/; }
_calligrapher_params() { compadd -- @FILES@; _files; }
_calligrapher_settings() { compadd -S '' -- @KEYS@; }
"""


def add_completion_commands(
    commands: argparse._SubParsersAction, parser: Callable[[], argparse.ArgumentParser]
) -> None:
    """Add completion. parser: makes the whole command line anew."""
    completion = commands.add_parser(
        "completion", help='shell completion: eval "$(calligrapher completion bash)"'
    )
    completion.add_argument("shell", choices=("bash", "zsh"))
    completion.set_defaults(command=lambda chosen: _completion(parser(), chosen.shell))


def _completion(parser: argparse.ArgumentParser, shell: str) -> int:
    from tasks.params.files import shipped_params
    from tasks.params.listing import find_keys

    try:
        import shtab
    except ImportError as error:
        raise CalligrapherError(
            "completion needs the package shtab. It is not installed: `pip install shtab`."
        ) from error
    for action in _actions(parser):
        if action.dest in _RUNS:
            action.complete = dict.fromkeys(("bash", "zsh"), "_calligrapher_runs")
        elif action.dest == "params":
            action.complete = dict.fromkeys(("bash", "zsh"), "_calligrapher_params")
        elif action.dest == "settings":
            action.complete = dict.fromkeys(("bash", "zsh"), "_calligrapher_settings")
        elif action.dest == "machine":
            action.choices = MACHINES
        elif action.dest in _FILES:
            action.complete = shtab.FILE
    words = {
        "@FILES@": " ".join(sorted(file.stem for file in shipped_params().glob("*.yaml"))),
        "@KEYS@": " ".join(f"{key.name}=" for key in find_keys()),
    }
    preamble = {"bash": _BASH, "zsh": _ZSH}[shell]
    for word, value in words.items():
        preamble = preamble.replace(word, value)
    script = shtab.complete(parser, shell, preamble=preamble)
    if shell == "zsh":  # shtab's mark for many values, after which zsh offers nothing more
        script = re.sub(r'^  "\(\*\)::?', '  "*:', script, flags=re.MULTILINE)
    print(script)
    return 0


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """Yield every argument of a parser and of the commands below it."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for below in action.choices.values():
                yield from _actions(below)
