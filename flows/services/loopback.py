"""Servers of this machine are asked directly, whatever proxy the environment names."""

import os
import urllib.request

HOSTS = ("127.0.0.1", "localhost", "::1")


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
