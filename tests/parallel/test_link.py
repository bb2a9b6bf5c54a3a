"""Messages between processes of one machine: real sockets and shared memory, in this process and between two."""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections import deque

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from longvid.parallel.link import Arena, Link, Meeting

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux alone has nameless sockets and memory")
PATIENCE = 60.0
HEADER = bytes(range(64))


def linked(arena_bytes: int = 1 << 16) -> tuple[Link, Link]:
    one, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    return Link(one, arena_bytes), Link(other, arena_bytes)


def taken(link: Link, number: int, size: int) -> bytes:
    out = np.zeros(size, np.uint8)
    assert link.wait(number, PATIENCE).size == size
    link.take(number, out)
    return out.tobytes()


def content(number: int, size: int) -> np.ndarray:
    return np.full(size, number % 251, np.uint8)


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 700)), max_size=60), st.integers(64, 2048))
def test_places_never_overlap_and_room_comes_back(moves: list[tuple[bool, int]], size: int) -> None:
    arena, live, number = Arena(size), dict[int, range](), 0
    order: deque[int] = deque()
    for is_free, count in moves:
        if is_free and order:
            arena.free(gone := order.popleft())
            del live[gone]
            continue
        number += 1
        start = arena.place(number, count)
        if start is None:
            assert live or count > size - size % 64, "an empty arena has room for all that fits"
            continue
        place = range(start, start + count)
        assert place.stop <= size
        assert all(place.stop <= other.start or other.stop <= start for other in live.values())
        live[number] = place
        order.append(number)


@given(st.lists(st.integers(0, 5000), max_size=30), st.randoms())
def test_messages_arrive_as_they_were_given_in_any_order_of_taking(sizes: list[int], random: object) -> None:
    here, there = linked()
    for number, size in enumerate(sizes, 1):
        assert here.send(HEADER, content(number, size), 0, PATIENCE) or size
    order = list(range(1, len(sizes) + 1))
    random.shuffle(order)  # type: ignore[attr-defined]
    for number in order:
        arrival = there.wait(number, PATIENCE)
        assert arrival.header == HEADER
        if arrival.size >= 0:
            assert taken(there, number, sizes[number - 1]) == content(number, sizes[number - 1]).tobytes()


def test_what_finds_no_room_goes_elsewhere_and_later_ones_find_it_again() -> None:
    here, there = linked(4096)
    assert here.send(HEADER, content(1, 3000), 0, PATIENCE)
    assert not here.send(HEADER, content(2, 3000), 0, PATIENCE)
    assert not here.send(HEADER, content(3, 5000), 0, PATIENCE)
    assert taken(there, 1, 3000) == content(1, 3000).tobytes()
    assert [there.wait(number, PATIENCE).size for number in (2, 3)] == [-1, -1]
    assert here.send(HEADER, content(4, 3000), 0, PATIENCE)
    assert taken(there, 4, 3000) == content(4, 3000).tobytes()


def test_a_limit_holds_the_sender_until_messages_are_taken() -> None:
    here, there = linked()
    for number in (1, 2):
        here.send(HEADER, content(number, 8), 2, PATIENCE)
    with pytest.raises(TimeoutError):
        here.send(HEADER, content(3, 8), 2, 0.05)
    taker = threading.Timer(0.1, lambda: taken(there, 1, 8))
    taker.start()
    here.send(HEADER, content(3, 8), 2, PATIENCE)
    taker.join()
    assert taken(there, 3, 8) == content(3, 8).tobytes()


def test_many_packets_both_ways_at_once_hold_up_nobody() -> None:
    here, there = linked()
    count = 3000

    def talk(link: Link) -> None:
        for _ in range(count):
            link.send(HEADER, content(0, 0), 0, PATIENCE)
        for number in range(1, count + 1):
            link.wait(number, PATIENCE)
            link.take(number, np.empty(0, np.uint8))
        link.flush(PATIENCE)

    threads = [threading.Thread(target=talk, args=(link,)) for link in (here, there)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE)
        assert not thread.is_alive()


def test_a_message_of_a_process_that_ended_is_still_there() -> None:
    here, there = linked()
    here.send(HEADER, content(1, 100), 0, PATIENCE)
    there.send(HEADER, content(1, 100), 0, PATIENCE)  # which nobody reads
    del here
    assert taken(there, 1, 100) == content(1, 100).tobytes()
    with pytest.raises(ConnectionError):
        there.wait(2, PATIENCE)
    with pytest.raises(ConnectionError):
        there.send(HEADER, content(2, 8), 0, PATIENCE)


def test_abort_ends_a_wait_of_another_thread() -> None:
    _here, there = linked()
    failure = RuntimeError("rank 1 was killed")
    threading.Timer(0.05, there.abort, (failure,)).start()
    with pytest.raises(RuntimeError, match="rank 1 was killed"):
        there.wait(1, PATIENCE)
    with pytest.raises(RuntimeError, match="rank 1 was killed"):
        there.wait(1, PATIENCE)


def test_processes_of_a_machine_meet_and_a_killed_one_is_noticed() -> None:
    meetings = [Meeting() for _ in range(3)]
    addresses = [meeting.address for meeting in meetings]
    stranger = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stranger.connect(addresses[0].name)
    stranger.send(b"who are you?")
    child = os.fork()
    if not child:
        links = meetings[2].connect(addresses, 2, PATIENCE)
        links[0].send(HEADER, content(7, 100_000), 0, PATIENCE)
        links[0].wait(1, PATIENCE)
        os.kill(os.getpid(), 9)
    found: list[dict[int, Link]] = []
    second = threading.Thread(target=lambda: found.append(meetings[1].connect(addresses, 1, PATIENCE)))
    second.start()
    links = meetings[0].connect(addresses, 0, PATIENCE)
    second.join(PATIENCE)
    assert set(links) == {1, 2} and set(found[0]) == {0, 2}
    assert taken(links[2], 1, 100_000) == content(7, 100_000).tobytes()
    links[2].send(HEADER, content(1, 1), 0, PATIENCE)
    with pytest.raises(ConnectionError):
        links[2].wait(2, PATIENCE)
    assert os.waitpid(child, 0)[1] == 9


def test_ranks_of_other_machines_get_no_link() -> None:
    meetings = [Meeting() for _ in range(2)]
    here, there = (meeting.address for meeting in meetings)
    assert meetings[0].connect([here, None], 0, PATIENCE) == {}
    elsewhere = type(there)("another machine", there.name, there.password)
    assert meetings[1].connect([elsewhere, there], 1, PATIENCE) == {}
