"""Servers of this machine are asked directly, whatever proxy the environment names."""

import ipaddress
import os
import urllib.error
import urllib.request
from urllib.parse import urlsplit

HOSTS = ("127.0.0.1", "localhost", "::1")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_AS_CONFIGURED = urllib.request.build_opener()


def ask_this_machine_directly() -> None:
    """Name this machine's addresses in `no_proxy`, for this process and those that it starts.

    Every client obeys that variable: urllib, httpx (Prefect, Gradio), requests, websockets.
    """
    proxies = urllib.request.getproxies()
    exempt = [host.strip() for host in proxies.get("no", "").split(",") if host.strip()]
    if not proxies or "*" in exempt:
        return
    exempt += [host for host in HOSTS if host not in exempt]
    # Some clients read the one spelling, some the other.
    os.environ["no_proxy"] = os.environ["NO_PROXY"] = ",".join(exempt)


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


def _is_local(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name
        return host == "localhost"
