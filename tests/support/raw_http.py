"""A client that sends bytes as they are, to say to a server what real clients do not."""

import socket

from serve_fakes import DEADLINE


def head_of(path, length, *more, method="POST"):
    """The head of a request with JSON of `length` bytes."""
    lines = [
        f"{method} {path} HTTP/1.1",
        "Host: x",
        "Content-Type: application/json",
        f"Content-Length: {length}",
        *more,
    ]
    return ("\r\n".join(lines) + "\r\n\r\n").encode()


class RawClient:
    """A connection to a server thread."""

    def __init__(self, server):
        self._socket = socket.create_connection(server.listener.getsockname(), DEADLINE)
        self._file = self._socket.makefile("rb")

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self._file.close()
        self._socket.close()

    def send(self, data):
        self._socket.sendall(data)

    def reply(self):
        """Status, headers by lower-case names, and body of the next reply."""
        status = int(self._file.readline().split()[1])
        headers = {}
        while line := self._file.readline().strip():
            name, _, value = line.decode().partition(":")
            headers[name.lower()] = value.strip()
        return status, headers, self._file.read(int(headers.get("content-length", 0)))

    def is_closed(self):
        """Waits for the server to close, and returns whether nothing else came before."""
        try:
            return self._file.read(1) == b""
        except ConnectionResetError:
            return True
