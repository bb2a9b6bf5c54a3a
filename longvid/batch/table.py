"""The table of jobs: one SQLite file in a batch's folder, which outlives every process that works on it.

A job waits, runs, is done or has failed. Who runs it has a lease on it, named by (name, attempt), and renews it; a
lease that ran out, or whose worker is known to be dead, is lost, and the job waits again. Only the holder of the newest
lease can say that the job is done. Times are seconds of the wall clock, for processes of several machines compare them.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from longvid.batch.jobs import Job, Refused, digest_of
from longvid.errors import InputError
from longvid.fingerprint import Plain, differences

TABLE = "batch.sqlite"
LEASE_S = 20.0
"""A worker that has not renewed its lease for so long is taken for dead."""

State = Literal["waiting", "running", "done", "failed"]
Cause = Literal["input", "worker"]
"""Why a job failed: for its own reason, or because its workers died."""

_VERSION = 1
_BUSY_S = 60.0
_MAX_LISTED = 5
_SCHEMA = """
CREATE TABLE jobs (
    seq INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, place TEXT NOT NULL, digest TEXT NOT NULL,
    content TEXT NOT NULL, story TEXT NOT NULL, settings TEXT NOT NULL, shape TEXT NOT NULL,
    state TEXT NOT NULL, cause TEXT, reason TEXT, attempt INTEGER NOT NULL DEFAULT 0, lost INTEGER NOT NULL DEFAULT 0,
    owner TEXT, lease_until REAL, progress REAL NOT NULL DEFAULT 0, began REAL, ended REAL, result TEXT, measures TEXT
);
CREATE INDEX by_state ON jobs (state, settings, shape, seq);
CREATE TABLE settings (key TEXT PRIMARY KEY, data TEXT NOT NULL);
"""


@dataclass(frozen=True)
class Row:
    """A job as it stands. `attempt` counts leases, `lost` those whose worker died; `result` is what the worker says."""

    name: str
    place: str
    state: State
    cause: Cause | None
    reason: str | None
    attempt: int
    lost: int
    owner: str | None
    progress: float
    began: float | None
    ended: float | None
    story: Plain
    settings: str
    result: Plain
    measures: Plain | None


@dataclass(frozen=True)
class Lease:
    """The right to render one job, until somebody takes it over. (`name`, `attempt`) is never given twice."""

    name: str
    attempt: int
    place: str
    story: Plain
    settings: str
    shape: str


@dataclass(frozen=True)
class _Known:
    """What the table has of a job that is handed in."""

    content: Plain
    digest: str
    state: State
    attempt: int


class JobTable(Protocol):
    """What a worker needs of a table, which may be on another machine; `Table` says what each does."""

    def next_settings(self) -> str | None: ...
    def settings(self, key: str) -> str: ...
    def fail_settings(self, key: str, reason: str) -> None: ...
    def claim(self, owner: str, settings: str, shape: str = "") -> Lease | None: ...
    def renew(self, lease: Lease, progress: float) -> bool: ...
    def complete(self, lease: Lease, result: Plain) -> bool: ...
    def fail(self, lease: Lease, reason: str) -> bool: ...
    def release(self, lease: Lease) -> bool: ...
    def lose(self, lease: Lease, reason: str, max_retries: int) -> bool: ...
    def close(self) -> None: ...


FilmIsThere = Callable[[str], bool]
"""Whether a job's film is complete on the disk, by its name."""


