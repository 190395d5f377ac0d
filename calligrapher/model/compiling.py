"""Compiles the transformer's blocks, which are most of its time, with torch's compiler."""

import sysconfig
from pathlib import Path

from calligrapher.errors import ParamsError

# A graph for each batch size and length and for none but that: one graph for all sizes would be
# laid out for the one that came first, which is another one where a run is resumed. For the same
# reason nothing is chosen by how fast it was just then. Half precision is rounded where it is
# without compiling: else the graphs with and without gradient would differ, and with them GRPO's
# log-probabilities. `recompile_limit`: sizes times lengths times modes (with gradient, without)
# of a run; beyond it blocks run as they are, which a run with references of many shapes may come
# to.
HOW = {
    "dynamic": False,
    "options": {"deterministic": True, "emulate_precision_casts": True},
    "recompile_limit": 64,
}


def compile_blocks(transformer) -> None:
    """Let each block of a diffusers transformer be compiled when it is first called.

    Blocks of one kind share what was compiled; parameters keep their names and may be swapped.
    """
    transformer.compile_repeated_blocks(**HOW)


def check_compiler() -> None:
    """Raise ParamsError where this machine cannot build what torch's compiler writes."""
    from torch._inductor.cpp_builder import get_cpp_compiler
    from torch._inductor.exc import InvalidCxxCompiler

    header = Path(sysconfig.get_path("include"), "Python.h")
    try:
        get_cpp_compiler()
        lacking = None if header.is_file() else f"there is no {header}"
    except InvalidCxxCompiler as error:
        lacking = str(error)
    if lacking is not None:
        raise ParamsError(
            "model.compile must be false where torch has no C++ compiler or Python no headers. Got"
            f" true: {lacking}. Install them (`apt install g++ python3-dev`), name a compiler in"
            " the variable CXX, or set model.compile to false."
        )
