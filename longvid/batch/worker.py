"""A worker of a batch: a process, or a gang of ranks, that loads a model once and renders one film after the other.

`python -m longvid.batch.worker TASK`, TASK being JSON. The supervisor starts it, or a seat in a Ray cluster does, and
starts another when it dies: all that must last is in the table and on the disk. It ends by itself when no job waits.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from longvid.batch.folder import BatchFolder, can_resume
from longvid.batch.remote import remote_table
from longvid.batch.table import JobTable, Lease, Table
from longvid.document import Document
from longvid.errors import InputError, Interrupted, LongvidError, RuntimeFailure
from longvid.events import Event, FilmDone, Notice, RoundDone
from longvid.hls import sync
from longvid.launch.env import RankEnv, rank_of
from longvid.script import Script, script_of
from longvid.settings import Settings

if TYPE_CHECKING:
    from longvid.engine import Engine

VISIBLE = "CUDA_VISIBLE_DEVICES"
BEAT_S = 2.0
"""How often a lease is renewed."""


@dataclass(frozen=True)
class Task:
    """What a worker is told: the batch's folder, its own name in the table, its supervisor's process, its ranks.

    The ranks of a gang are told the key of their `settings`, for they must agree before they can talk. In a Ray cluster
    the environment says who the supervisor is, and Ray which GPUs are whose; on one machine `slot` tells workers apart.
    """

    folder: Path
    owner: str
    supervisor: int | None
    ranks: int = 1
    max_retries: int = 3
    settings: str | None = None
    slot: int = 0

    def command(self) -> list[str]:
        """The command line that does it."""
        return [sys.executable, "-P", "-m", *self.module()]

    def module(self) -> list[str]:
        """The module and its argument."""
        return ["longvid.batch.worker", json.dumps({**asdict(self), "folder": str(self.folder)})]

    @classmethod
    def read(cls, text: str) -> Task:
        """That of a command line."""
        fields: dict[str, Any] = json.loads(text)
        return cls(**{**fields, "folder": Path(fields["folder"])})


def run_task(task: Task) -> int:
    """Work until no job waits. Returns the exit code."""
    from longvid.launch.local import end_with_supervisor

    if task.settings is not None:
        return _run_rank(task, task.settings)
    seated = rank_of(os.environ) if task.supervisor is None else None
    end_with_supervisor(seated or RankEnv(0, 1, 0, 1, "local", None, task.supervisor))
    if task.supervisor is not None and (gpus := own_gpus(visible_gpus(), task.slot, task.ranks)):
        os.environ[VISIBLE] = ",".join(gpus)  # for its ranks, too; CUDA reads it when it is first used
    table = find_table(task)
    while (key := table.next_settings()) is not None:
        code = _run_gang(task, key) if task.ranks > 1 else _run_alone(task, key, table)
        if code:
            return code
    return 0


def visible_gpus() -> list[str]:
    """The names of this machine's NVIDIA GPUs, or of those that whoever started us left us."""
    if VISIBLE in os.environ:
        return [name for name in os.environ[VISIBLE].split(",") if name]
    return [str(index) for index, _ in enumerate(Path("/proc/driver/nvidia/gpus").glob("*"))]


def own_gpus(names: Sequence[str], slot: int, ranks: int) -> list[str]:
    """Those for a worker's ranks: each worker has others, as far as there are enough."""
    return list(dict.fromkeys(names[(slot * ranks + rank) % len(names)] for rank in range(ranks))) if names else []


def find_table(task: Task) -> JobTable:
    """The batch's table: the file, or, in a Ray cluster, what asks the controller, whose file it is."""
    env = rank_of(os.environ) if task.supervisor is None else None
    return remote_table(env.wire) if env and env.wire is not None else Table.find(task.folder)


def _run_alone(task: Task, key: str, table: JobTable) -> int:
    try:
        engine = load_engine(Settings.model_validate_json(table.settings(key)))
    except InputError as error:
        table.fail_settings(key, str(error))
        return 0
    serve(engine, task, key)
    return 0


def _run_gang(task: Task, key: str) -> int:
    from longvid.launch.local import run_local

    return run_local(replace(task, settings=key, supervisor=os.getpid()).command(), task.ranks)


def _run_rank(task: Task, key: str) -> int:
    from longvid.launch.worker import run_rank

    env = rank_of(os.environ)
    assert env is not None, "the gang's launcher says which rank this is"
    table = find_table(task)

    def load() -> Engine:
        try:
            return load_engine(Settings.model_validate_json(table.settings(key)))
        except InputError as error:
            if env.rank == 0:
                table.fail_settings(key, str(error))
            raise

    run_rank(env, load, lambda engine: serve(engine, task, key))
    return 0


def load_engine(settings: Settings) -> Engine:
    """An engine for these settings, on this rank. Raises InputError."""
    from longvid.engine import Engine
    from longvid.models.loader import open_checkpoint
    from longvid.ranks import join_mesh, set_threads

    set_threads(settings)
    checkpoint = open_checkpoint(settings.model.path)
    return Engine(checkpoint, settings, join_mesh(settings, checkpoint.facts, checkpoint.configs))


