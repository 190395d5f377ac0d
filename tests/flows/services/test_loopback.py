"""A proxy in the environment does not stand between a run and the servers of its own machine."""

import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import httpx
import pytest
import requests

from flows.services.loopback import ask_this_machine_directly

NOBODY = "http://127.0.0.1:9"


class Hello(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass


@pytest.fixture
def url():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hello)
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def no_proxies(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        for spelling in (name, name.upper()):
            # Set first: what the test leaves there is taken away again.
            monkeypatch.setenv(spelling, "")
            monkeypatch.delenv(spelling)


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "ALL_PROXY"])
@pytest.mark.parametrize("exempt", ["", "example.org, 127.0.0.1", "*"])
def test_every_client_reaches_this_machine(url, monkeypatch, variable, exempt):
    monkeypatch.setenv(variable, NOBODY)
    monkeypatch.setenv("no_proxy", exempt)
    ask_this_machine_directly()
    assert httpx.get(url).status_code == 200
    assert requests.get(url).status_code == 200
    with urllib.request.urlopen(url) as answer:
        assert answer.status == 200


def test_what_was_exempt_stays_exempt_and_the_rest_goes_to_the_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", NOBODY)
    monkeypatch.setenv("NO_PROXY", "example.org")
    for _ in range(2):
        ask_this_machine_directly()
    proxies = urllib.request.getproxies()
    assert proxies["no"] == "example.org,127.0.0.1,localhost,::1"
    assert proxies["http"] == NOBODY


def test_without_a_proxy_nothing_is_set(monkeypatch):
    ask_this_machine_directly()
    assert urllib.request.getproxies() == {}
