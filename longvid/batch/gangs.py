"""Workers of a batch that are gangs of a Ray cluster. The process that hires them owns the table, and answers for it.

The table is a file of SQLite, which belongs on one machine's disk; so ranks ask for what they need of it (`remote.py`).
Films, and the work on them, are in the batch's folder, which the machines must share.
"""

from __future__ import annotations

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from longvid.batch.folder import BatchFolder
from longvid.batch.remote import QUESTIONS
from longvid.batch.supervisor import BatchPlan, Crew, LocalCrew
from longvid.batch.table import Lease, Table
from longvid.batch.worker import Task
from longvid.errors import InputError, Interrupted
from longvid.launch.cluster import (
    LOCAL,
    Figures,
    Need,
    has_gpus,
    joined,
    processors,
    require_gpus,
    share_of_processors,
    shortage,
)
from longvid.launch.gang import Gang
from longvid.launch.seat import Order
from longvid.settings import Settings

_PATIENCE_S = 5.0
"""A worker that has waited for its seats so long says so."""


@contextmanager
def hire_from(address: str | None, plan: BatchPlan, say: Callable[[str], None]) -> Iterator[Crew]:
    """The crew for a batch: gangs of the Ray cluster at an address, or of this machine's (`local`); None: processes.

    `say` is told what a cluster lacks. Raises InputError where it cannot be joined.
    """
    if address is None:
        yield LocalCrew(plan)
        return
    with joined(address, num_cpus=plan.workers * plan.ranks) as ray:
        yield RayCrew(ray, plan, say, is_local=address == LOCAL)


@dataclass
class RayCrew:
    """Workers that are gangs of one cluster, of equal size."""

    ray: Any
    plan: BatchPlan
    say: Callable[[str], None]
    is_local: bool
    figures: Figures = field(default_factory=Figures)
    _workers: list[RayWorker] = field(default_factory=list)
    _has_said: bool = False

    @cached_property
    def table(self) -> Table:
        """Of the jobs that were handed in."""
        return Table.find(self.plan.folder)

    @cached_property
    def need(self) -> Need:
        """What a gang takes, whatever job it gets."""
        runtimes = [Settings.model_validate_json(text).runtime for text in self.table.all_settings()]
        threads = max((each.threads for each in runtimes), default=1)
        if self.is_local:  # it cannot grow, so all that is asked for must fit
            threads = min(threads, share_of_processors(self.processors(), self.plan.workers * self.plan.ranks))
        need = Need(self.plan.ranks, max(1, threads), any(has_gpus(self.ray, each.device) for each in runtimes))
        if self.is_local:
            require_gpus(self.ray, need)
        return need

    def processors(self) -> list[int]:
        return processors(self.ray)

    def hire(self, slot: int, owner: str) -> RayWorker:
        worker = RayWorker(self, slot, owner)
        self._workers.append(worker)
        return worker

    def wait(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        self._workers = [worker for worker in self._workers if worker.code() is None]
        while True:
            left = max(0.0, until - time.monotonic())
            owners = {ref: worker for worker in self._workers for ref in worker.gang.refs}
            if not owners:
                time.sleep(left)
                break
            ready, _ = self.ray.wait(list(owners), num_returns=1, timeout=left)
            for ref in ready:
                owners[ref].gang.handle(ref)
            if not ready or not left:
                break
        for worker in self._workers:
            worker.tick()
        self._tell_shortage()

    def _tell_shortage(self) -> None:
        waiting = [worker.gang for worker in self._workers if not worker.gang.is_seated]
        if not waiting:
            self._has_said = False
        elif not self._has_said and time.monotonic() - min(gang.began for gang in waiting) > _PATIENCE_S:
            self._has_said = True
            self.say(shortage(self.ray, self.need))


class RayWorker:
    """One gang at the table. Ranks that work together are given one key of settings after the other."""

    def __init__(self, crew: RayCrew, slot: int, owner: str) -> None:
        self.slot, self.owner, self._crew = slot, owner, crew
        self.log = BatchFolder(crew.plan.folder).log(slot)
        self._film = ""
        self._is_dismissed = self._is_stopping = False
        self.gang = Gang(crew.ray, crew.need, self._write, self._answer)
        self._go_on()

    def code(self) -> int | None:
        if self._is_dismissed:
            return 0
        return self.gang.outcome.code if self.gang.outcome else None

    def stop(self) -> None:
        self._is_stopping = True
        if self.gang.is_seated:
            self.gang.send(signal.SIGTERM)
        else:
            self._is_dismissed = True

    def kill(self) -> None:
        if self.code() not in (None, 0, InputError.exit_code, Interrupted.exit_code):
            self._crew.figures.gang_lost(self._film, self.slot)
            for line in self.gang.outcome.lines if self.gang.outcome else ():
                self._write(line)
        self.gang.kill()

    def reason(self) -> str:
        return self.gang.outcome.reason if self.gang.outcome else ""

    def tick(self) -> None:
        """See how it stands: it goes on with other settings, or is not needed any more."""
        self.gang.tick()
        is_done = self.gang.outcome is not None and self.gang.outcome.code == 0
        if is_done and self._crew.need.ranks > 1 and not self._is_stopping:
            self._go_on()
        elif not self.gang.is_seated and self._crew.table.next_settings() is None:
            self._is_dismissed = True

    def _go_on(self) -> None:
        plan, key = self._crew.plan, None
        if plan.ranks > 1:
            key = self._crew.table.next_settings()
            if key is None:
                self._is_dismissed = True
                return
        folder = plan.folder.absolute()
        task = Task(folder, self.owner, None, plan.ranks, plan.max_retries, key)
        self.gang.begin(Order(task.module(), str(folder), has_wire=True))

    def _answer(self, name: str, arguments: tuple[Any, ...]) -> Any:
        assert name in QUESTIONS, name
        value = getattr(self._crew.table, name)(*arguments)
        match name, arguments:
            case "claim", _ if isinstance(value, Lease):
                self._film = value.name
            case "renew", (Lease(name=film), progress):
                self._crew.figures.progress(film, self.slot, progress)
            case "complete", (Lease(name=film), dict(result)) if value:
                self._crew.figures.frames(film, self.slot, result.get("frames", 0))
                self._crew.figures.film_done(film, self.slot)
            case _:
                pass
        return value

    def _write(self, line: str) -> None:
        with open(self.log, "a", encoding="utf-8") as file:
            file.write(f"{line}\n")
