"""`bench batch` orders films that can be made, and says what came of them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from longvid.batch.jobs import Defaults, Job, read_jobs
from longvid.bench.batch import BatchBench, _children, as_text


def test_every_job_is_a_film_of_its_own(tmp_path: Path) -> None:
    bench = BatchBench(jobs=40, seconds=0.5)
    bench.write_jobs(tmp_path / "jobs.jsonl")
    jobs = [
        job for job in read_jobs([tmp_path / "jobs.jsonl"], Defaults(overrides=bench.overrides)) if isinstance(job, Job)
    ]
    assert len({job.digest for job in jobs}) == 40
    assert {job.settings.sampler.steps for job in jobs} == {bench.steps}


def test_the_killer_finds_the_processes_that_one_started() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        assert child.pid in _children(os.getpid())
        assert _children(child.pid) == []
    finally:
        child.kill()
        child.communicate()


def test_the_words_say_when_bytes_differ() -> None:
    times = {"plain_s": 10.0, "batch_s": 12.5, "killed_s": 20.0, "efficiency": 0.8, "efficiency_killed": 0.5}
    counts = {"jobs": 40, "workers": 2, "kills": 3, "lost": 1, "duplicated": 0}
    text = as_text({**times, **counts, "hashes_equal": False})
    assert "efficiency 80.0%" in text and "1 films lost" in text and "NOT EQUAL" in text
