"""The worker's end of the socket: blocking, one thread, no polling."""

from __future__ import annotations

import socket

from lmserve.engine.messages import (
    HEADER,
    FromWorker,
    ToWorker,
    body_length,
    decode_to_worker,
    encode,
)


class ConnectionClosed(Exception):
    """The API process is gone."""


class WorkerConnection:
    """Frames on a stream socket. Owns the bytes that have come and are not a whole frame yet."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._buffer = bytearray()

    def send(self, message: FromWorker) -> None:
        """Raises ConnectionClosed if nobody can hear."""
        try:
            self._socket.sendall(encode(message))
        except OSError as error:
            raise ConnectionClosed from error

    def receive(self) -> ToWorker:
        """The next message, waiting for it as long as it takes."""
        while (message := self._take()) is None:
            self._fill(0)
        return message

    def has_waiting(self) -> bool:
        """Whether ``receive`` has something to say at once, be it that the API process is gone."""
        try:
            return bool(self._buffer) or self._socket.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) is not None
        except BlockingIOError:
            return False
        except OSError:
            return True

    def receive_waiting(self) -> list[ToWorker]:
        """The messages that have come already, without waiting for more."""
        while self._fill(socket.MSG_DONTWAIT):
            pass
        messages = []
        while (message := self._take()) is not None:
            messages.append(message)
        return messages

    def _fill(self, flags: int) -> bool:
        """Reads once; False if there was nothing to read."""
        try:
            piece = self._socket.recv(1 << 18, flags)
        except BlockingIOError:
            return False
        except OSError as error:
            raise ConnectionClosed from error
        if not piece:
            raise ConnectionClosed
        self._buffer += piece
        return True

    def _take(self) -> ToWorker | None:
        if len(self._buffer) < HEADER.size:
            return None
        end = HEADER.size + body_length(bytes(self._buffer[: HEADER.size]))
        if len(self._buffer) < end:
            return None
        message: ToWorker = decode_to_worker(memoryview(self._buffer)[HEADER.size : end])
        del self._buffer[:end]
        return message
