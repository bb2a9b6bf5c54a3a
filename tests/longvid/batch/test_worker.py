"""What a worker does before it renders: it settles what dead workers left, and goes on where they stopped."""

from __future__ import annotations

from pathlib import Path

import pytest

from longvid.batch.folder import BatchFolder, can_resume
from longvid.batch.jobs import Defaults, Job
from longvid.batch.submit import from_anywhere, plan_jobs, submit
from longvid.batch.table import Lease, Table
from longvid.batch.worker import Desk, Heartbeat, Task, own_gpus, reason_of
from longvid.errors import InputError, RuntimeFailure
from longvid.manifest import MANIFEST, state_folder

STORY = {"scenes": [{"prompt": "a cat", "for": "1s"}]}


class Night:
    """A folder with one job that a worker began and did not end."""

    def __init__(self, root: Path) -> None:
        self.folder = BatchFolder(root)
        self.folder.make()
        self.table = Table(root)
        self.table.add([(Job("cat", "jobs.txt:1", STORY, Defaults().settings()), "64x64")])
        self.key = self.table.next_settings() or ""
        self.lease = self.claim("dead")
        self.draft = self.folder.take_over("cat", self.lease.attempt)

    def claim(self, owner: str) -> Lease:
        lease = self.table.claim(owner, self.key)
        assert lease
        return lease

    def save_checkpoint(self) -> None:
        state = state_folder(self.draft)
        state.mkdir(parents=True)
        (state / MANIFEST).touch()

    def bury(self) -> None:
        self.table.bury("dead", "was killed", 3, self.folder.is_there)

    def desk(self) -> Desk:
        return Desk(Task(self.folder.root, "next", 0), self.key)


@pytest.fixture
def night(tmp_path: Path) -> Night:
    return Night(tmp_path)


def test_a_film_that_has_its_name_is_not_made_again(night: Night) -> None:
    night.folder.film("cat").touch()
    night.bury()
    assert night.table.counts()["done"] == 1


def test_a_film_that_gets_its_name_after_its_worker_was_given_up_counts(night: Night) -> None:
    night.bury()
    night.folder.film("cat").touch()
    assert night.desk().next() is None
    assert night.table.counts()["done"] == 1


def test_a_film_that_was_whole_but_had_no_name_gets_it(night: Night) -> None:
    night.draft.write_bytes(b"film")
    night.bury()
    assert night.desk().next() is None
    assert night.table.counts()["done"] == 1
    assert night.folder.film("cat").read_bytes() == b"film"
    assert not night.draft.parent.parent.exists()


def test_a_film_goes_on_from_its_checkpoint_where_its_first_worker_cannot_write(night: Night) -> None:
    night.save_checkpoint()
    night.bury()
    order = night.desk().next()
    assert order and order.resume and can_resume(order.draft) and order.draft != night.draft
    assert not night.draft.parent.exists()


def test_what_has_no_checkpoint_is_begun_anew(night: Night) -> None:
    (night.draft.parent / "seg.ts").touch()
    night.bury()
    order = night.desk().next()
    assert order and not order.resume
    assert not night.draft.parent.exists() and not list(order.draft.parent.iterdir())


def test_a_lease_that_was_taken_over_cannot_be_renewed(night: Night) -> None:
    with Heartbeat(Task(night.folder.root, "dead", 0), night.lease) as beat:
        assert night.table.renew(night.lease, 0.5)
        assert beat.result["frames"] == 0
    night.bury()
    night.claim("next")
    assert not night.table.renew(night.lease, 0.5)


def test_a_task_is_what_its_command_line_says(tmp_path: Path) -> None:
    task = Task(tmp_path, "host:1:2", 17, ranks=2, settings="key")
    assert Task.read(task.command()[-1]) == task


def test_reasons_are_one_line() -> None:
    assert reason_of(RuntimeFailure("rank 1 failed\nmore")) == "rank 1 failed"
    assert reason_of(KeyError("x")) == "KeyError: 'x'"
    assert reason_of(MemoryError()) == "MemoryError"


def test_a_film_of_somebody_else_is_not_taken_for_ours(tmp_path: Path) -> None:
    folder = BatchFolder(tmp_path / "films")
    folder.make()
    (tmp_path / "cat.yaml").write_text("scenes: [{prompt: a cat, for: 1s}]")
    folder.film("cat").touch()
    with pytest.raises(InputError, match="is there already, and not of this batch"):
        submit(plan_jobs([tmp_path / "cat.yaml"], Defaults()), folder, Table(folder.root))


def test_what_the_model_cannot_do_is_told_before_a_worker_starts(tmp_path: Path) -> None:
    (tmp_path / "cat.yaml").write_text("size: [50, 50]\nscenes: [{prompt: a cat, for: 1s}]")
    (tmp_path / "dog.yaml").write_text("scenes: [{prompt: a dog, for: 1s}]")
    planned = plan_jobs([tmp_path], Defaults())
    assert [job.name for job, _ in planned.jobs] == ["dog"]
    assert planned.refused[0].reason.startswith(f"{tmp_path / 'cat.yaml'}:1: ")


def test_workers_of_a_machine_have_gpus_of_their_own_as_far_as_there_are_enough() -> None:
    names = ["4", "5", "6", "7"]
    assert [own_gpus(names, slot, 2) for slot in range(3)] == [["4", "5"], ["6", "7"], ["4", "5"]]
    assert [own_gpus(names[:1], slot, 2) for slot in range(2)] == [["4"], ["4"]]
    assert own_gpus([], 0, 1) == []


def test_a_batch_may_go_on_from_another_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    scenes = [{"prompt": "a cat", "for": "1s", "image": "cat.png"}, {"prompt": "a dog", "for": "1s"}]
    own = ("attention.policy=sta", "attention.profile=heads.json", "model.lora=[{path: style.safetensors}]")
    job = from_anywhere(
        Job("cat", "stories/cat.yaml", {"image": "first.png", "scenes": scenes}, Defaults().settings(own))
    )
    assert job.settings.attention.model_dump()["profile"] == str(tmp_path / "heads.json")
    assert job.settings.model.lora[0].path == str(tmp_path / "style.safetensors")
    assert (job.settings.model.path, job.settings.vin.path) == ("mini", None)
    assert [scene.image for scene in job.script.scenes] == [
        tmp_path / "stories" / "cat.png",
        tmp_path / "stories" / "first.png",
    ]
