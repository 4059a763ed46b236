from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from lmserve.engine.connection import ConnectionClosed, WorkerConnection
from lmserve.engine.messages import Cancel, Hello, Shutdown, ToWorker, body_length, decode_from_worker, encode


@pytest.fixture
def ends() -> Iterator[tuple[socket.socket, WorkerConnection]]:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, WorkerConnection(theirs)


def test_messages_cut_anywhere_arrive_whole_and_in_order(ends: tuple[socket.socket, WorkerConnection]) -> None:
    peer, connection = ends
    sent: list[ToWorker] = [Cancel("a" * 300), Cancel("b", 1), Shutdown()]
    frames = b"".join(encode(message) for message in sent)

    def drip() -> None:
        for i in range(0, len(frames), 7):
            peer.sendall(frames[i : i + 7])

    thread = threading.Thread(target=drip)
    thread.start()
    assert [connection.receive() for _ in sent] == sent
    thread.join()


def test_receive_waiting_takes_what_is_there_and_keeps_half_a_message(
    ends: tuple[socket.socket, WorkerConnection],
) -> None:
    peer, connection = ends
    assert connection.receive_waiting() == []
    half = encode(Cancel("c"))
    peer.sendall(encode(Cancel("a")) + encode(Cancel("b")) + half[:5])
    assert connection.receive_waiting() == [Cancel("a"), Cancel("b")]
    assert connection.receive_waiting() == []
    peer.sendall(half[5:])
    assert connection.receive() == Cancel("c")


def test_what_is_sent_can_be_read(ends: tuple[socket.socket, WorkerConnection]) -> None:
    peer, connection = ends
    connection.send(Hello(1, 42))
    length = body_length(peer.recv(4, socket.MSG_WAITALL))
    assert decode_from_worker(peer.recv(length, socket.MSG_WAITALL)) == Hello(1, 42)


def test_a_closed_peer_is_noticed_reading_and_writing(ends: tuple[socket.socket, WorkerConnection]) -> None:
    peer, connection = ends
    peer.close()
    with pytest.raises(ConnectionClosed):
        connection.receive()
    with pytest.raises(ConnectionClosed):
        connection.receive_waiting()
    with pytest.raises(ConnectionClosed):
        connection.send(Hello(1, 42))
