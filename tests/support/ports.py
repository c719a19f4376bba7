"""Ports for tests with several processes."""

import socket


def free_port() -> int:
  """Return a port of the loopback interface that no process listens on."""
  with socket.socket() as server:
    server.bind(("127.0.0.1", 0))
    return int(server.getsockname()[1])
