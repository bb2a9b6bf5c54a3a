"""What several ranks do together: the process group, exchanges inside groups, and plain data for all."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from longvid.errors import RuntimeFailure

T = TypeVar("T")


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
            raise RuntimeFailure(f"an exchange between the ranks {ranks} failed ({first_line(error)})") from error


LONE = Group((0,), 0)
"""That of a rank without others."""


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


def first_line(error: Exception) -> str:
    """Of what a library says of an error."""
    return str(error).strip().partition("\n")[0]
