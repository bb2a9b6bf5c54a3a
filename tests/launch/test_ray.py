"""Films by gangs of a Ray cluster of several nodes, of which ranks, a node and the controller are killed."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Pipe
from pathlib import Path
from typing import Any

import pytest

from longvid.batch.folder import BatchFolder, can_resume
from longvid.batch.jobs import Defaults, Job
from longvid.batch.remote import QUESTIONS, RemoteTable
from longvid.batch.table import Table
from longvid.errors import InputError, RuntimeFailure
from longvid.events import ChunkDone, Event, FilmDone, Notice, RoundDone, Started
from longvid.journal import JsonLines
from longvid.launch import cluster as clusters
from longvid.launch import seat as seats
from longvid.launch.env import rank_of
from longvid.launch.gang import last_word, variables_of
from longvid.launch.ray import event_of
from longvid.launch.seat import Asked, Ended, Order, Place, Said, Seat
from longvid.manifest import MANIFEST, state_folder

PROMPT = "a large red circle moving left over a blue background"
STORY = f"seed: 5\nscenes:\n  - {{prompt: {PROMPT}, for: 15s}}\n"
SETTINGS = ["runtime.threads=1", "sampler.steps=2", "queue.chunk_latents=2", "queue.context_latents=1"]
SETTINGS += ["output.segment_s=0.5", "runtime.checkpoint_s=0.2"]
SETS = [part for setting in SETTINGS for part in ("--set", setting)]
LONGVID = [sys.executable, "-P", "-m", "longvid"]
JOBS = [
    {"name": "long", "prompt": PROMPT, "for": "15s", "seed": 5},
    *({"name": f"short {i}", "prompt": PROMPT, "for": "5f", "seed": i} for i in range(3)),
]
CHILD = """
import os, longvid.batch.remote
from longvid.launch.env import rank_of
env = rank_of(os.environ)
assert env.supervisor == os.getppid()
print(longvid.batch.remote.remote_table(env.wire).settings("key"))
raise SystemExit(7)
"""
PATIENCE_S = 240
LOOPBACKS = {"0100007F", "0000000000000000FFFF00000100007F"}
"""127.0.0.1 and what IPv6 makes of it, as Linux writes them."""


# --------------------------------------------------------------------------------------------------------- the parts


def test_ranks_are_told_who_they_are_and_meet_at_the_first_ones_machine() -> None:
    places = [Place("x", "10.0.0.1", 7), Place("y", "10.0.0.2", 8), Place("z", "10.0.0.1", 9)]
    told = [
        rank_of({**variables, "LONGVID_SUPERVISOR": "1", "LONGVID_SEAT": "1"}) for variables in variables_of(places)
    ]
    found = [(env.rank, env.world_size, env.local_rank, env.local_world_size) for env in told if env]
    assert found == [(0, 3, 0, 2), (1, 3, 0, 1), (2, 3, 1, 2)]
    assert {(env.rendezvous.host, env.rendezvous.port) for env in told if env and env.rendezvous} == {("10.0.0.1", 7)}


@pytest.mark.parametrize(
    "event",
    [
        Started(9, 2, 3, 64, 32, 16.0),
        RoundDone(1, 3, 1, 2, 6),
        ChunkDone(1, 2, 5),
        Notice("“mind”"),
        FilmDone(Path("/a/b.mp4"), 9, 1.5),
    ],
)
def test_events_survive_the_log_of_the_leader(event: Event) -> None:
    file = io.StringIO()
    JsonLines(file).show(event)
    assert event_of(file.getvalue()) == event


def test_the_last_word_is_that_of_the_log_or_of_stderr() -> None:
    file = io.StringIO()
    JsonLines(file).end(RuntimeFailure("the disk is full"))
    assert last_word(["x", file.getvalue(), "y"]) == "the disk is full"
    assert last_word(["longvid: error: no", "y"]) == "no" and last_word(['{"time": 3, "cut', "y"]) == ""
    assert event_of(file.getvalue()) is event_of("text") is None


@pytest.mark.parametrize(("nodes", "ranks", "threads"), [([2], 2, 1), ([8, 8], 3, 4), ([8, 4], 2, 4), ([1], 9, 1)])
def test_processors_are_shared_so_that_every_rank_has_a_place(nodes: list[int], ranks: int, threads: int) -> None:
    assert clusters.share_of_processors(nodes, ranks) == threads


def test_without_ray_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(InputError, match=r"--ray needs Ray, .*: pip install 'longvid\[ray\]'"):
        clusters.import_ray()


def hear(seat: Seat, until: type) -> list[Any]:
    """What a seat tells, until it has told a thing of this kind."""
    found: list[Any] = []
    end = time.monotonic() + PATIENCE_S
    while not any(isinstance(message, until) for message in found):
        assert time.monotonic() < end
        found += seat.listen(0.5)
    return found


def test_a_seat_relays_what_its_rank_says_and_asks(tmp_path: Path) -> None:
    (tmp_path / "child.py").write_text(CHILD)
    seat = Seat()
    variables = {**variables_of([Place("x", "127.0.0.1", 7)])[0], "PYTHONPATH": str(tmp_path)}
    seat.start(Order(["child"], str(tmp_path), variables, has_wire=True))
    assert hear(seat, Asked) == [Asked("settings", ("key",))]
    seat.answer("value")
    assert hear(seat, Ended) == [Said("value"), Ended(7, ("value",))]
    seat.start(Order(["this"], str(tmp_path / "nowhere")))
    [end] = hear(seat, Ended)
    assert end.code == 2 and "nowhere: is not on" in last_word(end.lines)


def test_a_seat_that_nobody_hears_ends_its_rank(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(seats, "FENCE_S", 1.0)
    (tmp_path / "child.py").write_text("import time; time.sleep(600)")
    seat = Seat()
    seat.start(Order(["child"], str(tmp_path), {"PYTHONPATH": str(tmp_path)}))
    time.sleep(3.5)
    assert hear(seat, Ended) == [Ended(-signal.SIGKILL)]


def test_a_table_answers_over_a_connection(tmp_path: Path) -> None:
    table = Table(tmp_path)
    table.add([(Job("cat", "jobs.txt:1", {"scenes": [{"prompt": "a cat", "for": "1s"}]}, Defaults().settings()), "x")])
    ours, theirs = Pipe()
    table.close()

    def answer() -> None:
        own = Table(tmp_path)
        with contextlib.suppress(EOFError):
            while True:
                name, arguments = ours.recv()
                assert name in QUESTIONS
                ours.send(getattr(own, name)(*arguments))

    thread = threading.Thread(target=answer)
    thread.start()
    remote = RemoteTable(theirs)
    key = remote.next_settings()
    assert key and "sampler" in remote.settings(key)
    lease = remote.claim("host:1:1", key)
    assert lease and remote.renew(lease, 0.5) and remote.release(lease) and not remote.complete(lease, {})
    again = remote.claim("host:1:2", key)
    assert again and remote.lose(again, "died", 3) and remote.claim("host:1:3", key) and remote.next_settings() is None
    theirs.close()
    thread.join(PATIENCE_S)


# --------------------------------------------------------------------------------------------------------- a cluster


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}


def digest(film: Path) -> str:
    return hashlib.sha256(film.read_bytes()).hexdigest()


def stat_of(pid: int) -> list[str]:
    """State, parent, group, session, ...; empty for a process that is gone."""
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return []


def processes() -> list[int]:
    return [int(place.name) for place in Path("/proc").glob("[0-9]*")]


def of_session(session: int) -> list[int]:
    """The living processes of a session."""
    found = [(pid, stat_of(pid)) for pid in processes()]
    return [pid for pid, stat in found if stat and stat[3] == str(session) and stat[0] != "Z"]


def rank_pid(film: Path, rank: int) -> int | None:
    """The process of a rank that renders a film, by its command line and its environment."""
    for pid in processes():
        with contextlib.suppress(OSError):
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            if str(film).encode() in command and {f"RANK={rank}".encode(), b"LONGVID_SEAT=1"} <= set(variables):
                return pid
    return None


def worker_pid(owner: str | None) -> int | None:
    """The process of a batch's worker."""
    for pid in processes():
        with contextlib.suppress(OSError):
            if f'"owner": "{owner}"' in Path(f"/proc/{pid}/cmdline").read_text():
                return pid
    return None


