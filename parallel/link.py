"""Messages between two processes of one machine: what they say in packets on a socket, tensors in memory they share.

Each process writes tensors to an *arena* of its own, which the other can see, and tells by a packet where one lies. The
other copies it out when it wants it, and says so; then the place is free again. Nobody waits for a message to be given
on its way, there are no threads, and a process that dies closes its socket, which the other sees at once. Sockets and
memory have no names in any file system, so nothing is left behind.

A tensor for which the arena has no room goes another way, and its packet says so.
"""

from __future__ import annotations

import mmap
import os
import select
import socket
import struct
import time
import weakref
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from longvid.errors import RuntimeFailure

Bytes = npt.NDArray[np.uint8]
ARENA_BYTES = 64 << 20
"""Of memory that messages may lie in; pages count once they were written to."""
_LINE = 64
_PACKET = struct.Struct("=qqq")
_MESSAGE, _ELSEWHERE, _ARENA, _TAKEN = range(4)
"""What a packet says: a message's number, place and size; that it goes another way; that memory comes along with it;
that a message was taken.
"""
_PACKET_BYTES = 4096


@dataclass(frozen=True)
class Arrival:
    """A message that is there: its header and where its tensor lies; `size` -1: it goes another way."""

    header: bytes
    start: int
    size: int


class Arena:
    """Places for messages, first come, first freed, in a ring that begins anew whenever it is empty."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._used: deque[tuple[int, int, int]] = deque()
        """(number, start, stop) of messages that lie here."""
        self._freed: set[int] = set()

    def place(self, number: int, size: int) -> int | None:
        """Where so many bytes go; None: there is no room."""
        room = -(-size // _LINE) * _LINE
        start = self._used[-1][2] if self._used else 0
        first = self._used[0][1] if self._used else self.size
        if start <= first and self._used:  # the ring went around
            fits = start + room <= first
        elif start + room > self.size:
            fits, start = bool(self._used) and room <= first, 0
        else:
            fits = True
        if not fits:
            return None
        self._used.append((number, start, start + room))
        return start

    def free(self, number: int) -> None:
        """A message was taken."""
        self._freed.add(number)
        while self._used and self._used[0][0] in self._freed:
            self._freed.remove(self._used.popleft()[0])


class Link:
    """One process's end, over a connected socket of packets. For one thread, but for `abort`."""

    def __init__(self, connected: socket.socket, arena_bytes: int = ARENA_BYTES) -> None:
        connected.setblocking(False)
        self._socket = connected
        self._woken, self._wake = os.pipe()
        for end in (self._woken, self._wake):
            weakref.finalize(self, os.close, end)
        weakref.finalize(self, connected.close)
        self._poll = select.poll()
        self._poll.register(self._woken, select.POLLIN)
        self._poll.register(connected, select.POLLIN)
        self._arena = Arena(arena_bytes)
        self._own: Bytes | None = None
        self._other: Bytes | None = None
        self._messages: deque[tuple[bytes, int | None]] = deque()
        self._taken: deque[int] = deque()
        """Packets, and numbers of messages taken here, for which the socket had no room yet."""
        self._sent = 0
        self._arrived: dict[int, Arrival] = {}
        self._num_arrived = 0
        self._counted: set[int] = set()
        """Messages with a limit that are not taken yet."""
        self._is_closed = False
        self._failure: Exception | None = None

    def abort(self, failure: Exception) -> None:
        """From any thread: every wait, now and later, raises this."""
        self._failure = failure
        os.write(self._wake, b"!")

    def send(self, header: bytes, payload: Bytes, limit: int, timeout: float) -> bool:
        """Give a message on its way; False: the other end is told that its tensor goes another way.

        With a limit, waits until fewer such messages than that are not taken yet. Raises TimeoutError after `timeout`
        seconds of waiting, ConnectionError where the other end is gone.
        """
        self._look(0)
        deadline = time.monotonic() + timeout
        while limit and len(self._counted) >= limit:
            self._wait(deadline)
        self._sent += 1
        if limit:
            self._counted.add(self._sent)
        size = payload.size
        place = self._arena.place(self._sent, size) if size else 0
        if place is None:
            self._give(_PACKET.pack(_ELSEWHERE, 0, -1) + header)
            return False
        if size:
            self._memory()[place : place + size] = payload
        self._give(_PACKET.pack(_MESSAGE, place, size) + header)
        return True

    def wait(self, number: int, timeout: float) -> Arrival:
        """Message `number` (the first is 1), when it is there. Raises as `send` does."""
        deadline = time.monotonic() + timeout
        while number not in self._arrived:
            self._wait(deadline)
        return self._arrived[number]

    def take(self, number: int, out: Bytes) -> None:
        """Copy the tensor of a message that is there to `out`, and free its place."""
        arrival = self._arrived.pop(number)
        if arrival.size > 0:
            assert self._other is not None, "memory comes before what lies in it"
            out[:] = self._other[arrival.start : arrival.start + arrival.size]
        self._taken.append(number)
        self._push()

    def flush(self, timeout: float) -> None:
        """Wait until every message has left. Raises as `send` does."""
        deadline = time.monotonic() + timeout
        while self._messages:
            self._wait(deadline)

    def _memory(self) -> Bytes:
        """The memory of the own arena, which the other end gets when it is first needed."""
        if self._own is None:
            file = os.memfd_create("longvid-link", os.MFD_CLOEXEC)
            os.ftruncate(file, self._arena.size)
            self._own = np.frombuffer(mmap.mmap(file, self._arena.size), np.uint8)
            self._give(_PACKET.pack(_ARENA, 0, self._arena.size), file)
        return self._own

    def _give(self, packet: bytes, file: int | None = None) -> None:
        """Put a packet on its way, if need be later: the other end may have much to read, and wait for this one."""
        self._messages.append((packet, file))
        self._push()

    def _push(self) -> None:
        """Hand to the socket what waits for room in it: messages, then what says that others were taken."""
        try:
            while self._messages:
                packet, file = self._messages[0]
                files = [] if file is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack("i", file))]
                self._socket.sendmsg([packet], files)
                self._messages.popleft()
                if file is not None:
                    os.close(file)
            while self._taken:
                self._socket.send(_PACKET.pack(_TAKEN, self._taken[0], 0))
                self._taken.popleft()
        except BlockingIOError:
            pass
        except ConnectionError:
            if self._messages:
                raise
            self._taken.clear()  # it has ended, and needs its memory no more

    def _wait(self, deadline: float) -> None:
        """Until something comes, or there is room for what waits for it."""
        if self._is_closed:
            raise ConnectionResetError("the other end is closed")
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError
        self._look(left)

    def _look(self, timeout: float) -> None:
        """Read what is there, and wait for it if nothing is."""
        if self._failure:
            raise self._failure
        self._push()
        if not self._read() and timeout:
            waits = select.POLLOUT if self._messages or self._taken else 0
            self._poll.modify(self._socket, select.POLLIN | waits)
            self._poll.poll(timeout * 1000)
            if self._failure:
                raise self._failure
            self._push()
            self._read()

    def _read(self) -> bool:
        """Whether something was there."""
        num_read = 0
        while not self._is_closed:
            try:
                packet, files, _, _ = socket.recv_fds(self._socket, _PACKET_BYTES, 1)
            except BlockingIOError:
                break
            except ConnectionError:
                continue  # it was closed with packets unread; what it gave before is still here
            num_read += 1
            if not packet:
                self._is_closed = True
                break
            self._see(packet, files)
        return num_read > 0

    def _see(self, packet: bytes, files: list[int]) -> None:
        kind, place, size = _PACKET.unpack_from(packet)
        if kind == _TAKEN:
            self._arena.free(place)
            self._counted.discard(place)
        elif kind == _ARENA:
            if not files:
                raise RuntimeFailure("this process has too many open files for memory shared with another rank")
            self._other = np.frombuffer(mmap.mmap(files[0], size, prot=mmap.PROT_READ), np.uint8)
            os.close(files[0])
        else:
            self._num_arrived += 1
            self._arrived[self._num_arrived] = Arrival(packet[_PACKET.size :], place, size)


