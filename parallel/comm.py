"""Messages and collectives between ranks: the only file that calls torch.distributed for them.

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
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longvid.errors import RuntimeFailure
from longvid.parallel.link import Address, Link, Meeting

_HEADER = struct.Struct("=8q")
HEADER_BYTES = _HEADER.size
_TAGS = 1 << 30
T = TypeVar("T")


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
    where the message is sized. On CUDA the header goes through gloo ahead of the tensor (`_Ways`), so that it can be
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
        self._ways = _Ways(device, timeout, pairs) if by_device else None
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
            raise RuntimeFailure(f"{complaint}: the connection is gone ({_first_line(error)})") from error

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

    def _send_by_device(self, ways: _Ways, header: Header, payload: Tensor, to: int, tag: int) -> _Handle:
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
            raise RuntimeFailure(f"{self._name(other)}: the connection is gone ({_first_line(error)})") from error

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
            raise RuntimeFailure(f"{complaint}: the connection is gone ({_first_line(error)})") from error


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

    arrived: _Mark | None = None

    def begin_body(self) -> list[Any]:
        assert self.comm._ways
        self.body, self.arrived = self.comm._ways.receive(self.told_shape(), self.dtype, self.source)
        return []

    def wait(self) -> tuple[Header, Tensor]:
        header, body = super().wait()
        assert self.arrived
        self.arrived.before_use_of(body)
        return header, body


@dataclass(frozen=True)
class _Mark:
    """A place in the work of a CUDA stream; `event` None: on a CPU, where all is done that was asked for."""

    event: Any = None

    def wait(self) -> None:
        """Until the device has come there."""
        if self.event is not None:
            self.event.synchronize()

    def before_use_of(self, tensor: Tensor) -> None:
        """What the caller asks of the device from here on waits for it there. The tensor is of that stream's memory."""
        if self.event is not None:
            stream = torch.cuda.current_stream(tensor.device)
            stream.wait_event(self.event)
            tensor.record_stream(stream)


class _Ways:
    """Tensors on a device on their way to and from other ranks, each way with a stream and a communicator of its own.

    A send of NCCL runs on the device until the receive does, and the other way round. Those of a pair of ranks share a
    stream, in which a receive that is posted ahead would hold up sends for ever. So each direction has a process group,
    and nobody waits on the device for long: a send begins when its tensor is made, and a receive when a header told of
    that. A thread a way does both, so that the program goes on.

    For the same reason the world's group must not be bound to a device (`device_id`): all messages would share a
    stream. Instead a pair's first message connects it, while both ranks wait, and two threads may not do that at once:
    `pairs` are connected here, in their order on all ranks.
    """

    def __init__(self, device: torch.device, timeout: float, pairs: Sequence[tuple[int, int]]) -> None:
        self._device, self._rank = device, dist.get_rank()
        backend, limit = "nccl" if device.type == "cuda" else "gloo", timedelta(seconds=timeout)
        self._to_higher = dist.new_group(backend=backend, timeout=limit)
        self._to_lower = dist.new_group(backend=backend, timeout=limit)
        self._streams: dict[tuple[str, int], Any] = {}
        for source, to in pairs:
            if self._rank == source:
                self.send(torch.zeros(1, device=device), to).wait()
            elif self._rank == to:
                self.receive((1,), torch.float32, source)[1].wait()

    def mark(self) -> _Mark:
        """Behind all that the calling thread has asked of the device."""
        if self._device.type != "cuda":
            return _Mark()
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return _Mark(event)

    def send(self, body: Tensor, to: int) -> _Mark:
        """Give a tensor that is made, and stays, to a rank; it has it at the mark."""
        with self._on_stream("to", to):
            work: Any = dist.isend(body, to, group=self._group(self._rank, to))
            work.wait()  # by NCCL the stream waits
            return self.mark()

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> tuple[Tensor, _Mark]:
        """A tensor of a rank that gives it now; it is there at the mark."""
        with self._on_stream("from", source):
            body = torch.empty(tuple(shape), dtype=dtype, device=self._device)
            if body.numel():
                work: Any = dist.irecv(body, source, group=self._group(source, self._rank))
                work.wait()
            return body, self.mark()

    def _group(self, source: int, to: int) -> Any:
        return self._to_higher if source < to else self._to_lower

    def _on_stream(self, way: str, other: int) -> AbstractContextManager[Any]:
        """What the thread asks of the device, on the stream of a way."""
        if self._device.type != "cuda":
            return nullcontext()
        if (way, other) not in self._streams:
            self._streams[way, other] = torch.cuda.Stream(self._device)
        return torch.cuda.stream(self._streams[way, other])


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


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


# --------------------------------------------------------------------------------------------------------- collectives


