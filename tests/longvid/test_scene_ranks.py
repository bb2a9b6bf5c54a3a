"""Scenes on two real processes over gloo: shared K/V, a film that goes on, and prompts that change as it streams.

The file is its own worker: with a job it is one of two ranks.
"""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from longvid.engine import Engine
from longvid.events import ChunkDone, Event, PromptChanged
from longvid.plan import change_prompt
from longvid.script import Duration, Scene, Transition

SETTINGS = ["runtime.threads=1", "sampler.steps=4", "queue.chunk_latents=2", "output.keep_state=true"]
STORY = """
scenes:
  - {prompt: "a red circle", for: 40f}
  - {prompt: "a blue square", for: 60f, transition: share}
"""
ADDED = Scene("a red square", Duration(30, "f"), Transition("blend", Duration(8, "f")))
NEW = "a blue circle moving left"


def sha(data: Any) -> str:
    return hashlib.sha256(data).hexdigest()


def work(job: dict[str, str], film: Path) -> dict[str, Any]:
    """One rank's part: a film that shares, then goes on, and a stream whose prompt is changed; what it found."""
    engine = Engine.load(job["model"], overrides=SETTINGS)
    found: dict[str, Any] = {"layers": len(engine.layers)}
    engine.render(job["story"], film)
    found["film"] = sha(film.read_bytes()) if engine.mesh.is_leader else ""
    engine.extend(film, [ADDED])
    found["longer"] = sha(film.read_bytes()) if engine.mesh.is_leader else ""
    digest, events = hashlib.sha256(), list[Event]()

    def on_event(event: Event) -> None:
        events.append(event)
        if isinstance(event, ChunkDone) and event.chunk == 1:
            stream.prompt(NEW)

    stream = engine.stream(job["story"], on_event)
    for frames in stream:
        digest.update(frames.tobytes())
    engine.leave()
    changes = [asdict(event) for event in events if isinstance(event, PromptChanged)]
    return {**found, "stream": digest.hexdigest(), "changes": changes}


@pytest.fixture(scope="module")
def found(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one rank alone, and both of two, say."""
    folder = tmp_path_factory.mktemp("films")
    (folder / "story.yaml").write_text(STORY)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"model": str(tiny_model), "story": str(folder / "story.yaml")}
    command = [sys.executable, "-P", __file__, json.dumps(job), str(folder / "two.mp4")]

    def start(rank: int) -> subprocess.Popen[str]:
        place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}}
        return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    ranks = [start(rank) for rank in range(2)]
    try:
        threads = torch.get_num_threads()
        alone = work(job, folder / "one.mp4")
        torch.set_num_threads(threads)
        said = [process.communicate(timeout=600) for process in ranks]
        for process, (_, errors) in zip(ranks, said, strict=True):
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
    return [alone, *(json.loads(output.splitlines()[-1]) for output, _ in said)]


def test_scenes_that_share_and_films_that_go_on_have_the_same_bytes(found: list[dict[str, Any]]) -> None:
    alone, leader, other = found
    assert leader["layers"] == other["layers"] == 1  # the second rank has the layer that shares
    assert leader["film"] == alone["film"]
    assert leader["longer"] == alone["longer"] != alone["film"]


def test_all_ranks_take_a_new_prompt_at_once(tiny_model: Path, found: list[dict[str, Any]], tmp_path: Path) -> None:
    """Two ranks take it some rounds later than one; from then on the film is the one that was planned so."""
    story = tmp_path / "story.yaml"
    story.write_text(STORY)
    engine = Engine.load(tiny_model, overrides=SETTINGS)
    plan = engine.plan(story)
    first_frames = []
    for one in found[:2]:
        [change] = one["changes"]
        first_frames.append(change["first_frame"])
        digest = hashlib.sha256()
        changed = change_prompt(plan, change["chunk"] - 1, NEW, "")
        for finished in engine.denoise(changed):
            digest.update(engine.decode(changed, finished).tobytes())
        assert one["stream"] == digest.hexdigest()
    assert first_frames[0] < first_frames[1]
    assert found[2]["changes"] == []


if __name__ == "__main__":
    print(json.dumps(work(json.loads(sys.argv[1]), Path(sys.argv[2]))))
