"""Ways of tensors on a device between ranks, for messages (`comm.py`)."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Mark:
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


class Ways:
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

    def mark(self) -> Mark:
        """Behind all that the calling thread has asked of the device."""
        if self._device.type != "cuda":
            return Mark()
        event = torch.cuda.Event(blocking=True)
        event.record(torch.cuda.current_stream(self._device))
        return Mark(event)

    def send(self, body: Tensor, to: int) -> Mark:
        """Give a tensor that is made, and stays, to a rank; it has it at the mark."""
        with self._on_stream("to", to):
            work: Any = dist.isend(body, to, group=self._group(self._rank, to))
            work.wait()  # by NCCL the stream waits
            return self.mark()

    def receive(self, shape: Sequence[int], dtype: torch.dtype, source: int) -> tuple[Tensor, Mark]:
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