def listening(pids: list[int]) -> set[str]:
    """The addresses at which processes listen, as Linux writes them."""
    sockets = set()
    for pid in pids:
        with contextlib.suppress(OSError):
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    sockets.add(os.readlink(descriptor))
    entries = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    is_listening = "0A"
    found = (entry for entry in entries if entry[3] == is_listening and f"socket:[{entry[9]}]" in sockets)
    return {entry[1].partition(":")[0] for entry in found}


class Running:
    """A command that runs, in a session of its own; what it says goes to a file."""

    def __init__(self, arguments: list[str], log: Path) -> None:
        self.log = log
        with log.open("ab") as file:
            self.process = subprocess.Popen(
                [*LONGVID, *arguments], env=environment(), stdout=file, stderr=file, start_new_session=True
            )

    def wait_for(self, what: Callable[[], Any]) -> Any:
        until = time.monotonic() + PATIENCE_S
        while not (found := what()):
            assert self.process.poll() is None, self.log.read_text()
            assert time.monotonic() < until, self.log.read_text()
            time.sleep(0.02)
        return found

    def end(self) -> str:
        """What it said, once it has ended well."""
        assert self.process.wait(PATIENCE_S) == 0, self.log.read_text()
        return self.log.read_text()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def is_all_gone(self) -> bool:
        """Whether nothing is left of it, or will be in a moment."""
        until = time.monotonic() + 30
        while left := of_session(self.process.pid):
            if time.monotonic() > until:
                print([Path(f"/proc/{pid}/comm").read_text() for pid in left])
                return False
            time.sleep(0.1)
        return True