# ------------------------------------------------------------------------------------------------------------- meeting


@dataclass(frozen=True)
class Address:
    """Where a process waits for others: `machine` is equal for those that can share sockets and memory."""

    machine: str
    name: bytes
    password: bytes
    """Whoever knows it is one of them: any process of the machine may call."""


class Meeting:
    """Where the processes of a machine connect, each with each: all make one, tell each other `address`, `connect`.

    Raises OSError where the system has no such sockets.
    """

    def __init__(self) -> None:
        with open("/proc/sys/kernel/random/boot_id") as file:
            machine = f"{file.read().strip()} {os.readlink('/proc/self/ns/net')} {os.getuid()}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind("")  # the kernel gives a name that is in no file system
        self._listener.listen(1024)
        self.address = Address(machine, self._listener.getsockname(), os.urandom(16))

    def connect(self, addresses: Sequence[Address | None], rank: int, timeout: float) -> dict[int, Link]:
        """Links to the other ranks of this machine, by rank; `addresses` are those of all ranks.

        Raises OSError where one does not come in `timeout` seconds.
        """
        near = [other for other, address in enumerate(addresses) if address and address.machine == self.address.machine]
        links: dict[int, Link] = {}
        for other in (peer for peer in near if peer < rank):
            address = addresses[other]
            assert address
            caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            caller.settimeout(timeout)
            caller.connect(address.name)
            caller.send(address.password + rank.to_bytes(8, "little"))
            links[other] = Link(caller)
        self._listener.settimeout(timeout)
        missing = {peer for peer in near if peer > rank}
        while missing:
            called, _ = self._listener.accept()
            called.settimeout(timeout)
            greeting = called.recv(_PACKET_BYTES)
            caller_rank = int.from_bytes(greeting[len(self.address.password) :], "little")
            if greeting.startswith(self.address.password) and caller_rank in missing:
                missing.remove(caller_rank)
                links[caller_rank] = Link(called)
            else:
                called.close()
        self._listener.close()
        return links
