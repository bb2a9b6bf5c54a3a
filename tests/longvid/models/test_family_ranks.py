"""Films of every family in the queue, their layers on one rank and on two real processes: the same bits."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from longvid.engine import Engine

SETTINGS = ["runtime.threads=1", "sampler.steps=4", "sampler.guidance=3", "queue.chunk_latents=2", "mesh.guidance=1"]
FAMILIES = {
    "ti2v": ["queue.context_latents=1"],
    "i2v 2.1": ["queue.context_latents=1", "queue.left_level=same"],
    "i2v 2.2": ["queue.context_latents=1", "sampler.guidance_low=2", "queue.left=cached"],
    "ltx": ["queue.chunk_latents=1", "queue.context_latents=1", "queue.left=cached"],
    "cogvideox 5b": ["queue.context_latents=1", "queue.left=cached"],
    "cogvideox 1.5": ["queue.chunk_latents=1", "queue.context_latents=1"],
}
FRAMES = (11, 14, 14)


def render(job: dict[str, Any]) -> dict[str, Any]:
    """One rank's part of a film: on the leader with the digest of all its latents and frames."""
    os.environ["MASTER_PORT"] = str(job["port"])
    engine = Engine.load(job["model"], overrides=job["settings"])
    plan = engine.plan(job["story"])
    assert len(plan.chunks) >= 3
    digest, frames = hashlib.sha256(), 0
    for finished in engine.denoise(plan):
        made = engine.decode(plan, finished)
        digest.update(finished.latents.numpy().tobytes())
        digest.update(made.tobytes())
        frames += len(made)
    engine.leave()
    return {"digest": digest.hexdigest(), "frames": frames, "layers": len(engine.layers)}


@pytest.fixture(scope="module")
def films(checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What one rank alone, and both of two, say of every family's film."""
    folder = tmp_path_factory.mktemp("film")
    Image.new("RGB", (40, 30), "red").save(folder / "first.png")
    jobs: dict[str, dict[str, Any]] = {}
    for name, settings in FAMILIES.items():
        image, story = "image: first.png" if "i2v" in name else "", folder / f"{name}.yaml"
        first, blend = FRAMES[0], f"for: {FRAMES[1]}f, transition: {{kind: blend, over: 6f}}"
        share = f"for: {FRAMES[2]}f, transition: {{kind: share, over: 9f}}"
        scenes = (
            f"- {{prompt: a red circle, for: {first}f}}\n- {{prompt: a blue cat, {blend}}}\n"
            f"- {{prompt: a blue circle, {share}}}"
        )
        story.write_text(f"{image}\nsize: [64, 64]\nnegative: moving left\nscenes:\n{scenes}\n")
        model = str(checkpoint_of(name))
        jobs[name] = {"model": model, "settings": [*SETTINGS, *settings], "story": str(story), "port": free_port()}
    ranks = [_start(rank, jobs) for rank in range(2)]
    try:
        threads = torch.get_num_threads()
        alone = {name: render(job) for name, job in jobs.items()}
        torch.set_num_threads(threads)
        said = [process.communicate(timeout=300) for process in ranks]
        for process, (_, errors) in zip(ranks, said, strict=True):
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
    return [alone, *(json.loads(output) for output, _ in said)]


def _start(rank: int, jobs: dict[str, Any]) -> subprocess.Popen[str]:
    place = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": 1}
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", **{key: str(value) for key, value in place.items()}}
    command = [sys.executable, "-P", __file__, json.dumps(jobs)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


@pytest.mark.parametrize("name", FAMILIES)
def test_two_stages_give_the_bits_of_one(name: str, films: list[dict[str, Any]]) -> None:
    alone, first, second = (film[name] for film in films)
    assert first["digest"] == alone["digest"]
    assert alone["frames"] == sum(FRAMES)
    assert alone["layers"] == first["layers"] + second["layers"]
    assert first["layers"] and second["layers"]


if __name__ == "__main__":
    print(json.dumps({name: render(job) for name, job in json.loads(sys.argv[1]).items()}))
