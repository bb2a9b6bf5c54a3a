"""The table of jobs: whoever dies when, no job is lost and none is done twice."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, rule

from longvid.batch.jobs import Defaults, Job, Refused
from longvid.batch.table import Lease, Table
from longvid.errors import InputError

LEASE_S = 10.0
MAX_RETRIES = 2


def job_of(name: str, prompt: str = "a cat", steps: int = 8) -> tuple[Job, str]:
    story = {"scenes": [{"prompt": prompt, "for": "1s"}]}
    return Job(name, f"jobs.txt:{name}", story, Defaults().settings((f"sampler.steps={steps}",))), "64x64"


class Batches(RuleBasedStateMachine):
    """Workers that render, die between any two acts, sleep past their lease and wake again; and supervisors."""

    leases = Bundle("leases")

    @initialize(count=st.integers(1, 5))
    def begin(self, count: int) -> None:
        self.folder = TemporaryDirectory()
        self.now = 0.0
        self.table = Table(Path(self.folder.name), clock=lambda: self.now, lease_s=LEASE_S)
        self.names = {f"job{i}" for i in range(count)}
        self.table.add([job_of(name) for name in sorted(self.names)])
        self.films: set[str] = set()
        self.completed: list[str] = []
        self.newest: dict[str, int] = {}

    def teardown(self) -> None:
        if hasattr(self, "folder"):
            self.finish_all()
            self.table.close()
            self.folder.cleanup()

    @rule(target=leases, owner=st.sampled_from("ab"))
    def claim(self, owner: str) -> Lease | None:
        key = self.table.next_settings()
        lease = self.table.claim(owner, key) if key else None
        if lease:
            assert lease.attempt > self.newest.get(lease.name, 0), "an attempt's number was given twice"
            self.newest[lease.name] = lease.attempt
        return lease

    @rule(lease=leases)
    def renew(self, lease: Lease | None) -> None:
        if lease and self.table.renew(lease, 0.5):
            assert lease.attempt == self.newest[lease.name], "only the newest lease is worth anything"

    @rule(lease=leases)
    def rename_film(self, lease: Lease | None) -> None:
        """Whoever renders, late or not, gives the film its name; the crash may come next."""
        if lease:
            self.films.add(lease.name)

    @rule(lease=consumes(leases))
    def complete(self, lease: Lease | None) -> None:
        if lease and lease.name in self.films and self.table.complete(lease, {"seconds": 1.0}):
            assert lease.attempt == self.newest[lease.name]
            self.completed.append(lease.name)

    @rule(lease=consumes(leases), how=st.sampled_from(["lose", "release"]))
    def give_up(self, lease: Lease | None, how: str) -> None:
        if lease:
            (self.table.lose(lease, "it died", MAX_RETRIES) if how == "lose" else self.table.release(lease))

    @rule(owner=st.sampled_from("ab"))
    def bury(self, owner: str) -> None:
        self.table.bury(owner, "was killed", MAX_RETRIES, self.films.__contains__)

    @rule(seconds=st.sampled_from([1.0, LEASE_S / 2, LEASE_S * 2]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.table.expire(MAX_RETRIES, self.films.__contains__)

    @rule()
    def restart(self) -> None:
        """A new supervisor; the same jobs are handed in again."""
        self.table.close()
        self.table = Table(Path(self.folder.name), clock=lambda: self.now, lease_s=LEASE_S)
        self.table.restore(self.films.__contains__)
        assert self.table.add([job_of(name) for name in sorted(self.names)]) == 0

    @invariant()
    def no_job_is_lost_and_none_is_done_twice(self) -> None:
        if not hasattr(self, "table"):
            return
        rows = {row.name: row for row in self.table.rows()}
        assert rows.keys() == self.names
        assert len(self.completed) == len(set(self.completed))
        for row in rows.values():
            assert row.state != "done" or row.name in self.films, "the table is told after the film has its name"
            assert row.state != "failed" or (row.cause == "worker" and row.lost == MAX_RETRIES + 1)

    def finish_all(self) -> None:
        """A worker that lives ends every batch."""
        self.now += 2 * LEASE_S
        self.table.expire(MAX_RETRIES, self.films.__contains__)
        while lease := self.claim("c"):
            self.films.add(lease.name)
            assert self.table.complete(lease, {})
        assert {row.state for row in self.table.rows()} <= {"done", "failed"}


Batches.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestBatches = Batches.TestCase


@pytest.fixture
def table(tmp_path: Path) -> Table:
    return Table(tmp_path)


def test_workers_that_claim_at_once_get_different_jobs(table: Table, tmp_path: Path) -> None:
    table.add([job_of(f"job{i}") for i in range(24)])
    key = table.next_settings()
    assert key is not None
    claimed: list[str] = []

    def work(owner: str) -> None:
        own = Table(tmp_path)
        while lease := own.claim(owner, key):
            claimed.append(lease.name)
        own.close()

    threads = [threading.Thread(target=work, args=(f"worker {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(claimed) == sorted(f"job{i}" for i in range(24))


def test_a_worker_stays_with_its_settings_and_shape(table: Table) -> None:
    jobs = [(job_of(f"job{i}", steps=4 + i % 2)[0], f"shape {i % 3}") for i in range(12)]
    table.add(jobs)
    seen = []
    while key := table.next_settings():
        shape = ""
        while lease := table.claim("worker", key, shape):
            shape = lease.shape
            seen.append((key, shape))
    assert len(seen) == 12
    assert sum(a != b for a, b in pairwise(seen)) == 5, "each of the six groups is done in one go"


def test_a_job_that_changed_is_refused_with_what_changed(table: Table) -> None:
    table.add([job_of("cat"), job_of("dog")])
    with pytest.raises(InputError, match=r"(?s)'cat' is in the table.*scene 1, prompt: 'a cat' then, 'a cow' now"):
        table.add([job_of("cat", "a cow"), job_of("bird")])
    with pytest.raises(InputError, match=r"sampler\.steps: 8 then, 9 now"):
        table.add([job_of("dog", steps=9)])
    assert [row.name for row in table.rows()] == ["cat", "dog"], "nothing was entered beside a changed job"


def test_a_job_that_failed_may_come_again_changed(table: Table) -> None:
    table.add([job_of("cat")])
    key = table.next_settings()
    assert key
    lease = table.claim("worker", key)
    assert lease and table.fail(lease, "no such animal")
    assert table.claim("worker", key) is None, "a job that failed for its own reason is not tried again"
    assert table.add([job_of("cat", "a cow")]) == 1
    again = table.claim("worker", key)
    assert again and again.attempt > lease.attempt
    assert not table.complete(lease, {}), "the old lease is worth nothing"


def test_a_poison_job_fails_alone(table: Table) -> None:
    table.add([job_of("poison"), job_of("cat")])
    done = []
    while key := table.next_settings():
        lease = table.claim("worker", key)
        assert lease
        if lease.name == "poison":
            table.bury("worker", "was killed", MAX_RETRIES, lambda name: False)
        else:
            done.append(table.complete(lease, {}))
    poison, cat = table.rows()
    assert (poison.state, poison.cause, poison.lost) == ("failed", "worker", MAX_RETRIES + 1)
    assert cat.state == "done" and done == [True]
    assert table.forgive() == 1 and table.counts()["waiting"] == 1


def test_refusals_are_those_of_the_last_time(table: Table) -> None:
    table.refuse([Refused("a", "jobs.txt:1", "jobs.txt:1: is wrong"), Refused("b", "jobs.txt:2", "jobs.txt:2: too")])
    assert table.counts()["failed"] == 2
    table.refuse([Refused("b", "jobs.txt:2", "jobs.txt:2: still wrong")])
    assert [(row.name, row.reason) for row in table.rows()] == [("b", "jobs.txt:2: still wrong")]


def test_a_refusal_does_not_hide_behind_a_job_of_its_name(table: Table) -> None:
    table.add([job_of("cat")])
    table.refuse([Refused("cat", "more.txt:1", "more.txt:1: is another film of the name 'cat'")])
    assert [(row.name, row.state) for row in table.rows()] == [("cat", "waiting"), ("cat (more.txt:1)", "failed")]


def test_a_film_that_was_deleted_is_made_again(table: Table) -> None:
    table.add([job_of("cat")])
    lease = table.claim("worker", table.next_settings() or "")
    assert lease and table.complete(lease, {})
    assert table.restore(lambda name: True) == []
    assert table.restore(lambda name: False) == ["cat"] and table.counts()["waiting"] == 1


def test_a_file_that_is_no_table_is_refused(tmp_path: Path) -> None:
    (tmp_path / "batch.sqlite").write_text("not a database, although it is long enough to be one" * 9)
    with pytest.raises(InputError, match="cannot be used as a table of jobs"):
        Table(tmp_path)
    with pytest.raises(InputError, match="holds no batch"):
        Table.find(tmp_path / "elsewhere")
