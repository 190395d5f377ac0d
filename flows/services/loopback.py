"""Requests to this machine go to this machine, whatever proxy the environment names."""

import contextlib
import ipaddress
import os
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from urllib.parse import urlsplit

_LOCAL = ("127.0.0.1", "localhost", "::1")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_AS_CONFIGURED = urllib.request.build_opener()


def answers(url: str, timeout_s: float = 5.0) -> bool:
    """Return whether an HTTP server answers at `url`, be it with an error."""
    opener = _DIRECT if _is_local(urlsplit(url).hostname or "") else _AS_CONFIGURED
    try:
        with opener.open(url, timeout=timeout_s):
            return True
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False


def no_proxy(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that keep requests to this machine away from a proxy.

    Prefect's and MLflow's clients go by them; what `environment` excludes stays excluded.
    """
    hosts = environment.get("no_proxy") or environment.get("NO_PROXY") or ""
    listed = [host.strip() for host in hosts.split(",") if host.strip()]
    if "*" in listed:
        return {}
    hosts = ",".join([*listed, *(host for host in _LOCAL if host not in listed)])
    return {"no_proxy": hosts, "NO_PROXY": hosts}


@contextlib.contextmanager
def proxy_spares_this_machine() -> Iterator[None]:
    """Have this process, and those that it starts, ask this machine without a proxy."""
    added = no_proxy(os.environ)
    before = {name: os.environ.get(name) for name in added}
    os.environ.update(added)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