class Table:
    """A connection to a batch's table; each thread and process has its own. Every method is one transaction.

    Raises InputError where the file is no table of ours.
    """

    def __init__(self, folder: Path, *, clock: Callable[[], float] = time.time, lease_s: float = LEASE_S) -> None:
        self.path = folder / TABLE
        self._clock, self._lease_s = clock, lease_s
        try:
            self._db = sqlite3.connect(self.path, timeout=_BUSY_S, isolation_level=None)
            self._open()
        except sqlite3.DatabaseError as error:
            raise InputError(f"{self.path}: cannot be used as a table of jobs: {error}") from None

    @classmethod
    def find(cls, folder: Path) -> Table:
        """That of a batch that was begun. Raises InputError where there is none."""
        if not (folder / TABLE).is_file():
            raise InputError(f"{folder}: holds no batch; `longvid batch JOBS... --out {folder}` begins one")
        return cls(folder)

    def close(self) -> None:
        self._db.close()

    def _open(self) -> None:
        # Two batches may begin at once; a change to WAL does not wait for a lock by itself.
        until = time.monotonic() + _BUSY_S
        while True:
            try:
                self._db.execute("PRAGMA journal_mode=WAL")
                break
            except sqlite3.OperationalError:
                if time.monotonic() > until:
                    raise
                time.sleep(0.05)
        self._db.execute("PRAGMA synchronous=FULL")
        with self._transaction():
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0:
                for statement in filter(str.strip, _SCHEMA.split(";")):
                    self._db.execute(statement)
                self._db.execute(f"PRAGMA user_version={_VERSION}")
            elif version != _VERSION:
                raise InputError(f"{self.path}: is of another version of longvid; use another folder")

    # ------------------------------------------------------------------------------------------------------ handing in

    def add(self, jobs: Sequence[tuple[Job, str]]) -> int:
        """Enter jobs with their shapes. One that is there already is left as it is. How many are new.

        A job that has failed may come again with another content. Raises InputError, and enters nothing, where another
        job changed under its name.
        """
        with self._transaction():
            entered = [(job, shape, self._known(job.name)) for job, shape in jobs]
            differing = [(job, shape, old) for job, shape, old in entered if old is None or old.digest != job.digest]
            changed = [(job, old.content) for job, _, old in differing if old and old.state != "failed"]
            if changed:
                raise InputError(_changes(changed))
            for job, shape, old in differing:
                self._enter(job, shape, attempt=old.attempt if old else 0)
        return len(differing)

    def _known(self, name: str) -> _Known | None:
        what = "SELECT content, digest, state, attempt FROM jobs WHERE name=?"
        row = self._db.execute(what, (name,)).fetchone()
        return _Known(json.loads(row[0]), *row[1:]) if row else None

    def refuse(self, refusals: Sequence[Refused]) -> None:
        """Enter what could not become a job, in place of what was refused before.

        Where a job has that name, the refusal bears its place with it.
        """
        row = "INSERT INTO jobs (name, place, digest, content, story, settings, shape, state, cause, reason, ended)"
        with self._transaction():
            self._db.execute("DELETE FROM jobs WHERE digest=''")
            for refused in refusals:
                name = f"{refused.name} ({refused.place})" if self._known(refused.name) else refused.name
                self._db.execute(
                    f"{row} VALUES (?, ?, '', '{{}}', '{{}}', '', '', 'failed', 'input', ?, ?)",
                    (name, refused.place, refused.reason, self._clock()),
                )

    def _enter(self, job: Job, shape: str, attempt: int) -> None:
        settings = job.settings.model_dump_json()
        key = digest_of(settings)
        self._db.execute("INSERT OR IGNORE INTO settings VALUES (?, ?)", (key, settings))
        self._db.execute("DELETE FROM jobs WHERE name=?", (job.name,))
        self._db.execute(
            "INSERT INTO jobs (name, place, digest, content, story, settings, shape, attempt, state)"
            " VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'waiting')",
            (job.name, job.place, job.digest, json.dumps(job.content), json.dumps(job.story), key, shape, attempt),
        )

    # -------------------------------------------------------------------------------------------------------- the lease

    def next_settings(self) -> str | None:
        """The key of the settings of the job that waits longest; None where none waits."""
        row = self._db.execute("SELECT settings FROM jobs WHERE state='waiting' ORDER BY seq LIMIT 1").fetchone()
        return row and str(row[0])

    def settings(self, key: str) -> str:
        """Settings as JSON, by their key."""
        return str(self._db.execute("SELECT data FROM settings WHERE key=?", (key,)).fetchone()[0])

    def all_settings(self) -> list[str]:
        """Those of all jobs, as JSON."""
        return [str(data) for (data,) in self._db.execute("SELECT data FROM settings")]

    def claim(self, owner: str, settings: str, shape: str = "") -> Lease | None:
        """A lease on a job that waits and has these settings, if there is one: of this shape rather than of another."""
        with self._transaction():
            row = self._db.execute(
                "SELECT name, attempt, place, story, shape FROM jobs WHERE state='waiting' AND settings=?"
                " ORDER BY shape<>?, shape, seq LIMIT 1",
                (settings, shape),
            ).fetchone()
            if row is None:
                return None
            name, attempt, place, story, shape = row
            self._db.execute(
                "UPDATE jobs SET state='running', owner=?, attempt=attempt+1, lease_until=?, progress=0,"
                " began=?, ended=NULL WHERE name=?",
                (owner, self._clock() + self._lease_s, self._clock(), name),
            )
        return Lease(name, attempt + 1, place, json.loads(story), settings, shape)

    def renew(self, lease: Lease, progress: float) -> bool:
        """Hold a lease for longer; whether it was still held. `progress` is the share that is done, 0 to 1."""
        until = self._clock() + self._lease_s
        return self._update(lease, "lease_until=?, progress=?", (until, progress))

    def complete(self, lease: Lease, result: Plain) -> bool:
        """The film is at its place. False where somebody took the job over meanwhile."""
        changes = "state='done', progress=1, ended=?, result=?, cause=NULL, reason=NULL"
        return self._update(lease, changes, (self._clock(), json.dumps(result)))

    def fail(self, lease: Lease, reason: str) -> bool:
        """The job cannot be done, for its own reason; it is not tried again."""
        changes = "state='failed', cause='input', reason=?, ended=?"
        return self._update(lease, changes, (reason, self._clock()))

    def fail_settings(self, key: str, reason: str) -> None:
        """No job of these settings can be done: they, or their model, are wrong."""
        with self._transaction():
            self._db.execute(
                "UPDATE jobs SET state='failed', cause='input', reason=?, ended=? WHERE settings=? AND state='waiting'",
                (reason, self._clock(), key),
            )

    def release(self, lease: Lease) -> bool:
        """Give a job back without blame: the user stopped the work."""
        return self._update(lease, "state='waiting'", ())

    def lose(self, lease: Lease, reason: str, max_retries: int) -> bool:
        """The worker cannot go on with this job; another may, unless too many have been lost."""
        with self._transaction():
            return self._lose("name=? AND attempt=?", (lease.name, lease.attempt), reason, max_retries) > 0

    def _update(self, lease: Lease, changes: str, values: tuple[Any, ...]) -> bool:
        with self._transaction():
            held = "WHERE name=? AND attempt=? AND state='running'"
            done = self._db.execute(f"UPDATE jobs SET {changes} {held}", (*values, lease.name, lease.attempt))
            return done.rowcount > 0

    def _lose(self, which: str, values: tuple[Any, ...], reason: str, max_retries: int) -> int:
        return self._db.execute(
            "UPDATE jobs SET lost=lost+1, cause='worker', reason=?,"
            " ended=CASE WHEN lost>=? THEN ? ELSE NULL END,"
            f" state=CASE WHEN lost>=? THEN 'failed' ELSE 'waiting' END WHERE state='running' AND {which}",
            (reason, max_retries, self._clock(), max_retries, *values),
        ).rowcount

    # ------------------------------------------------------------------------------------------------- the supervisor's

    def bury(self, owner: str, reason: str, max_retries: int, film_is_there: FilmIsThere) -> list[str]:
        """A worker is dead: its job is done if the film is there, else lost. The names that it had."""
        return self._settle("owner=?", (owner,), reason, max_retries, film_is_there)

    def expire(self, max_retries: int, film_is_there: FilmIsThere) -> list[str]:
        """The same for all leases that ran out."""
        reason = "its worker gave no sign of life"
        return self._settle("lease_until<?", (self._clock(),), reason, max_retries, film_is_there)

    def give_back(self, owner: str) -> None:
        """What a worker had that the user stopped waits again, without blame."""
        with self._transaction():
            self._db.execute("UPDATE jobs SET state='waiting' WHERE state='running' AND owner=?", (owner,))

    def restore(self, film_is_there: FilmIsThere) -> list[str]:
        """Jobs that are done and whose films are gone wait again. Their names."""
        with self._transaction():
            done = self._db.execute("SELECT name FROM jobs WHERE state='done'").fetchall()
            gone = [name for (name,) in done if not film_is_there(name)]
            for name in gone:
                self._db.execute("UPDATE jobs SET state='waiting', measures=NULL, lost=0 WHERE name=?", (name,))
        return gone

    def forgive(self) -> int:
        """Jobs that failed because their workers died are tried anew. How many."""
        with self._transaction():
            again = "UPDATE jobs SET state='waiting', lost=0, ended=NULL WHERE state='failed' AND cause='worker'"
            return self._db.execute(again).rowcount

    def _settle(
        self, which: str, values: tuple[Any, ...], reason: str, max_retries: int, film_is_there: FilmIsThere
    ) -> list[str]:
        with self._transaction():
            rows = self._db.execute(f"SELECT name FROM jobs WHERE state='running' AND {which}", values).fetchall()
            for (name,) in rows:
                if film_is_there(name):
                    done = "UPDATE jobs SET state='done', progress=1, ended=?, cause=NULL, reason=NULL WHERE name=?"
                    self._db.execute(done, (self._clock(), name))
                else:
                    self._lose("name=?", (name,), reason, max_retries)
        return [name for (name,) in rows]

    # ---------------------------------------------------------------------------------------------------------- looking

    def num_attempts(self) -> int:
        """Leases that were ever given."""
        return int(self._db.execute("SELECT coalesce(sum(attempt), 0) FROM jobs").fetchone()[0])

    def owners(self, names: Sequence[str]) -> set[str]:
        """Who had these jobs last."""
        rows = (self._db.execute("SELECT owner FROM jobs WHERE name=?", (name,)).fetchone() for name in names)
        return {row[0] for row in rows if row}

    def running_owners(self) -> set[str]:
        """Who has a job now, as far as the table knows."""
        return {str(owner) for (owner,) in self._db.execute("SELECT owner FROM jobs WHERE state='running'")}

    def counts(self) -> dict[State, int]:
        """Jobs by their state."""
        found = dict(self._db.execute("SELECT state, count(*) FROM jobs GROUP BY state").fetchall())
        return {state: found.get(state, 0) for state in ("waiting", "running", "done", "failed")}

    def rows(self) -> list[Row]:
        """All jobs, in the order in which they came."""
        names = ", ".join(Row.__dataclass_fields__)
        return [_row(values) for values in self._db.execute(f"SELECT {names} FROM jobs ORDER BY seq")]

    def keep_measures(self, name: str, measures: Plain) -> None:
        """Keep what was measured of a film that is done."""
        with self._transaction():
            self._db.execute("UPDATE jobs SET measures=? WHERE name=? AND state='done'", (json.dumps(measures), name))

    @contextmanager
    def _transaction(self) -> Iterator[None]:
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
        except BaseException:
            self._db.execute("ROLLBACK")
            raise
        self._db.execute("COMMIT")


def _row(values: tuple[Any, ...]) -> Row:
    found = dict(zip(Row.__dataclass_fields__, values, strict=True))
    found["story"] = json.loads(found["story"])
    found["result"] = json.loads(found["result"] or "{}")
    found["measures"] = json.loads(found["measures"]) if found["measures"] else None
    return Row(**found)


def _changes(changed: Sequence[tuple[Job, Plain]]) -> str:
    lines = []
    for job, old in changed[:_MAX_LISTED]:
        lines += [f"{job.place}: the job {job.name!r} is in the table with another content:"]
        lines += [f"  {line}" for line in differences(old, job.content)[:_MAX_LISTED]]
    if len(changed) > _MAX_LISTED:
        lines.append(f"and {len(changed) - _MAX_LISTED} more jobs")
    return "\n".join([*lines, "undo this, or give another name or another --out"])