def require_ray() -> None:
    if importlib.util.find_spec("ray") is None:
        pytest.skip("ray is missing")


@pytest.fixture(scope="module")
def cluster() -> Iterator[Any]:
    """A head without processors, and two nodes with one each."""
    require_ray()
    folder = tempfile.mkdtemp(prefix="ray-", dir="/tmp")  # pytest's are too long for names of sockets
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")  # it stays on the loopback
        patch.setenv("RAY_USAGE_STATS_ENABLED", "0")
        patch.setenv("RAY_TMPDIR", folder)
        from ray.cluster_utils import Cluster

        node = {"object_store_memory": 80 << 20}
        head = {"num_cpus": 0, "include_dashboard": False, **node}
        found = Cluster(initialize_head=True, head_node_args=head)
        try:
            found.nodes = [found.add_node(num_cpus=1, **node) for _ in range(2)]
            yield found
        finally:
            found.shutdown()
            shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("story") / "story.yaml"
    path.write_text(STORY)
    return path


@pytest.fixture(scope="module")
def expected(story: Path) -> str:
    """The film of `--ranks 2`."""
    film = story.with_name("expected.mp4")
    Running(["render", str(story), "-o", str(film), *SETS, "--ranks", "2"], story.with_name("log")).end()
    return digest(film)


def has_checkpoint(film: Path) -> bool:
    return (state_folder(film) / MANIFEST).exists()


def test_a_local_cluster_is_private_and_leaves_nothing(story: Path, expected: str, tmp_path: Path) -> None:
    """The controller is killed in the middle; it is started again, and then the film is that of `--ranks 2`."""
    require_ray()
    film, command = tmp_path / "film.mp4", ["render", str(story), "-o", str(tmp_path / "film.mp4"), *SETS]
    first = Running([*command, "--ray", "local", "--ranks", "2"], tmp_path / "first")
    try:
        first.wait_for(lambda: has_checkpoint(film))
        pids = of_session(first.process.pid)
        assert len(pids) > 5 and rank_pid(film, 1) in pids
        assert listening(pids) <= LOOPBACKS, "somebody listens beyond the loopback"
    finally:
        first.kill()
    assert first.is_all_gone()
    again = Running([*command, "--ray", "local", "--ranks", "2", "--resume"], tmp_path / "again")
    said = again.end()
    assert digest(film) == expected and "film.mp4: 240 frames" in said
    assert again.is_all_gone()


