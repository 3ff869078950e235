"""A proxy to a server on loopback that breaks connections on purpose, to test the real client library.

with broken_wire(server.endpoint) as wire:
    remote = server.open(...)     # with wire.endpoint in place of the server's
    wire.swallow(1)               # the next request arrives, and its response is lost
    wire.cut(after=1000)          # the next response ends after so many bytes
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from urllib.parse import urlsplit

_BLOCK = 1 << 16


class Wire:
    """Each connection has a thread per direction. Faults apply to the next responses, in order."""

    def __init__(self, endpoint: str) -> None:
        parts = urlsplit(endpoint)
        self._target = (parts.hostname or "", parts.port or 80)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._faults: list[int] = []  # bytes of a response that are passed on
        self._lock = threading.Lock()
        self.struck = 0
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def swallow(self, count: int = 1) -> None:
        """The next ``count`` requests reach the server, and the connection breaks before their responses."""
        self._faults += [0] * count

    def cut(self, after: int, count: int = 1) -> None:
        """The next ``count`` responses end after so many bytes, including headers."""
        self._faults += [after] * count

    def run(self) -> None:
        """Accept connections until the listener is closed."""
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            server = socket.create_connection(self._target)
            for work in (self._forward, self._answer):
                threading.Thread(target=work, args=(client, server), daemon=True).start()

    def close(self) -> None:
        """Accept no more connections."""
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while block := client.recv(_BLOCK):
                server.sendall(block)
        _end(client, server)

    def _answer(self, client: socket.socket, server: socket.socket) -> None:
        """Pass responses on; if a fault applies, close the connection after the bytes that are allowed."""
        with contextlib.suppress(OSError):
            left: int | None = None
            while block := server.recv(_BLOCK):
                if left is None:
                    with self._lock:
                        left = self._faults.pop(0) if self._faults else None
                        self.struck += left is not None
                if left is None:
                    client.sendall(block)
                    continue
                client.sendall(block[:left])
                left -= len(block)
                if left <= 0:
                    break
        _end(client, server)


@contextlib.contextmanager
def broken_wire(endpoint: str) -> Iterator[Wire]:
    """A wire to ``endpoint`` (http://host:port) that breaks on demand."""
    wire = Wire(endpoint)
    thread = threading.Thread(target=wire.run, daemon=True)
    thread.start()
    try:
        yield wire
    finally:
        wire.close()
        thread.join(timeout=5)


def _end(*sockets: socket.socket) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
