"""Messages between ranks, over torch.distributed or the memory that ranks of a machine share (`link.py`).

A message is a header of eight 64-bit numbers and a tensor. Its receiver knows the shape from the schedule, so there is
no handshake; of a *sized* message the header says how many rows the tensor has, if any. Everything is asynchronous: a
send returns at once, a receive is posted long before it is needed, and every handle is kept and waited for. Between two
ranks messages keep their order.
"""

from __future__ import annotations

import math
import queue
import struct
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from longvid.errors import RuntimeFailure
from longvid.parallel.collectives import first_line
from longvid.parallel.link import Address, Link, Meeting
from longvid.parallel.ways import Mark, Ways

_HEADER = struct.Struct("=8q")
HEADER_BYTES = _HEADER.size
_TAGS = 1 << 30


@dataclass(frozen=True)
class Header:
    """What every message says of itself. `save_at` is the boundary at which all ranks shall save; -1: none.

    At the boundary `prompt_at` all take a new prompt; less than 0: none.

    `is_left_out`: a gate decided that the unit's layers are not computed. `rows` of a sized message's tensor.
    """

    chunk: int
    step: int
    save_at: int = -1
    is_left_out: bool = False
    rows: int = 0
    prompt_at: int = -1

    def pack(self) -> Tensor:
        """As uint8 [64]."""
        return torch.frombuffer(bytearray(self.to_bytes()), dtype=torch.uint8)

    def to_bytes(self) -> bytes:
        numbers = self.chunk, self.step, self.save_at, self.is_left_out, self.rows, self.prompt_at
        return _HEADER.pack(*numbers, 0, 0)

    @classmethod
    def unpack(cls, data: Tensor) -> Header:
        return cls.from_bytes(data.numpy())

    @classmethod
    def from_bytes(cls, data: Any) -> Header:
        chunk, step, save_at, is_left_out, rows, prompt_at, *_ = _HEADER.unpack_from(data)
        return cls(chunk, step, save_at, bool(is_left_out), rows, prompt_at)


class Incoming(Protocol):
    """A receive that is posted."""

    def wait(self) -> tuple[Header, Tensor]:
        """The message. Raises RuntimeFailure when it cannot come any more."""
        ...


class Comm(Protocol):
    """One rank's way to the others."""

    @property
    def rank(self) -> int: ...

    def send(self, header: Header, payload: Tensor, to: int, *, window: int = 0, is_sized: bool = False) -> None:
        """Give a message on its way. With a window, waits until fewer than that many are under way to that rank."""
        ...

    def receive(
        self, source: int, shape: Sequence[int], dtype: torch.dtype, *, is_sized: bool = False, on_host: bool = False
    ) -> Incoming:
        """Post a receive for the next message of a rank. Of a sized one the first number of `shape` says nothing.

        With `on_host`, of a sized one that its sender gives from the host's memory, and that goes there.
        """
        ...

    def flush(self) -> None:
        """Wait until every message has left."""
        ...


class LoneComm:
    """That of a rank without others: no program of one rank sends or receives."""

    rank = 0

    def send(self, header: Header, payload: Tensor, to: int, *, window: int = 0, is_sized: bool = False) -> None:
        raise AssertionError("a lone rank has nobody to send to")

    def receive(
        self, source: int, shape: Sequence[int], dtype: torch.dtype, *, is_sized: bool = False, on_host: bool = False
    ) -> Incoming:
        raise AssertionError("a lone rank has nobody to receive from")

    def flush(self) -> None:
        """Nothing is under way."""


