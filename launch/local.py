"""The ranks of one machine: starts them, passes signals on, and sees to it that they end together.

The supervisor hosts the store at which the ranks meet, so that it survives any of them. It loads torch for that, but
only when the ranks are on their way. The leader (rank 0) has the terminal; what the others print is kept, and told only
where one of them fails in a way that it cannot report itself.
"""

from __future__ import annotations

import ctypes
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import timedelta
from types import FrameType, TracebackType
from typing import IO, Any

from longvid.errors import InputError, Interrupted, Preempted, RuntimeFailure
from longvid.launch.env import INTERFACE, SUPERVISOR, RankEnv
from longvid.launch.network import LOOPBACK
from longvid.launch.report import (
    ASKED,
    FAILED,
    LEADER,
    NOTHING,
    PREEMPT,
    PREEMPT_SIGNALS,
    PREFIX,
    STOP,
    TOLD,
    YES,
    Beat,
    Report,
    Store,
    beat_key,
    describe_exit,
    read,
    with_hint,
    with_place,
    write_first,
)
from longvid.preemption import END_S as PREEMPT_S

HOST = LOOPBACK
OPEN_STORE_AFTER_S = 1.0
"""Wrong input ends ranks at once, before anybody needs the store and torch with it."""
END_S, KILL_S = 8.0, 1.0
"""After a failure, ranks have so long to end by themselves, and so long after SIGTERM until they are killed."""
REPEAT_S = 1.0
"""A second signal later than this means it. Those that come together are one, sent by a manager and a launcher."""
KEPT_LINES = 40
_LINE_BYTES = 2000
_PR_SET_PDEATHSIG = 1
_OURS, _ERROR = "longvid: ", "longvid: error: "
Say = Callable[[str], None]
_TOLD_CODES = (InputError.exit_code, RuntimeFailure.exit_code, Interrupted.exit_code)
"""Of ranks that told in one line why they ended."""


def rank_command(arguments: Sequence[str]) -> list[str]:
    """A rank's command, for arguments of the command line."""
    return [sys.executable, "-P", "-m", "longvid", *arguments]


def say(line: str) -> None:
    """A line for the user, on stderr."""
    print(line, file=sys.stderr, flush=True)


def run_local(
    command: Sequence[str], num_ranks: int, resume: str = "", say: Say = say, *, preemptible: bool = False
) -> int:
    """Run a command as ranks that find each other by torchrun's variables. Call it from the main thread.

    Returns 0; 2 where the leader found the input wrong; 130 where the user interrupted; else 3. The leader tells the
    user what it knows of; what it cannot tell is told by `say`, in one line, with `resume`: how to go on. SIGTERM is an
    interruption too, or, with ranks that are `preemptible`, has them save and end, which is 0.
    """
    with _Supervisor(command, num_ranks, resume, say, preemptible) as supervisor:
        return supervisor.run()


def end_with_supervisor(env: RankEnv) -> None:
    """Have the kernel (Linux) end this rank when its supervisor is killed: the leader in order, others at once.

    In a Ray cluster the leader ends at once, too: others will go on with its film, and nobody else may write to it.
    Does nothing for a rank that has no supervisor. To be called by a rank's main thread as soon as it runs.
    """
    if env.supervisor is None:
        return
    if sys.platform == "linux":
        is_in_order = env.rank == LEADER and env.launcher == "local"
        number = signal.SIGTERM if is_in_order else signal.SIGKILL
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(number), 0, 0, 0)
    if os.getppid() != env.supervisor:
        os._exit(RuntimeFailure.exit_code)


