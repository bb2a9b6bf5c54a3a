"""The supervisor of a batch: keeps workers at the table, buries the dead, and ends when no job is left.

It holds no weights and no state of its own: all that it knows is in the table, so that another can go on after it. Its
workers are processes of this machine, or gangs of a Ray cluster (`gangs.py`).
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Protocol

from longvid.batch.folder import BatchFolder
from longvid.batch.table import Row, State, Table
from longvid.batch.worker import Task
from longvid.errors import InputError, Interrupted, RuntimeFailure
from longvid.launch.report import describe_exit

TICK_S = 0.1
LOOK_S = 0.5
"""How often the table is read."""
STOP_S = 8.0
"""After Ctrl-C workers have so long to end by themselves."""
MAX_FRUITLESS = 10
"""So many workers in a row may die before they begin a job."""
_TAIL_BYTES = 4000
_ERROR = "longvid: error: "


@dataclass(frozen=True)
class BatchPlan:
    """How a batch is worked off: workers at once, ranks of each, and how many workers a job may cost."""

    folder: Path
    workers: int = 1
    ranks: int = 1
    max_retries: int = 3


class Worker(Protocol):
    """One that works at the table under a name (`owner`), and what it prints (`log`)."""

    @property
    def slot(self) -> int: ...
    @property
    def owner(self) -> str: ...
    @property
    def log(self) -> Path: ...

    def code(self) -> int | None:
        """The exit code; None while it works."""

    def stop(self) -> None:
        """Ask it to end in order."""

    def kill(self) -> None:
        """End it now, with all that it started."""

    def reason(self) -> str:
        """Why it ended: what it said last, or how."""


class Crew(Protocol):
    """Where workers come from."""

    def processors(self) -> list[int]:
        """Those of each machine, which all workers share."""

    def hire(self, slot: int, owner: str) -> Worker:
        """A new worker."""

    def wait(self, seconds: float) -> None:
        """Let time pass, and do what workers need meanwhile."""


@dataclass
class LocalCrew:
    """Workers that are processes of this machine."""

    plan: BatchPlan

    def processors(self) -> list[int]:
        return [len(os.sched_getaffinity(0))]

    def hire(self, slot: int, owner: str) -> Worker:
        plan = self.plan
        task = Task(plan.folder.absolute(), owner, os.getpid(), plan.ranks, plan.max_retries, slot=slot)
        file = BatchFolder(self.plan.folder).log(slot).open("ab")
        # A session of its own: Ctrl-C is for us, and its whole group can be ended.
        process = subprocess.Popen(
            task.command(), stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
        return LocalWorker(slot, owner, process, file, file.tell())

    def wait(self, seconds: float) -> None:
        time.sleep(seconds)


@dataclass
class LocalWorker:
    """A worker's process, the leader of a process group of its own; its output goes to a log."""

    slot: int
    owner: str
    process: subprocess.Popen[bytes]
    file: IO[bytes]
    log_start: int

    @property
    def log(self) -> Path:
        return Path(self.file.name)

    def code(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        self.process.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.file.close()

    def reason(self) -> str:
        code = self.process.returncode
        with self.log.open("rb") as file:
            file.seek(max(self.log_start, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
            lines = file.read().decode(errors="replace").splitlines()
        said = [line.removeprefix(_ERROR) for line in lines if line.startswith(_ERROR)]
        return said[-1] if said and code >= 0 else f"its worker {describe_exit(code)}"


@dataclass
class Supervisor:
    """One run of `longvid batch`. `on_look` is given the table's rows now and then."""

    plan: BatchPlan
    on_look: Callable[[list[Row]], None]
    crew: Crew
    _workers: dict[int, Worker] = field(default_factory=dict)
    _signals: list[int] = field(default_factory=list)
    _num_started: int = 0
    _fruitless: tuple[int, int] = (0, -1)

    def run(self) -> dict[State, int]:
        """Work until every job is done or has failed. Returns how many of each there are.

        Raises Interrupted after Ctrl-C or SIGTERM, when all workers have ended; RuntimeFailure when workers die before
        they begin. Call it from the main thread.
        """
        self._folder, self._table = BatchFolder(self.plan.folder), Table.find(self.plan.folder)
        self._bury_orphans()
        with self._signals_noted():
            try:
                while not self._signals and self._tick():
                    self._wait(LOOK_S)
            finally:
                self._stop()
        self.on_look(self._table.rows())
        counts = self._table.counts()
        if self._signals:
            raise Interrupted(
                f"interrupted: {counts['done']} of {sum(counts.values())} films are done; "
                f"`longvid batch --out {self.plan.folder} --resume` goes on"
            )
        return counts

    def _bury_orphans(self) -> None:
        """What workers of this machine had whose supervisor is dead, and they with it, need not wait for its time."""
        for owner in self._table.running_owners():
            host, pid, _ = owner.rsplit(":", 2)
            if host == socket.gethostname() and not _is_alive(int(pid)):
                self._table.bury(owner, "its batch was ended", self.plan.max_retries, self._folder.is_there)

    def _tick(self) -> bool:
        """Bury, hire, tell. Whether there is more to do."""
        for worker in [worker for worker in self._workers.values() if worker.code() is not None]:
            self._bury(worker)
        stalled = self._table.owners(self._table.expire(self.plan.max_retries, self._folder.is_there))
        for worker in [worker for worker in self._workers.values() if worker.owner in stalled]:
            worker.kill()
        counts = self._table.counts()
        wanted = min(self.plan.workers, counts["waiting"] + len(self._workers))
        for slot in range(self.plan.workers):
            if slot not in self._workers and len(self._workers) < wanted:
                self._hire(slot)
        self.on_look(self._table.rows())
        return bool(counts["waiting"] or counts["running"] or self._workers)

    def _hire(self, slot: int) -> None:
        self._num_started += 1
        owner = f"{socket.gethostname()}:{os.getpid()}:{self._num_started}"
        self._workers[slot] = self.crew.hire(slot, owner)

    def _bury(self, worker: Worker) -> None:
        del self._workers[worker.slot]
        code = worker.code()
        worker.kill()
        reason = worker.reason()
        self._table.bury(worker.owner, reason, self.plan.max_retries, self._folder.is_there)
        if code == 0:
            return
        attempts = self._table.num_attempts()
        count, before = self._fruitless
        self._fruitless = (count + 1 if attempts == before else 1, attempts)
        if self._fruitless[0] >= MAX_FRUITLESS:
            raise RuntimeFailure(f"{MAX_FRUITLESS} workers died before they began: {reason} (see {worker.log})")

    def _stop(self) -> None:
        """End all workers: in order, and when that takes too long or the user insists, at once."""
        running = list(self._workers.values())
        for worker in running:
            worker.stop()
        until = time.monotonic() + STOP_S
        first = len(self._signals)
        while any(worker.code() is None for worker in running) and time.monotonic() < until:
            if len(self._signals) > max(1, first):
                break
            self.crew.wait(TICK_S)
        for worker in running:
            worker.kill()
            self._table.give_back(worker.owner)
        self._workers.clear()

    def _wait(self, seconds: float) -> None:
        """Wait, but not once a signal has come or a worker has ended."""
        until = time.monotonic() + seconds
        while time.monotonic() < until and not self._signals:
            if any(worker.code() is not None for worker in self._workers.values()):
                return
            self.crew.wait(TICK_S)

    @contextmanager
    def _signals_noted(self) -> Iterator[None]:
        def note(number: int, frame: FrameType | None) -> None:
            self._signals.append(number)

        handlers = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # somebody else's
        return True
    return True


def verdict(rows: list[Row]) -> None:
    """Raise what the batch's end is, if not every film is done: InputError, or RuntimeFailure where workers died."""
    failed = [row for row in rows if row.state == "failed"]
    if not failed:
        return
    listed = [f"  {row.reason if row.cause == 'input' else f'{row.name}: {row.reason}'}" for row in failed[:20]]
    if len(failed) > 20:
        listed.append(f"  and {len(failed) - 20} more (longvid batch status)")
    kind = RuntimeFailure if any(row.cause == "worker" for row in failed) else InputError
    raise kind("\n".join([f"{len(failed)} of {len(rows)} films failed:", *listed]))
