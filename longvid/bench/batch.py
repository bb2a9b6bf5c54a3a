"""`longvid bench batch`: many small films with the batch layer and without, and while workers are killed.

Three runs of the same jobs, one after the other: plain `Engine.render` in as many processes as there are workers, each
with its share; `longvid batch`; and `longvid batch` while a random worker is killed every few seconds.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longvid.batch.jobs import Defaults, Job, read_jobs
from longvid.doctor import cpu_facts, package_version
from longvid.errors import RuntimeFailure

COLOURS, BACKGROUNDS = ("red", "green", "yellow", "white"), ("blue", "purple")
SHAPES, MOTIONS = ("circle", "square", "triangle", "ring", "diamond"), ("left", "right", "up", "down")
SETTINGS = ("runtime.threads=1", "runtime.checkpoint_s=1")
MAX_RETRIES = 1000
"""The killer does not choose its victims by what they have suffered."""
LOOK_S = 0.05


@dataclass(frozen=True)
class BatchBench:
    """What is run: `jobs` films of `seconds` in `steps` steps on `workers`.

    One of them is killed every `kill_s` seconds, if a film was made since the last kill.
    """

    jobs: int = 200
    workers: int = 2
    seconds: float = 1.0
    steps: int = 4
    kill_s: float = 8.0
    seed: int = 0

    def write_jobs(self, path: Path) -> None:
        """The prompt file."""
        rng = random.Random(self.seed)
        lines = []
        for seed in range(self.jobs):
            what = f"a {rng.choice(('large', 'small'))} {rng.choice(COLOURS)} {rng.choice(SHAPES)}"
            prompt = f"{what} moving {rng.choice(MOTIONS)} over a {rng.choice(BACKGROUNDS)} background"
            lines.append(json.dumps({"prompt": prompt, "seconds": self.seconds, "seed": seed}))
        path.write_text("\n".join(lines))

    @property
    def overrides(self) -> tuple[str, ...]:
        """Settings of every run."""
        return (f"sampler.steps={self.steps}", *SETTINGS)


def bench_batch(bench: BatchBench, say: Callable[[str], None]) -> dict[str, Any]:
    """Run all three. Times hold all that a user waits for, loading too.

    `lost` are jobs without a film after the kills, `duplicated` films that were made again after they were there or
    that nobody ordered. `efficiency` is the plain run's time over the batch's, `efficiency_killed` over that with
    kills. `hashes_equal`: all three runs made the same bytes. Raises RuntimeFailure where a run fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        jobs = root / "jobs.jsonl"
        bench.write_jobs(jobs)
        say(f"{bench.jobs} films in {bench.workers} plain processes")
        plain_s = _run_plain(bench, jobs, root / "plain")
        say(f"{plain_s:.1f} s; longvid batch")
        calm = _run_batch(bench, jobs, root / "calm", None)
        say(f"{calm.seconds:.1f} s; with a worker killed every {bench.kill_s:g} s")
        killed = _run_batch(bench, jobs, root / "killed", random.Random(bench.seed))
        say(f"{killed.seconds:.1f} s, {killed.kills} kills")
        names = {item.name for item in read_jobs([jobs], Defaults())}
        films = [_digests(root / kind) for kind in ("plain", "calm", "killed")]
    return {
        "jobs": bench.jobs,
        "lost": len(names - films[2].keys()),
        "duplicated": killed.remade + len(films[2].keys() - names),
        "efficiency": plain_s / calm.seconds,
        "efficiency_killed": plain_s / killed.seconds,
        "hashes_equal": films[0] == films[1] == films[2],
        "workers": bench.workers,
        "kills": killed.kills,
        "kill_s": bench.kill_s,
        "plain_s": plain_s,
        "batch_s": calm.seconds,
        "killed_s": killed.seconds,
        "jobs_per_minute": bench.jobs / calm.seconds * 60,
        "machine": {
            "cpu": cpu_facts()["name"],
            "cores": cpu_facts()["cores"],
            **{name: package_version(name) for name in ("torch", "longvid")},
        },
    }


