"""The API of a run without a Prefect server: it needs nothing of the user's, and leaves nothing."""

import json
import os
import sqlite3
import urllib.request
from http.server import BaseHTTPRequestHandler, HTTPServer
from threading import Thread

import pytest

from flows.services import prefect_api as module
from flows.services.loopback import answers
from flows.services.prefect_api import prefect_api

DEAD_PROXY = "http://127.0.0.1:9"


@pytest.fixture
def no_server(monkeypatch, tmp_path):
    """Prefect is told of no server; temporary folders are made below `tmp_path`."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.delenv("PREFECT_API_URL", raising=False)
    return tmp_path


def use_dead_proxy(monkeypatch):
    monkeypatch.setenv("http_proxy", DEAD_PROXY)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")  # set first: what the test leaves there is taken away again
        monkeypatch.delenv(name)


def another_versions_database(home):
    home.mkdir()
    with sqlite3.connect(home / "prefect.db") as database:
        database.execute("CREATE TABLE alembic_version (version_num VARCHAR(32))")
        database.execute("INSERT INTO alembic_version VALUES ('no-such-revision')")


def a_file_in_its_place(home):
    home.write_text("")


@pytest.mark.slow
@pytest.mark.parametrize("spoil", [another_versions_database, a_file_in_its_place])
def test_the_users_prefect_home_is_not_used(no_server, monkeypatch, spoil):
    home = no_server / "home"
    spoil(home)
    monkeypatch.setenv("PREFECT_HOME", str(home))
    monkeypatch.setenv("PREFECT_API_DATABASE_CONNECTION_URL", f"sqlite:///{home}/prefect.db")
    use_dead_proxy(monkeypatch)
    with prefect_api() as url:
        request = urllib.request.Request(
            f"{url}/flows/filter", b"{}", {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            assert json.load(answer) == []
        assert list(no_server.glob("calligrapher-prefect-*/prefect.db"))
    assert not list(no_server.glob("calligrapher-prefect-*")), "its folder ends with it"


def test_no_setting_of_the_users_prefect_reaches_the_api(monkeypatch, tmp_path):
    before = os.getcwd()
    monkeypatch.setenv("PREFECT_SERVER_API_AUTH_STRING", "user:secret")
    monkeypatch.setattr(os, "environ", dict(os.environ))
    module._forget_settings(tmp_path)
    found = {name for name in os.environ if name.startswith("PREFECT_")}
    os.chdir(before)
    assert found == {
        "PREFECT_HOME",
        "PREFECT_SERVER_ANALYTICS_ENABLED",
        "PREFECT_SERVER_DATABASE_CONNECTION_URL",
    }


class Refuses(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_error(401)

    def log_message(self, *_):
        pass


def test_this_machine_is_asked_without_a_proxy(monkeypatch):
    use_dead_proxy(monkeypatch)
    with HTTPServer(("127.0.0.1", 0), Refuses) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/health"
        assert answers(url), "a refusal is an answer"
        server.shutdown()
    assert not answers(url, timeout_s=1)