@dataclass(frozen=True)
class Group:
    """Some ranks that act together, in the order of their axis. `handle` None: the rank alone, where all is free.

    Every member calls the same methods in the same order, with shapes that fit the others'; tensors without elements
    are sent like any other. Raises RuntimeFailure when a member is gone.
    """

    ranks: tuple[int, ...]
    index: int
    handle: Any = None

    @property
    def size(self) -> int:
        return len(self.ranks)

    def all_to_all(self, parts: Sequence[Tensor], shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Give part r to member r; what each gives this one, in order, of the given shapes."""
        if self.handle is None:
            return list(parts)
        sizes = [part.numel() for part in parts]
        sent = parts[0].new_empty(sum(sizes))
        for place, part in zip(sent.split(sizes), parts, strict=True):
            place.view(part.shape).copy_(part)
        new_sizes = [math.prod(shape) for shape in shapes]
        received = sent.new_empty(sum(new_sizes))
        with self._together():
            dist.all_to_all_single(received, sent, new_sizes, sizes, group=self.handle)
        return [part.view(tuple(shape)) for part, shape in zip(received.split(new_sizes), shapes, strict=True)]

    def all_gather(self, part: Tensor, shapes: Sequence[Sequence[int]]) -> list[Tensor]:
        """Everybody's part, of the given shapes, which may differ."""
        if self.handle is None:
            return [part]
        # gloo gathers equal shapes alone; an exchange in which everybody gets the same serves all.
        if len({tuple(shape) for shape in shapes}) > 1:
            return self.all_to_all([part] * self.size, shapes)
        parts = [part.new_empty(part.shape) for _ in shapes]
        with self._together():
            dist.all_gather(parts, part.contiguous(), group=self.handle)
        return parts

    def rotate(self, tensor: Tensor, shape: Sequence[int]) -> Callable[[], Tensor]:
        """Begin to pass a tensor to the next member and to take that of the one before; call it to have that."""
        assert self.handle is not None
        after, before = self.ranks[(self.index + 1) % self.size], self.ranks[self.index - 1]
        sent, received = tensor.contiguous(), tensor.new_empty(tuple(shape))
        with self._together():
            works = dist.batch_isend_irecv(
                [
                    dist.P2POp(dist.isend, sent, after, group=self.handle),
                    dist.P2POp(dist.irecv, received, before, group=self.handle),
                ]
            )
        return lambda: self._finish(works, received, sent)

    def trade(self, gives: Mapping[int, Tensor], takes: Mapping[int, Tensor]) -> Callable[[], None]:
        """Begin to give tensors to members, and to fill contiguous ones with what members give; call it to wait.

        Only those named here take part, each with what the other expects.
        """
        sent = {member: tensor.contiguous() for member, tensor in gives.items()}
        ops = [dist.P2POp(dist.isend, tensor, self.ranks[member], group=self.handle) for member, tensor in sent.items()]
        ops += [
            dist.P2POp(dist.irecv, tensor, self.ranks[member], group=self.handle) for member, tensor in takes.items()
        ]
        if not ops:
            return lambda: None
        with self._together():
            works = dist.batch_isend_irecv(ops)
        return lambda: self._finish(works, None, sent, takes)

    def library_handle(self) -> Any:
        """The process group for a library that makes its own calls; a lone rank gets one in which it is alone."""
        if self.handle is not None:
            return self.handle
        return dist.new_group(list(self.ranks), use_local_synchronization=True)

    def _finish(self, works: Sequence[Any], result: T, *_kept: object) -> T:
        """Wait for both ways: what is sent and received must not be freed before."""
        with self._together():
            for work in works:
                work.wait()
        return result

    @contextmanager
    def _together(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:  # what gloo and NCCL raise
            ranks = ", ".join(map(str, self.ranks))
            raise RuntimeFailure(f"an exchange between the ranks {ranks} failed ({_first_line(error)})") from error


LONE = Group((0,), 0)
"""That of a rank without others."""


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


def connect(device: torch.device, timeout: float) -> None:
    """Join the process group that the launcher's environment describes; on CUDA with this rank's device, which becomes
    the current one.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=timedelta(seconds=timeout))


def is_connected() -> bool:
    """Whether this process has joined one."""
    return dist.is_initialized()


def disconnect() -> None:
    """Leave it."""
    if dist.is_initialized():
        dist.destroy_process_group()


def new_group(
    ranks: Sequence[int], rank: int, device: torch.device | None = None, timeout: float = 300.0
) -> Group | None:
    """A group, made by all ranks together; None on the ranks outside. `timeout` (seconds) bounds every wait in it."""
    handle = dist.new_group(list(ranks), timeout=timedelta(seconds=timeout)) if len(ranks) > 1 else None
    if rank not in ranks:
        return None
    if handle is not None and device is not None and device.type == "cuda":
        # NCCL connects a group at its first exchange, in which all members must take part; in a trade only some do.
        dist.all_reduce(torch.zeros(1, device=device), group=handle)
    return Group(tuple(ranks), ranks.index(rank), handle)


def broadcast(value: Any, source: int = 0) -> Any:
    """The source's plain data, on every rank of the world."""
    box = [value]
    dist.broadcast_object_list(box, src=source)
    return box[0]


def gather(value: Any, to: int = 0) -> list[Any]:
    """Everybody's plain data in the order of ranks, on one rank; nothing on the others."""
    box = [None] * dist.get_world_size() if dist.get_rank() == to else None
    dist.gather_object(value, box, dst=to)
    return box or []


def meet() -> None:
    """Wait until all ranks of the world have come here."""
    gather(None)
    broadcast(None)


class StoreBulletin:
    """Small texts that any rank may post and any may wait for, from any thread, through the process group's store."""

    def __init__(self) -> None:
        # A connection of its own, for a wait holds it.
        c10d: Any = dist  # torch does not say that it exports its stores
        self._store = c10d.PrefixStore("longvid/bulletin", c10d.distributed_c10d._get_default_store().clone())

    def post(self, key: str, value: str) -> None:
        self._store.set(key, value)

    def wait(self, keys: Sequence[str], timeout_s: float) -> list[str] | None:
        """The values of all keys; None where one of them is not posted in that time."""
        try:
            self._store.wait(list(keys), timedelta(seconds=timeout_s))
        except dist.DistStoreError:
            return None
        return [value.decode() for value in self._store.multi_get(list(keys))]
