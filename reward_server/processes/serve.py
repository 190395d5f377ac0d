"""One server process: flags -> Settings -> scorers -> uvicorn. `python -m reward_server --help`."""

import argparse
import errno
import logging
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence

from pydantic import ValidationError

from reward_server.settings import Settings

log = logging.getLogger(__name__)

EXIT_USAGE = 2
EXIT_PORT_TAKEN = 98
EXIT_SCORERS_FAILED = 3  # they could not be loaded, or one works no more
_UNDER_WAY_S = 5  # how long requests under way may take when the server is to stop
_GRACE_S = 10  # from the first wish to stop to the process's end, whatever hangs


def add_flags(parser: argparse.ArgumentParser) -> None:
    """One flag per field of Settings; a flag that is not given keeps the field's default."""
    for name, field in Settings.model_fields.items():
        flag = "--" + name.replace("_", "-")
        text = f"{field.description} (default: {field.default})".replace("%", "%%")
        if field.annotation is bool:
            parser.add_argument(flag, action="store_true", default=argparse.SUPPRESS, help=text)
        elif field.annotation == tuple[str, ...]:
            parser.add_argument(flag, action="append", default=argparse.SUPPRESS, help=text)
        else:
            parser.add_argument(flag, default=argparse.SUPPRESS, help=text)


def parse_settings(parser: argparse.ArgumentParser, options: dict) -> Settings:
    """Return the settings of parsed flags, or end the program with the parser's usage error."""
    try:
        settings = Settings(**options)
        settings.check_paths()
        settings.token()
        return settings
    except ValidationError as error:
        problem = "; ".join(
            # Options that do not go together have no place, and say themselves what they are.
            f"{'.'.join(map(str, one['loc']))}: {one['msg']}. Got {one['input']!r}."
            if one["loc"]
            else one["msg"].removeprefix("Value error, ")
            for one in error.errors()
        )
    except ValueError as error:
        problem = str(error)
    # Not `parser.error`: forty flags would stand above the one sentence.
    parser.exit(EXIT_USAGE, f"{parser.prog}: error: {problem}\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Serve until SIGTERM or SIGINT. Returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m reward_server", description=__doc__)
    add_flags(parser)
    settings = parse_settings(parser, vars(parser.parse_args(argv)))
    log_to_stderr(settings)
    try:
        sock = bind(settings.host, settings.port)
    except OSError as error:
        taken = error.errno == errno.EADDRINUSE
        log.error("%s:%d cannot be bound: %s", settings.host, settings.port, error.strerror)
        return EXIT_PORT_TAKEN if taken else EXIT_USAGE
    return serve(settings, sock)


def log_to_stderr(settings: Settings) -> None:
    """Log what `--log-level` lets through; other libraries' debugging stays out."""
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s"
    )
    logging.getLogger().setLevel(
        max(logging.INFO, logging.getLevelName(settings.log_level.upper()))
    )
    logging.getLogger("reward_server").setLevel(settings.log_level.upper())


def bind(host: str, port: int) -> socket.socket:
    """A bound TCP socket. Raises OSError; EADDRINUSE when somebody listens there."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # Named as TCP: asyncio switches Nagle's delay (40 ms an answer) off only on such sockets.
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        sock.bind((host, port))
    except OSError:
        sock.close()
        raise
    return sock


def serve(settings: Settings, sock: socket.socket) -> int:
    """Run uvicorn on a bound socket until told to stop."""
    import uvicorn  # the launcher imports this file and must stay light

    from reward_server.scorers.load import load_scorers
    from reward_server.service.app import create_app

    status = 0

    def scorers_failed() -> None:
        nonlocal status
        status = EXIT_SCORERS_FAILED
        server.should_exit = True
        _insist(status)

    app = create_app(settings, lambda: load_scorers(settings), scorers_failed)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        timeout_keep_alive=75,  # longer than clients pause between batches
        timeout_graceful_shutdown=_UNDER_WAY_S,
        backlog=2048,
    )

    class Server(uvicorn.Server):
        """One that says so at once when it is to stop, and ends whatever hangs."""

        def handle_exit(self, sig, frame) -> None:
            if not self.should_exit:
                log.info("stopping: requests under way have %d s", _UNDER_WAY_S)
                app.state.service.stop()
                _insist(status)
            super().handle_exit(sig, frame)

    server = Server(config)
    if settings.parent_pid is not None:
        stop_with(settings.parent_pid)
    log.info("serving on http://%s:%d", settings.host, settings.port)
    server.run(sockets=[sock])
    return status


def _insist(status: int) -> None:
    """End this process after a while, whatever hangs.

    That may be a thread in a kernel that never returns.
    """

    def end() -> None:
        time.sleep(_GRACE_S)
        os._exit(status)

    threading.Thread(target=end, name="insist", daemon=True).start()


def stop_with(parent_pid: int) -> None:
    """End this process when its parent is gone.

    By asking who the parent is, not by PR_SET_PDEATHSIG: that signal comes when the *thread* which
    started the process ends, and orchestrators start tasks in short-lived threads.
    """

    def watch() -> None:
        while os.getppid() == parent_pid:
            time.sleep(0.25)
        log.warning("process %d is gone, stopping", parent_pid)
        os.kill(os.getpid(), signal.SIGTERM)
        _insist(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()


if __name__ == "__main__":
    sys.exit(main())