class _Board:
    """The store, as the supervisor sees it. Ranks can come at once; they are served when it is opened."""

    def __init__(self, num_ranks: int) -> None:
        # The backlog holds every rank's connections, of the process group and of the watchdog.
        self._socket = socket.create_server((HOST, 0), backlog=4 * num_ranks + 64)
        self.port: int = self._socket.getsockname()[1]
        self._store: Store | None = None
        self._failure: Report | None = None
        self._is_stopped = False

    def open(self) -> None:
        """Serve. Loads torch."""
        import torch.distributed as dist

        c10d: Any = dist  # torch does not say that it exports its stores
        server = c10d.TCPStore(
            HOST,
            self.port,
            is_master=True,
            wait_for_workers=False,
            timeout=timedelta(seconds=END_S),
            master_listen_fd=self._socket.detach(),
        )
        store: Store = c10d.PrefixStore(f"{PREFIX}/0", server)
        for key in (FAILED, STOP, PREEMPT):
            read(store, key)
        self._store = store
        if self._failure:
            self.report(self._failure)
        if self._is_stopped:
            self.stop()

    def close(self) -> None:
        self._store = None
        self._socket.close()

    def report(self, report: Report) -> Report:
        """Tell all ranks of a failure. The one that was first."""
        if self._store is None:
            self._failure = self._failure or report
            return self._failure
        return Report.decode(write_first(self._store, FAILED, report.encode())) or report

    def stop(self) -> None:
        """Ask the leader to stop."""
        self._is_stopped = True
        if self._store is not None:
            write_first(self._store, STOP, ASKED)

    def beat(self, rank: int) -> Beat:
        """A rank's last sign of life."""
        text = NOTHING if self._store is None else read(self._store, beat_key(rank))
        return Beat.decode(text) or Beat(0, f"rank {rank}")

    def is_told(self) -> bool:
        """Whether the leader tells the user of the failure."""
        return self._store is not None and read(self._store, TOLD) == YES