class DistComm:
    """Over torch.distributed, whose process group must exist: gloo for tensors on a CPU, NCCL on CUDA.

    On a CPU messages between ranks of one machine go through memory that they share (`longvid.parallel.link`), unless
    `shares_memory` is False. Between others header and tensor travel as one buffer, or one after the other
    where the message is sized. On CUDA the header goes through gloo ahead of the tensor (`Ways`), so that it can be
    read without waiting for the device, and what lies in the host's memory goes as on a CPU. `timeout` (seconds) bounds
    every wait. `name` says which rank is meant in errors.

    All ranks make one together. `pairs` are those (from, to) that exchange tensors on CUDA. `by_device` sends all
    tensors as those on CUDA go; None: those on CUDA alone.
    """

    def __init__(
        self,
        device: torch.device,
        timeout: float = 300.0,
        name: Callable[[int], str] = lambda rank: f"rank {rank}",
        *,
        shares_memory: bool = True,
        pairs: Sequence[tuple[int, int]] = (),
        by_device: bool | None = None,
    ) -> None:
        self.rank = dist.get_rank()
        by_device = device.type == "cuda" if by_device is None else by_device
        self._links = link_up(timeout) if not by_device and shares_memory else {}
        self._ways = Ways(device, timeout, pairs) if by_device else None
        self._device, self._timeout, self._name = device, timeout, name
        self._outgoing: dict[int, deque[_Handle]] = defaultdict(deque)
        self._sent: dict[int, int] = defaultdict(int)
        self._received: dict[int, int] = defaultdict(int)
        self._waiters: dict[tuple[str, int], _Waiter] = {}
        self._open: set[Future[None]] = set()
        self._lock = threading.Lock()
        self._failure: Exception | None = None

    def send(self, header: Header, payload: Tensor, to: int, *, window: int = 0, is_sized: bool = False) -> None:
        if to in self._links:
            self._send_near(replace(header, rows=len(payload)) if is_sized else header, payload, to, window)
            return
        under_way = self._outgoing[to]
        while under_way and (under_way[0].is_done() or (window and len(under_way) >= window)):
            self._wait(under_way.popleft(), f"{self._name(to)} did not take a message")
        tag = self._next_tag(self._sent, to)
        header = replace(header, rows=len(payload)) if is_sized else header
        if self._ways and (payload.device == self._device or not payload.numel()):
            under_way.append(self._send_by_device(self._ways, header, payload, to, tag))
            return
        if is_sized:
            under_way.append(self._send_sized(header, payload, to, tag))
            return
        assert not self._ways, f"a tensor on {payload.device} for a rank that expects it on {self._device}"
        buffer = torch.empty(HEADER_BYTES + payload.numel() * payload.element_size(), dtype=torch.uint8)
        buffer[:HEADER_BYTES] = header.pack()
        buffer[HEADER_BYTES:].view(payload.dtype).view(payload.shape).copy_(payload)
        under_way.append(self._handle("to", to, self._start(to, lambda: [dist.isend(buffer, to, tag=tag)]), (buffer,)))

    def _send_near(self, header: Header, payload: Tensor, to: int, window: int) -> None:
        """As many messages as the window may be under way, and as many wait there."""
        content, tag = as_bytes(payload), self._next_tag(self._sent, to)
        with self._through(f"{self._name(to)} did not take a message"):
            has_room = self._links[to].send(header.to_bytes(), content.numpy(), 2 * window, self._timeout)
        if not has_room:
            works = self._start(to, lambda: [dist.isend(content, to, tag=tag)])
            self._outgoing[to].append(self._handle("to", to, works, (content,)))

    @contextmanager
    def _through(self, complaint: str) -> Iterator[None]:
        """What a link raises, as what a rank raises."""
        try:
            yield
        except TimeoutError:
            raise RuntimeFailure(f"{complaint} for {self._timeout:g} s") from None
        except OSError as error:
            raise RuntimeFailure(f"{complaint}: the connection is gone ({first_line(error)})") from error

    @staticmethod
    def _next_tag(counts: dict[int, int], other: int) -> int:
        tag = counts[other] % _TAGS
        counts[other] += 1
        return tag

    def _send_sized(self, header: Header, payload: Tensor, to: int, tag: int) -> _Handle:
        packed, body = header.pack(), payload.contiguous()

        def begin() -> list[Any]:
            body_works = [dist.isend(body, to, tag=tag + _TAGS)] if header.rows else []
            return [dist.isend(packed, to, tag=tag), *body_works]

        return self._handle("to", to, self._start(to, begin), (packed, body))

    def _send_by_device(self, ways: Ways, header: Header, payload: Tensor, to: int, tag: int) -> _Handle:
        """Header and tensor leave when the device has made the tensor."""
        packed, body = header.pack(), payload.contiguous()

        def begin() -> list[Any]:
            said = dist.isend(packed, to, tag=tag)
            return [said, ways.send(body, to)] if body.numel() else [said]

        return self._handle("to", to, [ways.mark()], (packed, body), then=begin)

    def receive(
        self, source: int, shape: Sequence[int], dtype: torch.dtype, *, is_sized: bool = False, on_host: bool = False
    ) -> Incoming:
        if source in self._links:
            number = self._received[source] = self._received[source] + 1
            return _Near(self, number, source, tuple(shape), dtype, is_sized)
        tag = self._next_tag(self._received, source)
        if self._ways and not on_host:
            return self._receive_after_header(_OnDevice(self, source, tag, tuple(shape), dtype, is_sized))
        if is_sized:
            return self._receive_after_header(_Sized(self, source, tag, tuple(shape), dtype, is_sized))
        size = math.prod(shape) * dtype.itemsize
        buffer = torch.empty(HEADER_BYTES + size, dtype=torch.uint8)
        packed, body = buffer[:HEADER_BYTES], buffer[HEADER_BYTES:].view(dtype).view(tuple(shape))
        handle = self._handle(
            "from", source, self._start(source, lambda: [dist.irecv(buffer, source, tag=tag)]), (buffer,)
        )
        return _Posted(self, handle, source, packed, body)

    def _receive_after_header(self, message: _Sized) -> Incoming:
        """The thread that waits for the header goes on with the body."""
        packed, source, tag = message.packed, message.source, message.tag
        works = self._start(source, lambda: [dist.irecv(packed, source, tag=tag)])
        message.handle = self._handle("from", source, works, (packed,), then=message.begin_body)
        return message

    def flush(self) -> None:
        for to, link in self._links.items():
            with self._through(f"{self._name(to)} did not take a message"):
                link.flush(self._timeout)
        for to, under_way in self._outgoing.items():
            while under_way:
                self._wait(under_way.popleft(), f"{self._name(to)} did not take a message")

    def abort(self, failure: Exception) -> None:
        """From any thread: every wait, now and later, raises this."""
        with self._lock:
            self._failure = failure
            waits = list(self._open)
        for link in self._links.values():
            link.abort(failure)
        for future in waits:
            _settle(future, failure)

    def _start(self, other: int, begin: Callable[[], list[Any]]) -> list[Any]:
        """Begin works with another rank. A dead one may be known at once."""
        try:
            return begin()
        except RuntimeError as error:
            raise RuntimeFailure(f"{self._name(other)}: the connection is gone ({first_line(error)})") from error

    def _handle(
        self,
        way: str,
        other: int,
        works: list[Any],
        keep: tuple[Tensor, ...],
        then: Callable[[], list[Any]] | None = None,
    ) -> _Handle:
        """Have works waited for by the thread of their channel, and those that come of them by `then`."""
        if (way, other) not in self._waiters:
            self._waiters[way, other] = _Waiter(f"{way} rank {other}")
        future: Future[None] = Future()
        with self._lock:
            self._open.add(future)
            if self._failure:
                _settle(future, self._failure)
        future.add_done_callback(self._close)
        self._waiters[way, other].put(works, future, then)
        return _Handle(future, keep)

    def _close(self, future: Future[None]) -> None:
        with self._lock:
            self._open.discard(future)

    def _wait(self, handle: _Handle, complaint: str) -> None:
        try:
            handle.future.result(self._timeout)
        except TimeoutError:
            raise RuntimeFailure(f"{complaint} for {self._timeout:g} s") from None
        except RuntimeFailure:
            raise
        except RuntimeError as error:  # what gloo and NCCL raise
            raise RuntimeFailure(f"{complaint}: the connection is gone ({first_line(error)})") from error


