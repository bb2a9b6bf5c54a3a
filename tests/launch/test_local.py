"""Runs of several ranks end together, whatever happens to one of them: real processes, signals and messages."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

RANK = Path(__file__).parent / "rank.py"
SUPERVISOR = """
import sys
from longvid.launch import local
local.END_S = float(sys.argv[1])
sys.exit(local.run_local([sys.executable, "-P", *sys.argv[3:]], int(sys.argv[2]), "go on with --resume"))
"""
ENDLESS = 1_000_000
START_S = END_S = 120.0
"""For a busy machine. An idle one takes 3 and at most 10."""


class Run:
    """A supervisor and its ranks, in a process group of their own, as a terminal starts them."""

    def __init__(self, folder: Path, num_ranks: int, arguments: list[str], fault: str, end_s: float) -> None:
        self.folder, self.num_ranks = folder, num_ranks
        command = [sys.executable, "-P", "-c", SUPERVISOR, str(end_s), str(num_ranks), *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "FAULT": fault}
        self.errors = (folder / "errors").open("w+")
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=self.errors, start_new_session=True
        )
        self.ranks: list[int] = []
        self.port = 0

    def wait_until_running(self) -> None:
        """Until every rank is in the middle of its work; then `ranks` are their process ids."""
        wait_for(lambda: len(list(self.folder.glob("*.running"))) == self.num_ranks, START_S)
        of_rank = {}
        for file in self.folder.glob("*.running"):
            variables = dict(re.findall(r"([A-Z_]+)=([^\0]*)", Path(f"/proc/{file.stem}/environ").read_text()))
            of_rank[int(variables["RANK"])] = int(file.stem)
            self.port = int(variables["MASTER_PORT"])
        self.ranks = [of_rank[rank] for rank in range(self.num_ranks)]

    def end(self) -> tuple[int, list[str]]:
        """The exit code and what was printed, once all is over; asserts that nothing is left."""
        code = self.process.wait(START_S if not self.ranks else END_S)
        wait_for(lambda: not any(map(is_alive, self.ranks)), END_S)
        if code >= 0:
            assert not any(Path(f"/proc/{pid}").exists() for pid in self.ranks), "a zombie"
        if self.port:
            with socket.socket() as connection:
                assert connection.connect_ex(("127.0.0.1", self.port)) != 0, "the port is held"
        self.errors.seek(0)
        return code, self.errors.read().splitlines()

    def kill(self) -> None:
        """Leave nothing, whatever the test found."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        self.errors.close()


def wait_for(condition: Callable[[], bool], timeout: float) -> None:
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, "it takes too long"
        time.sleep(0.05)


