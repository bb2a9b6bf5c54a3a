"""A seat in a Ray cluster: the process of Ray that runs one rank as its child, and relays what it says and asks.

The rank is a child, and not the seat's own process, so that it is the same program as under any launcher: it has a main
thread for its signals, may end as it likes, and leaves a word of how it ended.
"""

from __future__ import annotations

import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, Pipe
from typing import Any

from longvid.errors import InputError
from longvid.launch.env import LISTENER, SEAT, SUPERVISOR, WIRE

FENCE_S = 15.0
"""A seat to which the controller has not listened for so long ends its rank: others may have taken its work over."""
KEPT_LINES = 40
_LINE_BYTES = 1 << 16
_BACKLOG = 4096


@dataclass(frozen=True)
class Place:
    """Where a seat is: Ray's name of the node, the machine's address, and a port at which rank 0 can listen there."""

    node: str
    address: str
    port: int


@dataclass(frozen=True)
class Order:
    """What a rank shall run: a module with its arguments, in a folder that it must share with the controller.

    `has_wire`: it may ask the controller, by `multiprocessing` messages of (name, arguments).
    """

    command: Sequence[str]
    folder: str
    variables: Mapping[str, str] = field(default_factory=dict)
    has_wire: bool = False


@dataclass(frozen=True)
class Said:
    """A line that the rank printed."""

    line: str


@dataclass(frozen=True)
class Asked:
    """A question of the rank, which waits for `Seat.answer`."""

    name: str
    arguments: tuple[Any, ...]


@dataclass(frozen=True)
class Ended:
    """The rank has ended, with subprocess's return code; its last lines."""

    code: int
    lines: tuple[str, ...] = ()


Message = Said | Asked | Ended


class Seat:
    """One seat. Its methods are called over Ray, from several threads."""

    def __init__(self) -> None:
        self._messages: queue.SimpleQueue[Message] = queue.SimpleQueue()
        self._answers: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: socket.socket | None = None
        self._heard = time.monotonic()
        threading.Thread(target=self._fence, name="fence", daemon=True).start()

    def place(self) -> Place:
        """Where this is. A port at the machine's own address, and at no other, is taken for a store."""
        import ray

        node, address = ray.get_runtime_context().get_node_id(), ray.util.get_node_ip_address()
        if self._listener:
            self._listener.close()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._listener = socket.create_server((address, 0), family=family, backlog=_BACKLOG)
        return Place(node, address, self._listener.getsockname()[1])

    def start(self, order: Order) -> None:
        """Start the rank. What comes of it is told to `listen`."""
        self._heard = time.monotonic()
        # The kernel ends a rank with the thread that started it, so that thread must outlive it.
        threading.Thread(target=self._run, args=(order,), name="rank", daemon=True).start()

    def listen(self, timeout_s: float) -> list[Message]:
        """What there is to hear; nothing, if nothing comes in time."""
        self._heard = time.monotonic()
        found = []
        try:
            found.append(self._messages.get(timeout=timeout_s))
            while True:
                found.append(self._messages.get_nowait())
        except queue.Empty:
            pass
        self._heard = time.monotonic()
        return found

    def answer(self, value: Any) -> None:
        """The answer to the question that was heard last."""
        self._answers.put(value)

    def send(self, number: int) -> None:
        """Send the rank a signal, if it runs."""
        if self._process and self._process.poll() is None:
            self._process.send_signal(number)

    def _run(self, order: Order) -> None:
        lines: deque[str] = deque(maxlen=KEPT_LINES)
        try:
            self._process = self._start(order)
        except (InputError, OSError) as error:
            self._messages.put(Ended(InputError.exit_code, (f"longvid: error: {error}",)))
            return
        assert self._process.stdout
        while line := self._process.stdout.readline(_LINE_BYTES):
            lines.append(line.decode(errors="replace").rstrip())
            self._messages.put(Said(lines[-1]))
        self._messages.put(Ended(self._process.wait(), tuple(lines)))

    def _start(self, order: Order) -> subprocess.Popen[bytes]:
        if not os.path.isdir(order.folder):
            raise InputError(f"{order.folder}: is not on {socket.gethostname()}: the machines must share it")
        variables = {SUPERVISOR: str(os.getpid()), SEAT: "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **order.variables}
        passed: list[socket.socket | Connection] = []
        if self._listener:
            variables[LISTENER] = str(self._listener.fileno())
            passed.append(self._listener)
        if order.has_wire:
            own, theirs = Pipe()
            variables[WIRE] = str(theirs.fileno())
            passed.append(theirs)
            threading.Thread(target=self._relay, args=(own,), name="wire", daemon=True).start()
        # Ray blocks Ctrl-C for all that it starts, and a child inherits that.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", *order.command],
            cwd=order.folder,
            env={**os.environ, **variables},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            pass_fds=[end.fileno() for end in passed],
        )
        for end in passed:
            end.close()
        self._listener = None
        return process

    def _relay(self, wire: Connection) -> None:
        try:
            while True:
                name, arguments = wire.recv()
                self._messages.put(Asked(name, arguments))
                wire.send(self._answers.get())
        except (EOFError, OSError):  # the rank has ended
            wire.close()

    def _fence(self) -> None:
        while True:
            time.sleep(1.0)
            if time.monotonic() - self._heard > FENCE_S:
                self.send(signal.SIGKILL)