# ------------------------------------------------------------------------------------------------------------ rendering


@dataclass(frozen=True)
class Order:
    """A film to be rendered now, by all ranks of the worker."""

    script: Script
    draft: Path
    resume: bool


def serve(engine: Engine, task: Task, key: str) -> None:
    """Render all jobs of one key of settings that wait. All ranks of a gang make this call."""
    from longvid.parallel.collectives import broadcast

    desk = Desk(task, key) if engine.mesh.is_leader else None
    is_gang = engine.mesh.topology.num_ranks > 1
    while True:
        order = desk.next() if desk else None
        order = broadcast(order) if is_gang else order
        if order is None:
            return
        if desk is None:
            engine.render(order.script, order.draft, resume=order.resume)
            continue
        try:
            desk.work(engine, order)
        except InputError:
            if is_gang:  # the other ranks may be elsewhere
                raise


class Desk:
    """The leader's place at the table: takes a lease, hands out the order, and enters what becomes of it."""

    def __init__(self, task: Task, key: str) -> None:
        self._task, self._key = task, key
        self._folder, self._table = BatchFolder(task.folder), find_table(task)
        self._lease: Lease | None = None

    def next(self) -> Order | None:
        """The next film. One that a dead worker finished is published and told on the way."""
        shape = self._lease.shape if self._lease else ""
        while (lease := self._table.claim(self._task.owner, self._key, shape)) is not None:
            self._lease = lease
            if self._folder.is_there(lease.name):
                self._table.complete(lease, {})
                continue
            draft = self._folder.take_over(lease.name, lease.attempt)
            if not draft.exists():
                return Order(script_of(Document(lease.place, lease.story)), draft, can_resume(draft))
            self._publish(lease, draft, {})
        return None

    def work(self, engine: Engine, order: Order) -> None:
        """Render the film, give it its name, tell the table. Failures are raised when the table knows them, too."""
        lease = self._lease
        assert lease is not None, "`next` comes first"
        try:
            with Heartbeat(self._task, lease) as beat:
                engine.render(order.script, order.draft, beat.on_event, resume=order.resume)
                sync(order.draft)
        except (KeyboardInterrupt, Interrupted):
            self._table.release(lease)
            order.draft.with_name(f"{order.draft.stem}.partial.mp4").unlink(missing_ok=True)
            raise
        except InputError as error:
            self._refuse(lease, order, error)
            raise
        except Exception as error:
            if self._task.ranks == 1:  # of a gang, its launcher knows better who failed and why
                self._table.lose(lease, reason_of(error), self._task.max_retries)
            raise
        self._publish(lease, order.draft, {**beat.result, "resumed": order.resume})

    def _publish(self, lease: Lease, draft: Path, result: dict[str, Any]) -> None:
        self._folder.publish(lease.name, draft)
        if self._table.complete(lease, result):
            self._folder.clear(lease.name)

    def _refuse(self, lease: Lease, order: Order, error: InputError) -> None:
        """The job's own fault; or that of a checkpoint which does not fit: then it is begun anew."""
        if order.resume:
            self._folder.clear(lease.name)
            self._table.release(lease)
        else:
            self._table.fail(lease, str(error))


class Heartbeat:
    """Renews a lease while a film renders, in a thread of its own, and notes what the render tells; a context.

    Where the lease was taken over, or nobody answers, this process ends: what it makes may no longer be wanted.
    """

    def __init__(self, task: Task, lease: Lease) -> None:
        self._task, self._lease = task, lease
        self._began, self._frames, self._progress = time.monotonic(), 0, 0.0
        self._notices: list[str] = []
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="lease", daemon=True)

    @property
    def result(self) -> dict[str, Any]:
        """What the table keeps of a render: seconds of work, frames, notices."""
        return {"seconds": time.monotonic() - self._began, "frames": self._frames, "notices": self._notices}

    def on_event(self, event: Event) -> None:
        """The render's callback."""
        match event:
            case RoundDone():
                self._progress = event.units_done / event.num_units
            case Notice():
                self._notices.append(event.text)
            case FilmDone():
                self._frames = event.num_frames
            case _:
                pass

    def __enter__(self) -> Heartbeat:
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._is_over.set()
        self._thread.join()

    def _run(self) -> None:
        table = find_table(self._task)
        while not self._is_over.wait(BEAT_S):
            try:
                is_held = table.renew(self._lease, self._progress)
            except (EOFError, OSError):  # the controller is gone
                is_held = False
            if not is_held:
                print(f"{self._lease.name}: another worker has taken this job over", file=sys.stderr, flush=True)
                os._exit(RuntimeFailure.exit_code)
        table.close()


def reason_of(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().splitlines()
    return text[0] if text and isinstance(error, LongvidError) else ": ".join([type(error).__name__, *text[:1]])


def main() -> None:
    """The process: exit codes as those of the command line."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    try:
        code = run_task(Task.read(sys.argv[1]))
    except LongvidError as error:
        print(f"longvid: error: {error}", file=sys.stderr)
        code = error.exit_code
    except KeyboardInterrupt:
        code = Interrupted.exit_code
    sys.exit(code)


if __name__ == "__main__":
    main()
