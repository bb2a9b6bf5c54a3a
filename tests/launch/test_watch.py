"""Watchdogs without a supervisor, as under mpirun: rank 0 hosts the store."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from longvid.errors import RuntimeFailure
from longvid.launch.env import RankEnv, Rendezvous
from longvid.launch.report import Beat, Report, beat_key
from longvid.launch.watch import Limits, Watch

RANK = Path(__file__).parent / "rank.py"
START_S = END_S = 120.0
QUICK = Limits(beat_s=0.05, lost_s=2.0, settle_s=0.5, connect_s=120.0)


@pytest.fixture
def ranks(tmp_path: Path) -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for process in started:
        process.kill()
        process.communicate()


def free_port() -> int:
    """A port below those that the kernel gives to whoever asks for any: it stays free until it is used."""
    while True:
        port = random.randrange(20_000, 32_768)
        with contextlib.suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port


def start(ranks: list[subprocess.Popen[str]], folder: Path, units: int, fault: str = "") -> None:
    """Two ranks by torchrun's variables."""
    port = free_port()
    for rank in range(2):
        numbers = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {**os.environ, **{name: str(number) for name, number in numbers.items()}}
        environment |= {"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", "FAULT": fault, "GLOO_SOCKET_IFNAME": "lo"}
        environment |= {"TORCH_CPP_LOG_LEVEL": "ERROR"}
        command = [sys.executable, "-P", str(RANK), str(folder), str(units)]
        ranks.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True))


def wait_until_running(folder: Path) -> None:
    until = time.monotonic() + START_S
    while len(list(folder.glob("*.running"))) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)


def test_the_host_of_the_store_ends_last(ranks: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    start(ranks, tmp_path, units=30)
    assert [process.communicate(timeout=START_S)[1] for process in ranks] == ["", ""]
    assert [process.returncode for process in ranks] == [0, 0]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_other_rank_ends_when_one_is_killed(ranks: list[subprocess.Popen[str]], tmp_path: Path, rank: int) -> None:
    start(ranks, tmp_path, units=1_000_000)
    wait_until_running(tmp_path)
    ranks[rank].kill()
    _, said = ranks[1 - rank].communicate(timeout=END_S)
    assert ranks[1 - rank].returncode == 3
    assert said.startswith("longvid: error: ") and said.count("longvid: error: ") == 1
    # The leader's own store breaks with it; the loss of another shows in the messages to it.
    assert ("rank 0 (stage 0)" if rank == 0 else "onnection") in said


def test_an_interruption_of_the_leader_ends_the_other(ranks: list[subprocess.Popen[str]], tmp_path: Path) -> None:
    start(ranks, tmp_path, units=1_000_000)
    wait_until_running(tmp_path)
    ranks[0].send_signal(signal.SIGINT)
    assert [process.wait(END_S) for process in ranks] == [130, 130]


def watch_of_two(rank: int, port: int, failures: list[Exception], limits: Limits = QUICK) -> Watch:
    env = RankEnv(rank, 2, rank, 2, "torchrun", Rendezvous("127.0.0.1", port))
    return Watch(env, name=lambda r: f"rank {r}", status=lambda: "work", on_failure=failures.append, limits=limits)


def test_a_rank_that_has_closed_is_not_missed() -> None:
    port, failures = free_port(), []
    with watch_of_two(0, port, failures):
        with watch_of_two(1, port, failures):
            time.sleep(0.5)
        time.sleep(1.5 * QUICK.lost_s)
    assert not failures


def test_all_ranks_raise_the_first_failure() -> None:
    port, failures = free_port(), []
    long = Limits(beat_s=0.05, lost_s=5.0, settle_s=0.5, end_s=60.0)
    leader, other = watch_of_two(0, port, failures, long), watch_of_two(1, port, failures, long)
    with pytest.raises(RuntimeFailure, match=r"^rank 1 failed: no memory, at work$"), leader:
        with pytest.raises(RuntimeFailure, match=r"^no memory$"), other:
            raise RuntimeFailure("no memory")
        # What follows from it on this rank gives way to it.
        raise RuntimeError("connection reset by peer")
    for watch in (leader, other):
        watch.close()  # this process goes on, so they must not end it
    assert [str(failure) for failure in failures] in ([], ["rank 1 failed: no memory, at work"])


STORE = """
import sys, time
from torch.distributed import TCPStore
store = TCPStore("127.0.0.1", int(sys.argv[1]), is_master=True, wait_for_workers=False)
print("ready", flush=True)
time.sleep(600)
"""


def test_a_store_that_does_not_answer_is_lost(ranks: list[subprocess.Popen[str]]) -> None:
    """As behind a cable that is cut: the connection stays open."""
    port, failures = free_port(), []
    ranks.append(subprocess.Popen([sys.executable, "-c", STORE, str(port)], stdout=subprocess.PIPE, text=True))
    assert ranks[0].stdout and ranks[0].stdout.readline() == "ready\n"
    env = RankEnv(1, 2, 1, 2, "torchrun", Rendezvous("127.0.0.1", port, is_hosted=True))
    limits = Limits(beat_s=0.05, lost_s=60.0, silent_s=1.0, end_s=60.0)
    with Watch(env, name=str, status=str, on_failure=failures.append, limits=limits):
        ranks[0].send_signal(signal.SIGSTOP)
        until = time.monotonic() + END_S
        while not failures:
            assert time.monotonic() < until
            time.sleep(0.05)
    assert str(failures[0]).startswith(f"the ranks' store at 127.0.0.1:{port} has not answered for 1 s: ")


def test_beats_and_reports_are_read_as_they_were_written() -> None:
    beat, report = Beat(3, "rank 1 (stage 1)", "forward c5 k3"), Report(2, "rank 2 failed: “x”", is_lost=True)
    assert Beat.decode(beat.encode()) == beat and Report.decode(report.encode()) == report
    assert beat.encode().isascii() and Beat.decode("-") is Report.decode("-") is None
    assert beat_key(7) == "beat/7"