@dataclass(frozen=True)
class _Handle:
    """Something under way: its end, and the memory that must stay until then."""

    future: Future[None]
    keep: tuple[Tensor, ...]

    def is_done(self) -> bool:
        return self.future.done()


@dataclass(frozen=True)
class _Posted:
    comm: DistComm
    handle: _Handle
    source: int
    packed: Tensor
    body: Tensor

    def wait(self) -> tuple[Header, Tensor]:
        self.comm._wait(self.handle, f"{self.comm._name(self.source)} sent nothing")
        return Header.unpack(self.packed), self.body


@dataclass(frozen=True)
class _Near:
    """A message through shared memory, the `number`-th of its source."""

    comm: DistComm
    number: int
    source: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_sized: bool

    def wait(self) -> tuple[Header, Tensor]:
        comm, source, complaint = self.comm, self.source, f"{self.comm._name(self.source)} sent nothing"
        link, timeout = comm._links[source], comm._timeout
        with comm._through(complaint):
            arrival = link.wait(self.number, timeout)
        header = Header.from_bytes(arrival.header)
        shape = (header.rows, *self.shape[1:]) if self.is_sized else self.shape
        body = torch.empty(shape, dtype=self.dtype)
        content = as_bytes(body)
        with comm._through(complaint):
            link.take(self.number, content.numpy())
        if arrival.size < 0:
            tag = (self.number - 1) % _TAGS
            works = comm._start(source, lambda: [dist.irecv(content, source, tag=tag)])
            comm._wait(comm._handle("from", source, works, (content,)), complaint)
        return header, body


