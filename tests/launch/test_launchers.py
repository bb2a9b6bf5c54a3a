"""One film under every launcher, and after SIGTERM and a resume: the same bytes. Real launchers, real processes."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.util
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

STORY = """
seed: 5
scenes:
  - {prompt: "a large red circle moving left over a blue background", for: 12s}
"""
SETTINGS = ["runtime.threads=1", "sampler.steps=2", "queue.chunk_latents=2", "queue.context_latents=1"]
SETTINGS += ["output.segment_s=0.5", "runtime.checkpoint_s=1000"]
TIMEOUT_S = 240
TOKEN = "hf_not_for_logs"
MODULE = [sys.executable, "-P", "-m", "longvid"]


def render(story: Path, film: Path, *options: str) -> list[str]:
    sets = [part for setting in SETTINGS for part in ("--set", setting)]
    return ["render", str(story), "-o", str(film), *sets, *options]


def environment() -> dict[str, str]:
    root = {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**os.environ, **root, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1", "HF_TOKEN": TOKEN}


def run(arguments: list[str], folder: Path) -> str:
    done = subprocess.run(
        arguments, cwd=folder, env=environment(), capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stderr


def digest(film: Path) -> str:
    return hashlib.sha256(film.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("story") / "story.yaml"
    path.write_text(STORY)
    return path


@pytest.fixture(scope="module")
def expected(story: Path) -> str:
    """The film of `--ranks 2`."""
    film = story.with_name("expected.mp4")
    run([*MODULE, *render(story, film, "--ranks", "2")], story.parent)
    return digest(film)


def mpirun() -> list[str]:
    if importlib.util.find_spec("mpi4py") is None:
        pytest.skip("mpi4py is missing")
    beside = str(Path(sys.executable).parent)
    program = shutil.which("mpirun", path=os.pathsep.join([beside, os.environ["PATH"]]))
    if program is None:
        pytest.skip("mpirun is missing")
    return [program, "-np", "2", "--oversubscribe", *MODULE]


def deepspeed(folder: Path) -> list[str]:
    if importlib.util.find_spec("deepspeed") is None:
        pytest.skip("deepspeed is missing")
    hosts = folder / "hosts"
    hosts.write_text("localhost slots=2\n")
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    here = ["--no_ssh", "--node_rank", "0", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    return [sys.executable, "-m", "deepspeed.launcher.runner", "--hostfile", str(hosts), *here, "--module", "longvid"]


def test_mpirun_renders_the_same_film(story: Path, expected: str, tmp_path: Path) -> None:
    said = run([*mpirun(), *render(story, tmp_path / "film.mp4")], tmp_path)
    assert digest(tmp_path / "film.mp4") == expected
    assert said.count("rendering 12.0 s of film") == 1


def test_the_launcher_of_deepspeed_renders_the_same_film(story: Path, expected: str, tmp_path: Path) -> None:
    run([*deepspeed(tmp_path), *render(story, tmp_path / "film.mp4")], tmp_path)
    assert digest(tmp_path / "film.mp4") == expected


def listening(supervisor: int) -> set[str]:
    """The IPv4 and IPv6 addresses, as Linux writes them in hexadecimal, at which a process and its children listen."""
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    sockets = set()
    for descriptor in (file for pid in (supervisor, *children) for file in Path(f"/proc/{pid}/fd").iterdir()):
        with contextlib.suppress(FileNotFoundError):
            sockets.add(os.readlink(descriptor))
    entries = [line.split() for name in ("tcp", "tcp6") for line in Path(f"/proc/net/{name}").read_text().splitlines()]
    is_listening = "0A"
    found = (entry for entry in entries if entry[3] == is_listening and f"socket:[{entry[9]}]" in sockets)
    return {entry[1].partition(":")[0] for entry in found}


class Stopped:
    """A render that was sent a signal as soon as it had a segment, or was complete before."""

    def __init__(self, arguments: list[str], film: Path, number: int) -> None:
        self.film = film
        self.listening: set[str] = set()
        with (film.parent / "stderr").open("w+") as errors:
            process = subprocess.Popen(
                arguments, cwd=film.parent, env=environment(), stderr=errors, start_new_session=True
            )
            try:
                until = time.monotonic() + TIMEOUT_S
                while not (self.folder / "seg_00000.ts").exists() and process.poll() is None:
                    assert time.monotonic() < until, "it did not come to that"
                    time.sleep(0.01)
                with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # the film is complete
                    self.listening = listening(process.pid)
                process.send_signal(number)
                self.code = process.wait(TIMEOUT_S)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            errors.seek(0)
            self.said = errors.read()
        if film.exists():
            pytest.skip("the film was complete before it could be stopped")

    @property
    def folder(self) -> Path:
        return self.film.with_name(f"{self.film.name}.longvid")

    def round(self) -> int:
        """The round that was saved, counted from 1."""
        return int(json.loads((self.folder / "state/manifest.json").read_text())["round"]) + 1


def test_sigterm_saves_the_state_and_a_lone_rank_goes_on(story: Path, expected: str, tmp_path: Path) -> None:
    film, log, metrics = tmp_path / "film.mp4", tmp_path / "log", tmp_path / "film.prom"
    reports = ["--log", "json", "--log-file", str(log), "--metrics", str(metrics)]
    stopped = Stopped([*MODULE, *render(story, film, "--ranks", "2", *reports)], film, signal.SIGTERM)
    assert stopped.listening == {"0100007F"}, "somebody listens beyond the loopback"
    line = f"stopped, and saved after round {stopped.round()}; the same command with --resume goes on"
    assert stopped.code == 0 and stopped.said.splitlines()[-1] == f"longvid: {line}"
    assert (stopped.folder / "film.m3u8").read_text().endswith("#EXT-X-ENDLIST\n")
    entry = json.loads(log.read_text().splitlines()[-1])
    assert {name: entry[name] for name in ("event", "state", "exit_code", "message")} == {
        "event": "ended",
        "state": "preempted",
        "exit_code": 0,
        "message": line,
    }
    assert 'state="preempted"} 1' in metrics.read_text()
    run([*MODULE, *render(story, film, "--resume", *reports)], tmp_path)
    assert digest(film) == expected
    events = [json.loads(line)["event"] for line in log.read_text().splitlines()]
    assert events.count("started") == 2 and events[-1] == "film_done"
    assert 'state="done"} 1' in metrics.read_text()
    assert TOKEN not in stopped.said + log.read_text() + metrics.read_text()


def test_torchrun_passes_sigterm_on_and_three_ranks_go_on(story: Path, expected: str, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *MODULE[2:]]
    stopped = Stopped([*torchrun, *render(story, film)], film, signal.SIGTERM)
    assert f"longvid: stopped, and saved after round {stopped.round()};" in stopped.said
    assert stopped.said.count("longvid: ") == 1
    run([*MODULE, *render(story, film, "--resume", "--ranks", "3")], tmp_path)
    assert digest(film) == expected
