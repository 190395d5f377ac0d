"""Whom the page answers: only requests to a name that it knows, so that no other site reads it.

A page on the internet can point a name of its own at 127.0.0.1 (DNS rebinding); the browser then
sends that name as `Host:`. Addresses in numbers cannot be pointed anywhere, and are let through.
"""

import ipaddress
import socket
from collections.abc import Collection
from typing import Any
from urllib.parse import urlsplit


def names_of(host: str) -> set[str]:
    """Return the names by which a page that listens on `host` may be called."""
    return {name.lower() for name in (host, "localhost", socket.gethostname(), socket.getfqdn())}


def is_known(host_header: str, names: Collection[str]) -> bool:
    """Return whether `Host:` is a numeric address or one of `names`, with any port."""
    try:
        name = urlsplit(f"//{host_header}").hostname or ""
    except ValueError:
        return False
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return name in names
    return True


def is_loopback(host: str) -> bool:
    """Return whether only this machine reaches a server that listens on `host`."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class KnownHosts:
    """ASGI middleware: a request with an unknown `Host:` gets status 421 and a sentence."""

    def __init__(self, app: Any, names: Collection[str]) -> None:
        self.app, self.names = app, names

    async def __call__(self, scope: dict, receive: Any, send: Any) -> None:
        headers = dict(scope.get("headers", ()))
        host = headers.get(b"host", b"").decode("latin-1")
        if scope["type"] not in ("http", "websocket") or is_known(host, self.names):
            return await self.app(scope, receive, send)
        if scope["type"] == "websocket":
            return await send({"type": "websocket.close", "code": 1008})
        known = ", ".join(sorted(self.names))
        body = f"The host must be an address in numbers or one of {known}. Got {host!r}.\n".encode()
        plain = [(b"content-type", b"text/plain; charset=utf-8")]
        await send({"type": "http.response.start", "status": 421, "headers": plain})
        await send({"type": "http.response.body", "body": body})
