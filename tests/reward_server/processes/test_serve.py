"""The socket that a server process listens on."""


def test_accepted_connections_answer_without_nagles_delay():
    import socket

    from reward_server.processes.serve import bind

    with bind("127.0.0.1", 0) as sock:
        assert sock.proto == socket.IPPROTO_TCP