@dataclass(frozen=True)
class _Ran:
    seconds: float
    kills: int
    remade: int


def _run_plain(bench: BatchBench, jobs: Path, folder: Path) -> float:
    """Each process loads the model and renders every n-th job."""
    folder.mkdir()
    command = [sys.executable, "-P", "-m", "longvid.bench.batch", str(jobs), str(folder)]
    began = time.monotonic()
    share = [[str(i), str(bench.workers), *bench.overrides] for i in range(bench.workers)]
    processes = [subprocess.Popen([*command, *arguments], stderr=subprocess.DEVNULL) for arguments in share]
    codes = [process.wait() for process in processes]
    if any(codes):
        raise RuntimeFailure("bench batch: a plain process failed")
    return time.monotonic() - began


def render_share(jobs: Path, folder: Path, first: int, step: int, overrides: Sequence[str]) -> None:
    """The work of one plain process."""
    from longvid.engine import Engine

    found = [item for item in read_jobs([jobs], Defaults()) if isinstance(item, Job)]
    engine = Engine.load(overrides=overrides)
    for job in found[first::step]:
        engine.render(job.script, folder / f"{job.name}.mp4")


def _run_batch(bench: BatchBench, jobs: Path, folder: Path, killer: random.Random | None) -> _Ran:
    """`longvid batch`, its films watched; with a killer, its workers killed."""
    command = [sys.executable, "-P", "-m", "longvid", "batch", str(jobs), "--out", str(folder)]
    command += ["--workers", str(bench.workers), "--max-retries", str(MAX_RETRIES)]
    command += [part for override in bench.overrides for part in ("--set", override)]
    began = time.monotonic()
    kills, next_kill, films_then = 0, began + bench.kill_s, 0
    seen: dict[str, int] = {}
    remade: set[str] = set()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
        while process.poll() is None:
            time.sleep(LOOK_S)
            for film in folder.glob("*.mp4"):
                inode = film.stat().st_ino
                if seen.setdefault(film.name, inode) != inode:
                    remade.add(film.name)
            # On a machine so slow that no film is made between two kills, the batch would never end.
            is_due = time.monotonic() >= next_kill and len(seen) > films_then
            if killer and is_due and (workers := _children(process.pid)):
                with suppress(ProcessLookupError):
                    os.kill(killer.choice(workers), signal.SIGKILL)
                kills, next_kill, films_then = kills + 1, time.monotonic() + bench.kill_s, len(seen)
        seconds = time.monotonic() - began
        if process.returncode:
            output.seek(0)
            raise RuntimeFailure(
                f"bench batch: longvid batch failed:\n{output.read().decode(errors='replace')[-2000:]}"
            )
    return _Ran(seconds, kills, len(remade))


def _children(pid: int) -> list[int]:
    """The processes that a process started (Linux)."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            # The name, in brackets, may hold anything.
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
    return sorted(found)


def _digests(folder: Path) -> dict[str, str]:
    return {film.stem: hashlib.sha256(film.read_bytes()).hexdigest() for film in folder.glob("*.mp4")}


def as_text(result: dict[str, Any]) -> str:
    """The result of `bench_batch` for people."""
    bytes_are = "equal" if result["hashes_equal"] else "NOT EQUAL"
    times = f"plain processes {result['plain_s']:.1f} s, batch {result['batch_s']:.1f} s"
    with_kills = f"{result['killed_s']:.1f} s ({result['efficiency_killed']:.1%})"
    lost = f"{result['lost']} films lost, {result['duplicated']}"
    lines = [
        f"{result['jobs']} films on {result['workers']} workers: {times}: efficiency {result['efficiency']:.1%}",
        f"{result['kills']} workers killed: {with_kills}, {lost} duplicated; bytes are {bytes_are}",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    _jobs, _folder, _first, _step, *_overrides = sys.argv[1:]
    render_share(Path(_jobs), Path(_folder), int(_first), int(_step), _overrides)
