"""The model and the maths: torch, diffusers, pyarrow; no orchestrator, tracker or HTTP."""

import importlib.metadata

try:
    __version__ = importlib.metadata.version("calligrapher")
except importlib.metadata.PackageNotFoundError:  # a checkout that was never installed
    __version__ = "unknown"
