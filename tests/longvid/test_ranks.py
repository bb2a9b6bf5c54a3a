"""Films on several ranks, as real processes over gloo: the same bytes as on one, with kills and resumes in between.

A rank's imports take seconds, so most ranks are forked from `warm.py`, which has them behind it: processes of their own
that run the command line under torchrun's variables. What starts ranks is tested with fresh processes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from longvid.models.vin import Vin
from longvid.models.vin_config import VinConfig

STORY = """
seed: 5
scenes:
  - {prompt: "a large red circle moving left over a blue background", for: 60f}
  - {prompt: "a small white ring rising over a black background", for: 30f, transition: {kind: blend, over: 10f}}
  - {prompt: "a large green square standing still over a white background", for: 25f, transition: cut}
"""
SHORT = """
seed: 5
scenes:
  - {prompt: "a large red circle moving left over a blue background", for: 45f}
"""
FAST = ["runtime.threads=1", "sampler.steps=3", "queue.chunk_latents=4", "runtime.checkpoint_s=0"]
TIMEOUT_S = 600
MANIFEST = "film.mp4.longvid/state/manifest.json"


def is_saved_after(manifest: Path, done: int) -> bool:
    """Whether there is a checkpoint of that round or a later one."""
    return manifest.exists() and json.loads(manifest.read_text())["round"] >= done


def arguments(story: Path, film: Path, *options: str, settings: Sequence[str] = ()) -> list[str]:
    sets = [part for setting in (*FAST, *settings) for part in ("--set", setting)]
    return ["render", str(story), "-o", str(film), *sets, *options]


def command(story: Path, film: Path, *options: str, settings: Sequence[str] = ()) -> list[str]:
    return [sys.executable, "-P", "-m", "longvid", *arguments(story, film, *options, settings=settings)]


def digest(film: Path) -> str:
    return hashlib.sha256(film.read_bytes()).hexdigest()


# ----------------------------------------------------------------------------------------------------- forked processes


@dataclass
class Forked:
    """Processes that run side by side. `store` is where they meet, and must live as long as they."""

    pids: list[int]
    outputs: list[Path]
    warm: subprocess.Popen[str]
    store: dist.TCPStore | None = field(repr=False, default=None)

    def wait(self) -> list[int]:
        """Their exit codes."""
        timer = threading.Timer(TIMEOUT_S, self.kill)
        timer.start()
        assert self.warm.stdout
        codes: list[int] = json.loads(self.warm.stdout.readline())
        timer.cancel()
        return codes

    def kill(self) -> None:
        for pid in self.pids:
            os.kill(pid, signal.SIGKILL)

    def said(self) -> str:
        return "".join(output.read_text() for output in self.outputs)


@dataclass
class Warm:
    """The process of `warm.py`. It has one run at a time."""

    process: subprocess.Popen[str]
    folder: Path

    def start(self, program: list[str], num_ranks: int = 1) -> Forked:
        """A program as one process, or as ranks that meet at a store of this one, as torchrun's do."""
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if num_ranks > 1 else None
        outputs = [self.folder / f"rank {rank}" for rank in range(num_ranks)]
        programs = [
            {
                "environment": environment_of(rank, num_ranks, store.port) if store else {},
                "arguments": program,
                "output": str(output),
            }
            for rank, output in enumerate(outputs)
        ]
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(programs) + "\n")
        self.process.stdin.flush()
        return Forked(json.loads(self.process.stdout.readline()), outputs, self.process, store)

    def run(self, program: list[str], num_ranks: int = 1) -> None:
        forked = self.start(program, num_ranks)
        assert forked.wait() == [0] * num_ranks, forked.said()

    def render(self, story: Path, film: Path, *options: str, num_ranks: int = 1, settings: Sequence[str] = ()) -> str:
        """Render, and return the film's digest."""
        self.run(arguments(story, film, *options, settings=settings), num_ranks)
        return digest(film)