class _Child:
    """A rank's process, and the last lines that it printed. `code` is how it ended, once that is dealt with."""

    def __init__(self, command: Sequence[str], rank: int, environment: dict[str, str]) -> None:
        self.rank = rank
        self.code: int | None = None
        self.lines: deque[str] = deque(maxlen=KEPT_LINES)
        own: dict[str, Any] = {}
        if rank != LEADER:
            own = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        self._process = subprocess.Popen(command, env=environment, **own)
        self._reader = threading.Thread(target=self._read, name=f"output of rank {rank}", daemon=True)

    def start(self, on_end: Callable[[_Child], None]) -> None:
        """Wait for its end, and meanwhile keep its last lines."""
        self._reader.start()
        threading.Thread(target=self._wait, args=(on_end,), name=f"end of rank {self.rank}", daemon=True).start()

    def send(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.code is None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End it now, and wait for that."""
        self._process.kill()
        self._process.wait()

    def settle(self) -> int:
        """Its return code, now that it has ended."""
        self.code = self._process.wait()
        return self.code

    def _wait(self, on_end: Callable[[_Child], None]) -> None:
        self._process.wait()
        # What it started itself may keep its output open.
        self._reader.join(0.5)
        on_end(self)

    def _read(self) -> None:
        stream: IO[bytes] | None = self._process.stdout
        while stream and (line := stream.readline(_LINE_BYTES)):
            self.lines.append(line.decode(errors="replace").rstrip())


class _Supervisor:
    """The state of one run. Everything happens in the main thread, by events that other threads and signals bring."""

    def __init__(self, command: Sequence[str], num_ranks: int, resume: str, say: Say, preemptible: bool) -> None:
        self._command, self._num_ranks, self._resume = command, num_ranks, resume
        self._say, self._preemptible = say, preemptible
        self._events: queue.SimpleQueue[_Child | int] = queue.SimpleQueue()
        self._agenda: list[tuple[float, Callable[[], None]]] = []
        self._board = _Board(num_ranks)
        self._children: list[_Child] = []
        self._failure: Report | None = None
        self._interrupted: float | None = None
        self._is_preempted = self._is_ending = False

    def __enter__(self) -> _Supervisor:
        numbers = {signal.SIGINT, signal.SIGTERM, *(PREEMPT_SIGNALS if self._preemptible else ())}
        self._handlers = {number: signal.signal(number, self._on_signal) for number in numbers}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for child in self._running():
            child.kill()
        self._board.close()
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    def run(self) -> int:
        """Start the ranks and wait for the last of them."""
        for rank in range(self._num_ranks):
            child = _Child(self._command, rank, self._environment(rank))
            self._children.append(child)
            child.start(self._events.put)
        self._later(OPEN_STORE_AFTER_S, self._board.open)
        while self._running():
            event = self._next_event()
            if isinstance(event, _Child):
                self._on_end(event)
            elif event is not None:
                self._on_interrupt(event)
        return self._conclude()

    def _environment(self, rank: int) -> dict[str, str]:
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(self._num_ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(self._num_ranks),
            "MASTER_ADDR": HOST,
            "MASTER_PORT": str(self._board.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
            SUPERVISOR: str(os.getpid()),
        }
        # Connections that break are told in our words.
        environment.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        if sys.platform == "linux":
            environment.setdefault(INTERFACE, "lo")
        return environment

    def _running(self) -> list[_Child]:
        return [child for child in self._children if child.code is None]

    # ----------------------------------------------------------------------------------------------------------- events

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._events.put(number)

    def _later(self, delay: float, action: Callable[[], None]) -> None:
        self._agenda.append((time.monotonic() + delay, action))
        self._agenda.sort(key=lambda entry: entry[0])

    def _next_event(self) -> _Child | int | None:
        """The next event; None when something of the agenda was due, and is done."""
        timeout = max(0.0, self._agenda[0][0] - time.monotonic()) if self._agenda else None
        try:
            return self._events.get(timeout=timeout)
        except queue.Empty:
            _, action = self._agenda.pop(0)
            action()
            return None

    def _on_interrupt(self, number: int) -> None:
        now = time.monotonic()
        if self._interrupted is not None:
            if now - self._interrupted >= REPEAT_S:
                self._send_all(signal.SIGKILL)
            return
        self._interrupted = now
        # A terminal sends Ctrl-C to every rank; a service manager's SIGTERM comes here alone.
        if number != signal.SIGINT:
            self._children[LEADER].send(number)
        if number != signal.SIGINT and self._preemptible:
            self._is_preempted = True
            self._later(PREEMPT_S, lambda: self._send_all(signal.SIGKILL))
        else:
            self._board.stop()

    def _on_end(self, child: _Child) -> None:
        code, beat = child.settle(), self._board.beat(child.rank)
        if child.rank == LEADER:
            self._end_soon()
        elif beat.is_closed:
            return
        if code == 0 or self._interrupted is not None:
            return
        if code == Interrupted.exit_code and self._failure is None:
            self._interrupted = time.monotonic()
            return
        self._failure = self._board.report(Report(child.rank, with_place(_story(child, beat.name), beat.doing)))
        self._end_soon()
        if self._failure.is_lost:
            self._children[self._failure.rank].send(signal.SIGKILL)

    def _end_soon(self) -> None:
        if not self._is_ending:
            self._is_ending = True
            self._later(END_S, lambda: self._send_all(signal.SIGTERM))
            self._later(END_S + KILL_S, lambda: self._send_all(signal.SIGKILL))

    def _send_all(self, number: int) -> None:
        for child in self._running():
            child.send(number)

    def _conclude(self) -> int:
        """The exit code, after what the leader did not say itself."""
        code = self._children[LEADER].code
        if code in (0, InputError.exit_code):
            return code
        if self._is_preempted and code != RuntimeFailure.exit_code:
            self._say(with_hint(f"{_OURS}stopped", self._resume))
            return Preempted.exit_code
        if self._failure is None and code != RuntimeFailure.exit_code:
            if code != Interrupted.exit_code:
                self._say(f"{_OURS}interrupted")
            return Interrupted.exit_code
        failed = self._children[self._failure.rank] if self._failure else None
        if failed and failed.code not in _TOLD_CODES:
            for line in failed.lines:
                if not line.startswith(_OURS):
                    self._say(line)
        if self._failure and code != RuntimeFailure.exit_code and not self._board.is_told():
            self._say(f"{_ERROR}{with_hint(self._failure.text, self._resume)}")
        return RuntimeFailure.exit_code


def _story(child: _Child, name: str) -> str:
    """What became of a rank, by its own words if it left any."""
    errors = [line.removeprefix(_ERROR) for line in child.lines if line.startswith(_ERROR)]
    if errors and child.code in _TOLD_CODES:
        return f"{name} failed: {errors[-1]}"
    how = describe_exit(child.code or 0)
    return f"{name} {how} ({child.lines[-1]})" if child.code == 1 and child.lines else f"{name} {how}"