def as_bytes(x: Tensor) -> Tensor:
    """Its memory, uint8 [bytes]; a copy's, where it is not contiguous."""
    return x.contiguous().view(-1).view(torch.uint8)


@dataclass
class _Sized:
    """A receive whose header comes first, and says whether a body follows, and of how many rows."""

    comm: DistComm
    source: int
    tag: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    is_sized: bool
    packed: Tensor = field(default_factory=lambda: torch.empty(HEADER_BYTES, dtype=torch.uint8))
    handle: _Handle | None = None
    body: Tensor | None = None

    def begin_body(self) -> list[Any]:
        """Post the receive of the body, now that the header is here."""
        self.body = torch.empty(self.told_shape(), dtype=self.dtype)
        return [dist.irecv(self.body, self.source, tag=self.tag + _TAGS)] if self.body.numel() else []

    def told_shape(self) -> tuple[int, ...]:
        return (Header.unpack(self.packed).rows, *self.shape[1:]) if self.is_sized else self.shape

    def wait(self) -> tuple[Header, Tensor]:
        assert self.handle is not None
        self.comm._wait(self.handle, f"{self.comm._name(self.source)} sent nothing")
        assert self.body is not None
        return Header.unpack(self.packed), self.body


@dataclass
class _OnDevice(_Sized):
    """One whose body comes on a device. Whoever computes with it waits there."""

    arrived: Mark | None = None

    def begin_body(self) -> list[Any]:
        assert self.comm._ways
        self.body, self.arrived = self.comm._ways.receive(self.told_shape(), self.dtype, self.source)
        return []

    def wait(self) -> tuple[Header, Tensor]:
        header, body = super().wait()
        assert self.arrived
        self.arrived.before_use_of(body)
        return header, body


class _Waiter:
    """A thread that waits for the works of one channel, in their order.

    Waiting inside the library cannot be interrupted; waiting for this thread can, by Ctrl-C and by `abort`.
    """

    def __init__(self, name: str) -> None:
        self._queue: queue.SimpleQueue[tuple[list[Any], Future[None], Callable[[], list[Any]] | None]]
        self._queue = queue.SimpleQueue()
        threading.Thread(target=self._run, name=f"wait {name}", daemon=True).start()

    def put(self, works: list[Any], future: Future[None], then: Callable[[], list[Any]] | None = None) -> None:
        self._queue.put((works, future, then))

    def _run(self) -> None:
        while True:
            works, future, then = self._queue.get()
            try:
                for work in works:
                    work.wait()
                for work in then() if then else ():
                    work.wait()
            except Exception as error:
                _settle(future, error)
            else:
                _settle(future)


def _settle(future: Future[None], error: Exception | None = None) -> None:
    try:
        if error:
            future.set_exception(error)
        else:
            future.set_result(None)
    except InvalidStateError:
        """It was aborted, or came after all."""


def link_up(timeout: float) -> dict[int, Link]:
    """Links to the other ranks of this machine; all ranks call it together. None where the system has no such thing.

    Raises RuntimeFailure where a rank does not come.
    """
    try:
        meeting = Meeting()
    except OSError:
        meeting = None
    addresses: list[Address | None] = [None] * dist.get_world_size()
    dist.all_gather_object(addresses, meeting and meeting.address)
    if meeting is None:
        return {}
    try:
        return meeting.connect(addresses, dist.get_rank(), timeout)
    except OSError as error:
        raise RuntimeFailure(
            f"the ranks of this machine cannot share memory ({error}): set mesh.shares_memory=false"
        ) from error