def test_a_gang_that_loses_a_rank_goes_on(cluster: Any, story: Path, expected: str, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    command = ["render", str(story), "-o", str(film), *SETS, "--ranks", "2", "--ray", cluster.address]
    running = Running(command, tmp_path / "log")
    try:
        running.wait_for(lambda: has_checkpoint(film))
        victim = rank_pid(film, 1)
        assert victim
        os.kill(victim, signal.SIGKILL)
        said = running.end()
    finally:
        running.kill()
    assert re.search(r"note: rank 1 was killed by signal 9 .*; another gang goes on from the checkpoint after", said)
    assert digest(film) == expected
    assert not film.with_name("film.mp4.longvid").exists()


def test_a_batch_outlives_its_controller_and_a_node(cluster: Any, expected: str, tmp_path: Path) -> None:
    """The controller dies with a gang of two ranks at work; the next one has two gangs of one, and loses a node."""
    jobs, folder = tmp_path / "jobs.jsonl", tmp_path / "films"
    jobs.write_text("\n".join([*map(json.dumps, JOBS), '{"promt": "a cat"}']))
    places = BatchFolder(folder)
    command = ["batch", str(jobs), "--out", str(folder), "--ray", cluster.address, *SETS]
    running = Running([*command, "--ranks-per-film", "2"], tmp_path / "first")
    try:
        running.wait_for((folder / "batch.sqlite").exists)
        table = Table(folder)

        def long_film(attempt: int = 1) -> Any:
            row = next((row for row in table.rows() if row.name == "long"), None)
            is_there = row and row.attempt >= attempt and can_resume(places.draft("long", row.attempt))
            return row if is_there and row and row.state == "running" else None

        first = running.wait_for(long_film)
        running.kill()
        running = Running([*command, "--workers", "2"], tmp_path / "second")
        second = running.wait_for(lambda: long_film(first.attempt + 1))
        made = {film: film.stat().st_ino for film in folder.glob("*.mp4")}
        [node] = [node for node in cluster.nodes if is_node_of(node, worker_pid(second.owner))]
        cluster.remove_node(node, allow_graceful=False)
        code = running.process.wait(PATIENCE_S)
    finally:
        running.kill()
    said = (tmp_path / "second").read_text()
    assert code == InputError.exit_code and "jobs.jsonl:5: unknown field 'promt'" in said, said
    rows = {row.name: row for row in table.rows()}
    assert {row.name for row in rows.values() if row.state == "done"} == {job["name"] for job in JOBS}, said
    assert "seat" in (rows["long"].reason or said) and rows["long"].attempt == 3 and rows["long"].result["resumed"]
    assert digest(places.film("long")) == expected
    assert {film: film.stat().st_ino for film in made} == made, "a film was made again"
    assert not list((folder / "batch.longvid" / "work").iterdir())


def is_node_of(node: Any, pid: int | None) -> bool:
    """Whether a rank's seat was started by a node's raylet."""
    assert pid
    seat = int(stat_of(pid)[1])
    raylets = [entry.process.pid for entry in node.all_processes["raylet"]]
    return int(stat_of(seat)[1]) in raylets


@pytest.mark.parametrize(
    ("address", "problem"),
    [("ray://somewhere:1", "give HOST:PORT"), ("somewhere", "give HOST:PORT"), ("127.0.0.1:1", "nobody answers there")],
)
def test_an_address_where_no_cluster_is_is_wrong_input(address: str, problem: str) -> None:
    require_ray()
    with pytest.raises(InputError, match=problem), clusters.joined(address):
        pass
