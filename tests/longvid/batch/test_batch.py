"""A batch in real processes: a worker is killed, the user stops it, two batches end it together; every film is made."""

from __future__ import annotations

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from longvid.batch.commands import batch_app
from longvid.batch.folder import BatchFolder, can_resume
from longvid.batch.table import Row, Table
from longvid.document import Document
from longvid.engine import Engine
from longvid.script import script_of

PATIENCE_S = 200
COMMAND = [sys.executable, "-P", "-m", "longvid", "batch"]
BLUE = "over a blue background"
SHORT = [f"a large {shape} moving {way} {BLUE}" for shape in ("ring", "circle", "square") for way in ("left", "up")]
JOBS = [
    {"name": "long", "prompt": f"a large red circle moving left {BLUE}", "seconds": 20},
    *({"prompt": prompt, "for": "5f"} for prompt in SHORT),
    {"name": "fewer steps", "prompt": f"a small red ring moving up {BLUE}", "for": "5f", "sampler.steps": 1},
    {"promt": "a cat"},
]
SETTINGS = ["sampler.steps=2", "runtime.threads=1", "runtime.checkpoint_s=0.2"]


@dataclass
class Night:
    """What came of it: the folder, rows after the first part and at the end, and the processes' ends."""

    folder: Path
    long_attempt: int
    stopped: subprocess.CompletedProcess[str]
    stop_s: float
    rows_then: list[Row]
    changed: subprocess.CompletedProcess[str]
    together: list[subprocess.CompletedProcess[str]]
    rows: list[Row]


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        stdin=subprocess.DEVNULL,
        text=True,
        env=environment,
    )


def end_of(process: subprocess.Popen[str]) -> subprocess.CompletedProcess[str]:
    out, err = process.communicate(timeout=PATIENCE_S)
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def wait_for(what: Callable[[], Any], process: subprocess.Popen[str]) -> Any:
    until = time.monotonic() + PATIENCE_S
    while not (found := what()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.02)
    return found


def pid_of(owner: str | None) -> int:
    """The process of a worker, by its name in its command line."""
    for place in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = place.read_bytes().decode().split("\0")
        except OSError:
            continue
        if any(f'"owner": "{owner}"' in word for word in words):
            return int(place.parent.name)
    raise AssertionError(f"no process is {owner}")


@pytest.fixture(scope="module")
def night(tmp_path_factory: pytest.TempPathFactory) -> Night:
    root = tmp_path_factory.mktemp("night")
    jobs, folder = root / "jobs.jsonl", root / "films"
    jobs.write_text("\n".join(map(json.dumps, JOBS)))
    settings = [part for setting in SETTINGS for part in ("--set", setting)]
    places = BatchFolder(folder)

    first = start("run", jobs, "--out", folder, "--workers", 2, *settings)
    wait_for((folder / "batch.sqlite").exists, first)
    table = Table(folder)

    def long_film() -> Row | None:
        row = next((row for row in table.rows() if row.name == "long"), None)
        return row if row and row.state == "running" and can_resume(places.draft("long", row.attempt)) else None

    row = wait_for(long_film, first)
    os.kill(pid_of(row.owner), signal.SIGKILL)
    again = wait_for(lambda: (now := long_film()) and now.attempt > row.attempt and now, first)
    began = time.monotonic()
    first.send_signal(signal.SIGINT)
    stopped = end_of(first)
    stop_s = time.monotonic() - began
    rows_then = table.rows()

    changed = end_of(start(jobs, "--out", folder, *settings, "--set", "sampler.steps=3"))
    both = [start("--resume", "--out", folder), start(jobs, "--out", folder, *settings)]
    together = [end_of(process) for process in both]
    return Night(folder, again.attempt, stopped, stop_s, rows_then, changed, together, table.rows())


def test_a_killed_worker_costs_one_attempt_and_its_film_goes_on(night: Night) -> None:
    long = next(row for row in night.rows_then if row.name == "long")
    assert night.long_attempt == 2 and long.lost == 1
    assert "was killed by signal 9" in (long.reason or "")


def test_ctrl_c_ends_all_soon_and_says_how_to_go_on(night: Night) -> None:
    assert night.stopped.returncode == 130, night.stopped.stderr
    assert re.search(
        r"interrupted: \d of 9 films are done; `longvid batch --out .* --resume` goes on", night.stopped.stderr
    )
    assert night.stop_s < 60
    assert not [row for row in night.rows_then if row.state == "running"]
    assert {row.cause for row in night.rows_then if row.state == "failed"} == {"input"}


def test_a_changed_batch_is_refused_before_anything_runs(night: Night) -> None:
    assert night.changed.returncode == 2
    assert "sampler.steps: 2 then, 3 now" in night.changed.stderr


def test_two_batches_on_one_folder_make_every_film_once(night: Night) -> None:
    assert [done.returncode for done in night.together] == [2, 2], [done.stderr for done in night.together]
    assert "jobs.jsonl:9: unknown field 'promt'" in night.together[1].stderr
    done = [row for row in night.rows if row.state == "done"]
    assert len(done) == 8 and [row.place.rpartition(":")[2] for row in night.rows if row.state == "failed"] == ["9"]
    assert sorted(path.name for path in night.folder.glob("*.mp4")) == sorted(f"{row.name}.mp4" for row in done)
    assert sum(row.lost for row in night.rows) == 1, "nobody died but the one that was killed"
    assert not list((night.folder / "batch.longvid" / "work").iterdir())


def test_the_films_have_the_bytes_of_a_plain_render(night: Night, tmp_path: Path) -> None:
    engine = Engine.load("mini", overrides=SETTINGS)
    rows = {row.name: row for row in night.rows}
    assert rows["long"].result["resumed"] and rows["long"].attempt == 3
    for name in ("long", "jobs-0004"):
        film = engine.render(script_of(Document(name, rows[name].story)), tmp_path / f"{name}.mp4")
        assert digest(film) == digest(night.folder / f"{name}.mp4")


def test_status_and_report_tell_all(night: Night) -> None:
    run = CliRunner().invoke
    status = json.loads(run(batch_app, ["status", str(night.folder), "--json"]).stdout)
    assert (status["jobs"], status["done"], status["failed"]) == (9, 8, 1)
    lines = run(batch_app, ["status", str(night.folder)]).stdout.splitlines()
    assert lines[-1] == "8 of 9 films done, 1 failed" and len(lines) == 10
    told = run(batch_app, ["report", str(night.folder)])
    assert told.exit_code == 0, told.stderr
    page = Path(told.stdout.strip()).read_text()
    assert page.count("data:image/jpeg;base64,") == 8 and 'href="fewer%20steps.mp4"' in page
    assert "unknown field &#x27;promt&#x27;" in page and "number 3, from a checkpoint" in page
    assert not re.findall(r'(?:src|href)="(?!data:)[^"]*(?<!\.mp4)"', page), "nothing but films lies outside the page"


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
