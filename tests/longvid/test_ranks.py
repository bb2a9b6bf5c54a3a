"""Films on several ranks, as real processes over gloo: the same bytes as on one, with kills and resumes in between."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

STORY = """
seed: 5
scenes:
  - {prompt: "a large red circle moving left over a blue background", for: 60f}
  - {prompt: "a small white ring rising over a black background", for: 30f, transition: {kind: blend, over: 10f}}
  - {prompt: "a large green square standing still over a white background", for: 25f, transition: cut}
"""
FAST = ["runtime.threads=1", "sampler.steps=3", "queue.chunk_latents=4", "runtime.checkpoint_s=0"]
TIMEOUT_S = 240


def command(story: Path, film: Path, *options: str, settings: Sequence[str] = ()) -> list[str]:
    sets = [part for setting in (*FAST, *settings) for part in ("--set", setting)]
    return [sys.executable, "-P", "-m", "longvid", "render", str(story), "-o", str(film), *sets, *options]


def render(story: Path, film: Path, *options: str, settings: Sequence[str] = ()) -> str:
    """Render, and return the film's digest."""
    done = subprocess.run(
        command(story, film, *options, settings=settings),
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return digest(film)


def digest(film: Path) -> str:
    return hashlib.sha256(film.read_bytes()).hexdigest()


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("story") / "story.yaml"
    path.write_text(STORY)
    return path


@pytest.fixture(scope="module")
def alone(story: Path) -> str:
    """The film of one rank."""
    return render(story, story.with_name("alone.mp4"))


@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_layers_over_ranks_give_the_same_bytes(story: Path, alone: str, ranks: int, tmp_path: Path) -> None:
    assert render(story, tmp_path / "film.mp4", "--ranks", str(ranks)) == alone


def test_cached_left_context_and_guidance_over_ranks_give_the_same_bytes(story: Path, tmp_path: Path) -> None:
    settings = ["queue.left=cached", "sampler.guidance=2", "sampler.solver=unipc"]
    one = render(story, tmp_path / "one.mp4", settings=settings)
    axes = [*settings, "mesh.guidance=2", "mesh.stage=2"]
    assert render(story, tmp_path / "four.mp4", "--ranks", "4", settings=axes) == one


SPARSE = ["attention.policy=adaspa", "attention.crossover=always", "attention.tile=16", "attention.search_at=[0.3]"]
CACHE = ["cache.policy=taylorseer", "cache.interval=3", "cache.first_steps=2", "sampler.steps=7"]


STA = ["attention.policy=sta", "attention.tile=[2,2,2]", "attention.crossover=always"]


def test_adaptive_attention_and_forecasts_over_ranks_and_after_a_kill_give_the_same_bytes(
    story: Path, tmp_path: Path
) -> None:
    both = [*SPARSE, *CACHE]
    one = render(story, tmp_path / "one.mp4", settings=both)
    film, manifest = tmp_path / "film.mp4", tmp_path / "film.mp4.longvid/state/manifest.json"
    with started(command(story, film, "--ranks", "3", settings=both)) as supervisor:
        wait_for(manifest.exists)
        os.kill(ranks_of(supervisor.pid)[-1], signal.SIGKILL)
        supervisor.communicate(timeout=30)
    assert supervisor.returncode == 3
    assert render(story, film, "--ranks", "2", "--resume", settings=both) == one


def test_torchrun_gives_the_same_bytes(story: Path, alone: str, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    launcher = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    script = command(story, film)[2:]
    environment = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [*launcher, *script], capture_output=True, text=True, timeout=TIMEOUT_S, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr
    assert digest(film) == alone


def test_a_trace_shows_what_every_rank_did(story: Path, tmp_path: Path) -> None:
    trace = tmp_path / "trace.json"
    render(story, tmp_path / "film.mp4", "--ranks", "2", "--trace", str(trace))
    events = [event for event in json.loads(trace.read_text())["traceEvents"] if event["ph"] == "X"]
    for rank, names in (
        (0, ("forward", "step", "send hidden", "receive velocity")),
        (1, ("forward", "receive hidden")),
    ):
        seen = {" ".join(event["name"].split()) for event in events if event["pid"] == rank}
        for name in names:
            assert any(text.startswith(name) for text in seen), (rank, name)


def test_a_ledger_has_the_same_latents_on_any_number_of_ranks(story: Path, tmp_path: Path) -> None:
    lines = []
    for ranks in ("1", "2"):
        ledger = tmp_path / f"ledger{ranks}"
        render(story, tmp_path / "film.mp4", "--ranks", ranks, "--ledger", str(ledger))
        lines.append({line for line in ledger.read_text().splitlines() if " latents " in line})
    assert lines[0] == lines[1] != set()


@contextlib.contextmanager
def started(arguments: list[str]) -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        try:
            yield process
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)


def ranks_of(supervisor: int) -> list[int]:
    children = Path(f"/proc/{supervisor}/task/{supervisor}/children").read_text().split()
    return [int(child) for child in children]


def wait_for(condition: object, seconds: float = 120.0) -> None:
    assert callable(condition)
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.02)


