"""Names and addresses that the page answers to, and those it does not."""

import asyncio

import pytest

from flows.demo.hosts import KnownHosts, is_known, is_loopback, names_of


@pytest.mark.parametrize(
    ("header", "known"),
    [
        ("127.0.0.1:7860", True),
        ("[::1]:7860", True),
        ("192.168.7.12", True),
        ("LOCALHOST:7860", True),
        ("evil.example:7860", False),
        ("127.0.0.1.evil.example", False),
        ("evil.example@127.0.0.1.x", False),
        ("[::1", False),
        ("", False),
    ],
)
def test_addresses_in_numbers_and_own_names_are_known(header, known):
    assert is_known(header, names_of("127.0.0.1")) == known


def test_the_name_that_the_page_listens_on_is_known():
    assert is_known("box.lab:80", names_of("Box.lab"))


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("::1", True), ("localhost", True), ("0.0.0.0", False), ("box", False)],
)
def test_only_a_loopback_address_keeps_the_page_to_this_machine(host, loopback):
    assert is_loopback(host) == loopback


@pytest.mark.parametrize("kind", ["http", "websocket"])
def test_a_request_to_a_foreign_name_never_reaches_the_page(kind):
    sent, reached = [], []

    async def app(scope, receive, send):
        reached.append(scope["type"])

    async def send(message):
        sent.append(message)

    guarded = KnownHosts(app, {"localhost"})
    asyncio.run(guarded({"type": "lifespan"}, None, send))
    asyncio.run(guarded({"type": kind, "headers": [(b"host", b"localhost:1")]}, None, send))
    assert (reached, sent) == (["lifespan", kind], [])
    asyncio.run(guarded({"type": kind, "headers": [(b"host", b"evil.example")]}, None, send))
    assert len(reached) == 2
    assert sent[0].get("status", sent[0].get("code")) in (421, 1008)
    if kind == "http":
        assert b"one of localhost. Got 'evil.example'" in sent[1]["body"]