def is_alive(pid: int) -> bool:
    """Whether a process runs; one that nobody has asked for its exit code does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


Start = Callable[..., Run]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    runs: list[Run] = []

    def start_run(num_ranks: int = 2, units: int = ENDLESS, fault: str = "", code: str = "", end_s: float = 8.0) -> Run:
        """Ranks that work together, or that run some code."""
        folder = tmp_path / str(len(runs))
        folder.mkdir()
        arguments = ["-c", code, str(folder)] if code else [str(RANK), str(folder), str(units)]
        runs.append(Run(folder, num_ranks, arguments, fault, end_s))
        return runs[-1]

    yield start_run
    for run in runs:
        run.kill()


def only_error(lines: list[str]) -> str:
    """The single line of error, which must end with how to go on."""
    [error] = [line for line in lines if line.startswith("longvid: error: ")]
    assert error.endswith("; go on with --resume"), error
    return error.removeprefix("longvid: error: ")


def test_ranks_that_end_in_order_leave_no_word(start: Start) -> None:
    assert start(units=30).end() == (0, [])


@pytest.mark.parametrize("rank", [0, 2])
def test_a_killed_rank_ends_all_and_is_named(start: Start, rank: int) -> None:
    run = start(num_ranks=3)
    run.wait_until_running()
    os.kill(run.ranks[rank], signal.SIGKILL)
    code, lines = run.end()
    assert code == 3 and len(lines) == 1
    assert re.match(rf"rank {rank} \(stage {rank}\) was killed by signal 9 .*, at forward c\d+;", only_error(lines))


def test_a_rank_that_gives_no_sign_of_life_ends_all(start: Start) -> None:
    runs = [start(), start()]
    for rank, run in enumerate(runs):
        run.wait_until_running()
        os.kill(run.ranks[rank], signal.SIGSTOP)
    for rank, run in enumerate(runs):
        code, lines = run.end()
        assert code == 3 and len(lines) == 1
        expected = rf"rank {rank} \(stage {rank}\) has given no sign of life for 4 s, at forward c\d+;"
        assert re.match(expected, only_error(lines))


def test_the_failure_of_a_rank_is_told_once_by_the_leader(start: Start) -> None:
    code, lines = start(fault="1:failure").end()
    assert code == 3 and len(lines) == 1
    assert only_error(lines).startswith("rank 1 (stage 1) failed: the disk is full: film.mp4, at forward c10;")


def test_a_bug_in_a_rank_shows_its_trace(start: Start) -> None:
    code, lines = start(fault="1:bug").end()
    assert code == 3
    assert only_error(lines).startswith("rank 1 (stage 1) failed: KeyError: 'nowhere', at forward c10;")
    assert any("Traceback" in line for line in lines)


def test_wrong_input_is_told_by_the_leader_alone(start: Start) -> None:
    assert start(fault="all:input").end() == (2, ["longvid: error: line 3: no such thing"])


def test_wrong_input_that_the_leader_meets_on_the_way_ends_all(start: Start) -> None:
    assert start(fault="0:input").end() == (2, ["longvid: error: line 3: no such thing"])


def test_a_rank_that_cannot_end_is_ended(start: Start) -> None:
    run = start(fault="1:stuck")
    run.wait_until_running()
    code, lines = run.end()
    assert code == 3 and only_error(lines).startswith("rank 1 (stage 1) failed: stuck")


def test_a_rank_that_vanishes_before_the_ranks_have_met_is_named(start: Start) -> None:
    code, lines = start(fault="1:exit early").end()
    # Its stage and work are known once its first heartbeat is in the store, which may be too late.
    assert code == 3 and re.match(r"rank 1( \(stage 1\))? ended with exit code 7(, at forward c0)?;", only_error(lines))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_and_a_stop_of_all_processes_interrupt_once(start: Start, number: int) -> None:
    run = start()
    run.wait_until_running()
    os.killpg(run.process.pid, number)
    assert run.end() == (130, ["longvid: interrupted"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_the_supervisor_alone_interrupts_all(start: Start, number: int) -> None:
    run = start()
    run.wait_until_running()
    os.kill(run.process.pid, number)
    assert run.end() == (130, ["longvid: interrupted"])


def test_a_signal_to_another_rank_asks_the_leader_to_stop(start: Start) -> None:
    run = start()
    run.wait_until_running()
    os.kill(run.ranks[1], signal.SIGTERM)
    assert run.end() == (130, ["longvid: interrupted"])


def test_ranks_end_when_their_supervisor_is_killed(start: Start) -> None:
    run = start()
    run.wait_until_running()
    run.process.kill()
    code, lines = run.end()
    assert code == -signal.SIGKILL and len(lines) <= 1


ENTER = "import os, pathlib, signal, sys, time; rank = int(os.environ['RANK'])\n"
DEAF = f"""{ENTER}
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
pathlib.Path(sys.argv[1], str(os.getpid()) + ".running").touch()
"""
CRASH = """
word = pathlib.Path(sys.argv[1], "last word")
if rank:
    word.touch()
    {}
while not word.exists():
    time.sleep(0.05)
time.sleep(1.5)
sys.exit(130)
"""
"""The leader ends as if it were asked to, a moment after the other rank has crashed."""


def test_ranks_that_do_not_end_are_killed(start: Start) -> None:
    code, lines = start(code=f"{DEAF}\nrank or sys.exit(1)\ntime.sleep(3600)", end_s=1.0).end()
    assert code == 3 and only_error(lines).startswith("rank 0 ended with exit code 1;")


def test_a_second_ctrl_c_kills(start: Start) -> None:
    run = start(code=f"{DEAF}\ntime.sleep(3600)")
    run.wait_until_running()
    os.killpg(run.process.pid, signal.SIGINT)
    time.sleep(1.5)
    assert all(map(is_alive, run.ranks))
    os.killpg(run.process.pid, signal.SIGINT)
    assert run.end() == (130, ["longvid: interrupted"])


def test_what_a_rank_said_before_it_crashed_is_shown(start: Start) -> None:
    crash = "sys.stderr.write('longvid: rendering\\nmalloc: corrupted\\n'); os.abort()"
    code, lines = start(code=f"{ENTER}{CRASH.format(crash)}").end()
    assert code == 3 and only_error(lines).startswith("rank 1 was killed by signal 6 (SIGABRT);")
    assert [line for line in lines if "longvid" not in line] == ["malloc: corrupted"]


def test_a_rank_that_cannot_even_load_tells_its_own_words(start: Start) -> None:
    crash = "sys.exit(print('longvid: error: no memory', file=sys.stderr) or 3)"
    code, lines = start(code=f"{ENTER}{CRASH.format(crash)}").end()
    assert code == 3 and only_error(lines) == "rank 1 failed: no memory; go on with --resume"