def environment_of(rank: int, num_ranks: int, port: int) -> dict[str, str]:
    numbers = {"RANK": rank, "WORLD_SIZE": num_ranks, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": num_ranks}
    variables = {name: str(number) for name, number in {**numbers, "MASTER_PORT": port}.items()}
    return {**variables, "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Warm]:
    server = [sys.executable, "-P", str(Path(__file__).with_name("warm.py"))]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # no library shall have threads to lose at a fork
    with started(server, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as process:
        yield Warm(process, tmp_path_factory.mktemp("said"))


# ------------------------------------------------------------------------------------------------------ fresh processes


@contextlib.contextmanager
def started(arguments: list[str], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """A process in a group of its own, of which nothing is left."""
    with subprocess.Popen(arguments, text=True, start_new_session=True, **options) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def run(arguments: list[str]) -> None:
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False)
    assert done.returncode == 0, done.stderr


def ranks_of(supervisor: int) -> list[int]:
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    return [int(child) for child in children]


def wait_for(condition: Callable[[], bool], seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.02)


# ---------------------------------------------------------------------------------------------------------------- films


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("story") / "story.yaml"
    path.write_text(STORY)
    return path


@pytest.fixture(scope="module")
def alone(story: Path, warm: Warm) -> str:
    """The film of one rank, with its ledger beside it."""
    return warm.render(story, story.with_name("alone.mp4"), "--ledger", str(story.with_name("alone.ledger")))


@pytest.fixture(scope="module")
def two(story: Path) -> Path:
    """The film of `longvid render --ranks 2`, with its ledger and trace beside it."""
    film = story.with_name("two.mp4")
    files = ["--ledger", str(film.with_suffix(".ledger")), "--trace", str(film.with_suffix(".json"))]
    run(command(story, film, "--ranks", "2", *files))
    return film


def test_two_ranks_of_the_command_line_give_the_same_bytes(two: Path, alone: str) -> None:
    assert digest(two) == alone


@pytest.mark.parametrize(("num_ranks", "through"), [(3, "network"), (4, "memory")])
def test_layers_over_ranks_give_the_same_bytes(
    story: Path, alone: str, warm: Warm, num_ranks: int, through: str, tmp_path: Path
) -> None:
    settings = [f"mesh.shares_memory={str(through == 'memory').lower()}"]
    assert warm.render(story, tmp_path / "film.mp4", num_ranks=num_ranks, settings=settings) == alone


def test_torchrun_gives_the_same_bytes(story: Path, alone: str, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    run([*launcher, "-m", "longvid", *arguments(story, film)])
    assert digest(film) == alone


def test_cached_left_context_and_guidance_over_ranks_give_the_same_bytes(
    story: Path, warm: Warm, tmp_path: Path
) -> None:
    settings = ["queue.left=cached", "sampler.guidance=2", "sampler.solver=unipc"]
    one = warm.render(story, tmp_path / "one.mp4", settings=settings)
    axes = [*settings, "mesh.guidance=2", "mesh.stage=2"]
    assert warm.render(story, tmp_path / "four.mp4", num_ranks=4, settings=axes) == one


def test_a_trace_shows_what_every_rank_did(two: Path) -> None:
    events = [event for event in json.loads(two.with_suffix(".json").read_text())["traceEvents"] if event["ph"] == "X"]
    for rank, names in (
        (0, ("forward", "step", "send hidden", "receive velocity", "decode", "receive frames")),
        (1, ("forward", "receive hidden", "decode", "send frames", "receive decoder")),
    ):
        seen = {" ".join(event["name"].split()) for event in events if event["pid"] == rank}
        for name in names:
            assert any(text.startswith(name) for text in seen), (rank, name)


def test_a_ledger_has_the_same_latents_on_any_number_of_ranks(story: Path, alone: str, two: Path) -> None:
    one, other = (
        {line for line in ledger.read_text().splitlines() if " latents " in line}
        for ledger in (story.with_name("alone.ledger"), two.with_suffix(".ledger"))
    )
    assert one == other != set()


# ---------------------------------------------------------------------------------------------------- kills and resumes


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all_and_the_resumed_film_is_the_same(
    story: Path, alone: str, warm: Warm, victim: int, tmp_path: Path
) -> None:
    film, manifest = tmp_path / "film.mp4", tmp_path / MANIFEST
    with started(command(story, film, "--ranks", "2"), stderr=subprocess.PIPE) as supervisor:
        wait_for(manifest.exists)
        time.sleep(random.Random(victim).random())
        ranks = ranks_of(supervisor.pid)
        if len(ranks) == 2:
            os.kill(ranks[victim], signal.SIGKILL)
        _, errors = supervisor.communicate(timeout=TIMEOUT_S)
    if supervisor.returncode == 0 or not manifest.parent.exists():  # the film was complete before the kill
        assert digest(film) == alone
        return
    assert supervisor.returncode == 3
    [message] = [line for line in errors.splitlines() if line.startswith("longvid: error")]
    assert f"rank {victim}" in message and "--resume" in message
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    # On another number of stages.
    assert warm.render(story, film, "--resume", num_ranks=3) == alone


def test_films_in_one_pipe_are_what_they_are_alone_and_so_they_are_after_a_kill(
    story: Path, alone: str, warm: Warm, tmp_path: Path
) -> None:
    """One after the other and side by side; some are complete and some not begun when a rank is killed."""
    stories = [tmp_path / name for name in ("first.yaml", "second.yaml", "third.yaml")]
    for path, text in zip(stories, (SHORT, STORY, SHORT.replace("seed: 5", "seed: 6")), strict=True):
        path.write_text(text)
    wanted = [
        warm.render(stories[0], tmp_path / "one.mp4"),
        alone,
        warm.render(stories[2], tmp_path / "three.mp4"),
    ]
    folder = tmp_path / "films"
    folder.mkdir()
    films = [folder / f"{path.stem}.mp4" for path in stories]
    together = [*arguments(stories[0], folder, settings=["mesh.films=2"]), *map(str, stories[1:])]
    ranks = warm.start(together, num_ranks=2)
    wait_for(films[0].exists)
    with contextlib.suppress(ProcessLookupError):
        os.kill(ranks.pids[1], signal.SIGKILL)
    ranks.wait()
    first = films[0].stat().st_mtime_ns
    warm.run([*together, "--resume"], num_ranks=3)
    assert [digest(film) for film in films] == wanted
    assert films[0].stat().st_mtime_ns == first
    assert sorted(path.name for path in folder.iterdir()) == sorted(film.name for film in films)


SPARSE = ["attention.policy=adaspa", "attention.crossover=always", "attention.tile=16", "attention.search_at=[0.3]"]
CACHE = ["cache.policy=taylorseer", "cache.interval=3", "cache.first_steps=2", "sampler.steps=7"]


def test_adaptive_attention_and_forecasts_over_ranks_and_after_a_kill_give_the_same_bytes(
    story: Path, warm: Warm, tmp_path: Path
) -> None:
    both = [*SPARSE, *CACHE]
    one = warm.render(story, tmp_path / "one.mp4", settings=both)
    film = tmp_path / "film.mp4"
    ranks = warm.start(arguments(story, film, settings=both), num_ranks=3)
    wait_for((tmp_path / MANIFEST).exists)
    os.kill(ranks.pids[-1], signal.SIGKILL)
    assert ranks.wait() == [3, 3, -signal.SIGKILL], ranks.said()
    assert warm.render(story, film, "--resume", num_ranks=2, settings=both) == one


@pytest.mark.parametrize(
    ("cache", "num_ranks", "axes"),
    [
        (
            ["policy=cg_taylor", "gate=9", "max_skips=1", "first_steps=2"],
            4,
            ["sampler.guidance=2", "mesh.guidance=2", "mesh.stage=2"],
        ),
        (["policy=first_block", "threshold=0.3", "first_steps=2"], 4, ["queue.left=cached"]),
        (["policy=delta_dit", "negative_every=2"], 3, ["sampler.guidance=2"]),
        (["policy=taylorseer", "level=last_layer", "interval=3", "first_steps=2"], 2, []),
        (["policy=taylorseer", "level=module", "interval=3", "first_steps=2"], 2, []),
        (
            ["policy=ras", "first_steps=2", "reset_every=3"],
            4,
            ["sampler.guidance=2", "mesh.guidance=2", "mesh.stage=2"],
        ),
    ],
)
def test_caches_over_ranks_give_the_same_bytes(
    warm: Warm, cache: list[str], num_ranks: int, axes: list[str], tmp_path: Path
) -> None:
    """Also where the first rank alone decides; and it did leave something out."""
    story = tmp_path / "short.yaml"
    story.write_text(SHORT)
    common = ["sampler.steps=6", *(axis for axis in axes if not axis.startswith("mesh"))]
    settings = [*common, *(f"cache.{setting}" for setting in cache)]
    one = warm.render(story, tmp_path / "one.mp4", settings=settings)
    assert warm.render(story, tmp_path / "many.mp4", num_ranks=num_ranks, settings=[*settings, *axes]) == one
    assert warm.render(story, tmp_path / "whole.mp4", settings=common) != one


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Global tokens for the embedded model: random ones, its gates half open."""
    torch.manual_seed(2)
    vin = Vin(VinConfig(hidden_size=256, latent_channels=8, num_layers=8, num_heads=4, tokens=5, processors=1))
    for layer in vin.layers.values():
        torch.nn.init.constant_(layer.gate, 0.3)
    folder = tmp_path_factory.mktemp("adapter")
    vin.save(folder)
    return folder


def test_global_tokens_over_ranks_and_after_a_kill_give_the_same_bytes(
    story: Path, alone: str, adapter: Path, warm: Warm, tmp_path: Path
) -> None:
    tokens = ["vin.policy=on", f"vin.path={adapter}"]
    one = warm.render(story, tmp_path / "one.mp4", settings=tokens)
    assert one != alone
    film = tmp_path / "film.mp4"
    ranks = warm.start(arguments(story, film, settings=tokens), num_ranks=3)
    wait_for((tmp_path / MANIFEST).exists)
    os.kill(ranks.pids[-1], signal.SIGKILL)
    assert ranks.wait() == [3, 3, -signal.SIGKILL], ranks.said()
    assert warm.render(story, film, "--resume", num_ranks=2, settings=tokens) == one


def test_global_tokens_travel_with_both_branches_and_with_what_a_cache_remembers(
    adapter: Path, warm: Warm, tmp_path: Path
) -> None:
    story = tmp_path / "short.yaml"
    story.write_text(SHORT)
    settings = ["sampler.steps=6", "sampler.guidance=2", "vin.policy=on", f"vin.path={adapter}"]
    settings += ["cache.policy=delta_dit", "cache.negative_every=2"]
    one = warm.render(story, tmp_path / "one.mp4", settings=settings)
    assert warm.render(story, tmp_path / "three.mp4", num_ranks=3, settings=settings) == one


def test_a_gate_over_a_sequence_is_passed_by_all_ranks(warm: Warm, tmp_path: Path) -> None:
    """Every rank sees a part of the tokens, and the leader decides by all of them."""
    story = tmp_path / "short.yaml"
    story.write_text(SHORT)
    settings = ["sampler.steps=6", "cache.policy=first_block", "cache.threshold=0.3", "cache.first_steps=2"]
    axes = ["mesh.stage=2", "mesh.seq=2"]
    latents = [tmp_path / "one.pt", tmp_path / "four.pt"]
    program = tmp_path / "latents.py"
    program.write_text(LATENTS)
    warm.run([str(program), str(story), str(latents[0]), *FAST, *settings])
    warm.run([str(program), str(story), str(latents[1]), *FAST, *settings, *axes], num_ranks=4)
    one, four = ([chunk.double() for chunk in torch.load(path)] for path in latents)
    assert all((a - b).abs().max() < 1e-3 for a, b in zip(one, four, strict=True))


CHUNKS = ["schedule=chunks", "chunks.group=5", "sampler.solver=unipc"]


@pytest.fixture(scope="module")
def chunks_alone(story: Path, warm: Warm) -> str:
    """The film by the chunk schedule, in two groups, on one rank."""
    return warm.render(story, story.with_name("chunks.mp4"), settings=CHUNKS)


@pytest.mark.parametrize("axes", [["mesh.chunk=4"], ["mesh.chunk=2", "mesh.stage=2"]])
def test_chunks_over_ranks_give_the_same_bytes(
    story: Path, chunks_alone: str, alone: str, warm: Warm, axes: list[str], tmp_path: Path
) -> None:
    assert warm.render(story, tmp_path / "film.mp4", num_ranks=4, settings=[*CHUNKS, *axes]) == chunks_alone != alone


def test_chunks_and_branches_over_ranks_give_the_same_bytes_after_a_kill(
    story: Path, adapter: Path, warm: Warm, tmp_path: Path
) -> None:
    """With global tokens, of which every rank makes all: of its group, and of what is kept of those before.

    Each owner saved its own chunks, and its part of the decoder's layers; others go on with them, and decode by rows.
    """
    settings = [*CHUNKS, "chunks.group=3", "sampler.guidance=2", "sampler.steps=6"]
    settings += ["vin.policy=on", f"vin.path={adapter}"]
    one = warm.render(story, tmp_path / "one.mp4", settings=settings)
    assert warm.render(story, tmp_path / "forgets.mp4", settings=[*settings, "vin.memory=0"]) != one
    film = tmp_path / "film.mp4"
    ranks = warm.start(arguments(story, film, settings=[*settings, "mesh.chunk=2", "mesh.guidance=2"]), num_ranks=4)
    wait_for(lambda: is_saved_after(tmp_path / MANIFEST, 7))  # in the second group
    os.kill(ranks.pids[2], signal.SIGKILL)
    assert ranks.wait() == [3, 3, -signal.SIGKILL, 3], ranks.said()
    assert (
        warm.render(story, film, "--resume", num_ranks=3, settings=[*settings, "mesh.chunk=3", "mesh.decode=rows"])
        == one
    )


def test_a_resume_of_another_film_is_refused(story: Path, warm: Warm, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    # Long, for it must not end before it is interrupted.
    settings = ["sampler.steps=60"]
    process = warm.start(arguments(story, film, settings=settings))
    wait_for((tmp_path / MANIFEST).exists)
    os.kill(process.pids[0], signal.SIGTERM)  # its state is saved, and it ends as it should
    assert process.wait() == [0]
    assert "--resume" in process.said()
    refused = warm.start(arguments(story, film, "--resume", settings=["sampler.steps=4"]))
    assert refused.wait() == [2]
    assert "sampler.steps: 60 then, 4 now" in refused.said()


# ---------------------------------------------------------------------------------------------------- tokens over ranks

STA = ["attention.policy=sta", "attention.tile=[2,2,2]", "attention.crossover=always"]
LATENTS = """
import sys, torch
from longvid.engine import Engine
engine = Engine.load("mini", overrides=sys.argv[3:])
chunks = [finished.latents for finished in engine.denoise(engine.plan(sys.argv[1]))]
if engine.mesh.is_leader:
    torch.save(chunks, sys.argv[2])
engine.leave()
"""


@pytest.mark.parametrize(
    ("num_ranks", "axes"),
    [
        (4, ["mesh.stage=2", "mesh.seq=2", "queue.left=cached"]),
        (4, ["mesh.seq=4", "mesh.ring=2", *STA]),
        (8, ["mesh.stage=2", "mesh.guidance=2", "mesh.seq=2", "sampler.guidance=2"]),
    ],
)
def test_tokens_over_ranks_give_the_same_latents_but_for_rounding(
    story: Path, warm: Warm, tmp_path: Path, num_ranks: int, axes: list[str]
) -> None:
    program = tmp_path / "latents.py"
    program.write_text(LATENTS)
    alone = ["runtime.threads=1", "sampler.steps=2", *(axis for axis in axes if not axis.startswith("mesh."))]
    found = []
    for size, settings in ((1, alone), (num_ranks, [*alone, *axes])):
        out = tmp_path / f"{size}.pt"
        warm.run([str(program), str(story), str(out), *settings], size)
        found.append(torch.load(out, weights_only=True))
    assert len(found[0]) == len(found[1]) == 5
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()