@pytest.mark.parametrize("victim", [0, 1])
def test_a_killed_rank_ends_all_and_the_resumed_film_is_the_same(
    story: Path, alone: str, victim: int, tmp_path: Path
) -> None:
    film, manifest = tmp_path / "film.mp4", tmp_path / "film.mp4.longvid/state/manifest.json"
    with started(command(story, film, "--ranks", "2")) as supervisor:
        wait_for(manifest.exists)
        time.sleep(random.Random(victim).random())
        ranks = ranks_of(supervisor.pid)
        if len(ranks) == 2:
            os.kill(ranks[victim], signal.SIGKILL)
        _, errors = supervisor.communicate(timeout=30)
    if supervisor.returncode == 0 or not manifest.parent.exists():  # the film was complete before the kill
        assert digest(film) == alone
        return
    assert supervisor.returncode == 3
    [message] = [line for line in errors.splitlines() if line.startswith("longvid: error")]
    assert f"rank {victim}" in message and "--resume" in message
    assert not any(Path(f"/proc/{rank}").exists() for rank in ranks)
    # On another number of stages.
    assert render(story, film, "--ranks", "3", "--resume") == alone


def test_a_resume_of_another_film_is_refused(story: Path, tmp_path: Path) -> None:
    film = tmp_path / "film.mp4"
    with started(command(story, film)) as process:
        wait_for((tmp_path / "film.mp4.longvid/state/manifest.json").exists)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    if process.returncode == 0:
        pytest.skip("the film was finished before it could be interrupted")
    assert process.returncode == 130
    assert "--resume" in errors
    refused = subprocess.run(
        command(story, film, "--resume", settings=["sampler.steps=4"]), capture_output=True, text=True, check=False
    )
    assert refused.returncode == 2
    assert "sampler.steps: 3 then, 4 now" in refused.stderr


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
    ("ranks", "axes"),
    [
        (4, ["mesh.stage=2", "mesh.seq=2", "queue.left=cached"]),
        (4, ["mesh.seq=4", "mesh.ring=2", *STA]),
        (8, ["mesh.stage=2", "mesh.guidance=2", "mesh.seq=2", "sampler.guidance=2"]),
    ],
)
def test_tokens_over_ranks_give_the_same_latents_but_for_rounding(
    story: Path, tmp_path: Path, ranks: int, axes: list[str]
) -> None:
    program = tmp_path / "latents.py"
    program.write_text(LATENTS)
    alone = ["runtime.threads=1", "sampler.steps=2", *(axis for axis in axes if not axis.startswith("mesh."))]
    many = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    found = []
    for launcher, settings in (([], alone), (many, [*alone, *axes])):
        out = tmp_path / f"{len(found)}.pt"
        arguments = [sys.executable, "-P", *launcher, str(program), str(story), str(out), *settings]
        done = subprocess.run(arguments, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        assert done.returncode == 0, done.stderr
        found.append(torch.load(out, weights_only=True))
    assert len(found[0]) == len(found[1]) == 5
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= 1e-5 * one.abs().max()
