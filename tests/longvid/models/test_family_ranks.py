"""Films of every family in the queue, their layers on one rank and on real processes: the same bits, and resumed."""

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
from longvid.errors import Preempted
from longvid.events import Event, RoundDone
from longvid.preemption import Preemption

SETTINGS = ["runtime.threads=1", "sampler.steps=4", "sampler.guidance=3", "queue.chunk_latents=2", "mesh.guidance=1"]
SETTINGS += ["queue.context_latents=1", "runtime.checkpoint_s=1000"]
STA = ["policy=sta", "tile=[1, 2, 2]", "window=[3, 1, 1]", "crossover=always"]
ADASPA = ["policy=adaspa", "tile=16", "sparsity=0.5", "search_at=[0.25]", "crossover=always"]
ASA = ["policy=asa", "tile=16", "sample=4", "mass=0.3", "min_keep=0.0", "dense_steps=0", "crossover=always"]
FIRST_BLOCK = ["policy=first_block", "threshold=5", "first_steps=1"]
LAST_LAYER = ["policy=taylorseer", "level=last_layer", "interval=2", "first_steps=1"]


def of(section: str, settings: list[str]) -> list[str]:
    return [f"{section}.{setting}" for setting in settings]


FAMILIES = {
    "ti2v": [],
    "i2v 2.1": ["queue.left_level=same"],
    "i2v 2.2": ["sampler.guidance_low=2", "queue.left=cached"],
}
SPARSE_AND_CACHED = {
    "ltx": ["queue.chunk_latents=1", "queue.left=cached", *of("attention", ADASPA), *of("cache", ["policy=delta_dit"])],
    "cogvideox 5b": ["queue.left=cached", *of("attention", STA), *of("cache", LAST_LAYER)],
    "cogvideox 1.5": ["queue.chunk_latents=1", *of("attention", ASA), *of("cache", FIRST_BLOCK)],
    "hunyuan": [*of("attention", ADASPA), *of("cache", [*FIRST_BLOCK, "negative_every=2"])],
}
RANKS = {name: [2] for name in (*FAMILIES, *SPARSE_AND_CACHED)} | {"hunyuan": [2, 3]}
FRAMES = (11, 14, 14)


def denoise(model: str, settings: list[str], story: str) -> dict[str, Any]:
    """One rank's part of a film: on the leader with the digest of all its latents and frames."""
    engine = Engine.load(model, overrides=settings)
    plan = engine.plan(story)
    assert len(plan.chunks) >= 3
    digest, frames = hashlib.sha256(), 0
    for finished in engine.denoise(plan):
        made = engine.decode(plan, finished)
        digest.update(finished.latents.numpy().tobytes())
        digest.update(made.tobytes())
        frames += len(made)
    return {"digest": digest.hexdigest(), "frames": frames, "layers": len(engine.layers), "engine": engine}


def stop_and_whole(engine: Engine, job: dict[str, Any]) -> str:
    """For each number of ranks leave a film that was stopped after a few rounds; return the whole one's digest."""
    for count in job["ports"]:
        preemption = Preemption()

        def stop(event: Event, preemption: Preemption = preemption) -> None:
            if isinstance(event, RoundDone) and event.round == 1:
                preemption.ask()

        with pytest.raises(Preempted, match="saved after round"):
            engine.render(job["story"], film_of(job, count), stop, preemption=preemption)
    return digest_of(engine.render(job["story"], film_of(job, "1")))


def film_of(job: dict[str, Any], count: str) -> Path:
    return Path(f"{job['film']}.{count}.mp4")


def digest_of(film: Path) -> str:
    return hashlib.sha256(film.read_bytes()).hexdigest()


def on_ranks(jobs: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """In a rank's process: what it says of each film on each number of ranks that it belongs to."""
    rank, said = int(os.environ["RANK"]), {}
    for name, job in jobs.items():
        for count, port in job["ports"].items():
            if rank < int(count):
                os.environ |= {"WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": str(port)}
                one = denoise(job["model"], job["settings"], job["story"])
                engine, film = one.pop("engine"), None
                if job["resumes"]:
                    film = engine.render(job["story"], film_of(job, count), resume=True)
                engine.leave()
                said[f"{name} on {count}"] = {**one, "film": digest_of(film) if film and rank == 0 else ""}
    return said


@pytest.fixture(scope="module")
def films(
    checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, dict[str, Any]], list[dict[str, dict[str, Any]]]]:
    """What one rank alone says of every family's film; and the ranks of two and three."""
    folder = tmp_path_factory.mktemp("film")
    Image.new("RGB", (40, 30), "red").save(folder / "first.png")
    jobs: dict[str, dict[str, Any]] = {}
    for name, settings in (FAMILIES | SPARSE_AND_CACHED).items():
        image, story = "image: first.png" if "i2v" in name else "", folder / f"{name}.yaml"
        first, blend = FRAMES[0], f"for: {FRAMES[1]}f, transition: {{kind: blend, over: 6f}}"
        last = "{kind: share, over: 9f}" if name in FAMILIES else "cut"  # nothing is shared by sparse attention
        share = f"for: {FRAMES[2]}f, transition: {last}"
        scenes = (
            f"- {{prompt: a red circle, for: {first}f}}\n- {{prompt: a blue cat, {blend}}}\n"
            f"- {{prompt: a blue circle, {share}}}"
        )
        story.write_text(f"{image}\nsize: [64, 64]\nnegative: moving left\nscenes:\n{scenes}\n")
        ports = {str(count): free_port() for count in RANKS[name]}
        job = {"model": str(checkpoint_of(name)), "story": str(story), "film": str(folder / name), "ports": ports}
        jobs[name] = {**job, "settings": [*SETTINGS, *settings], "resumes": name in SPARSE_AND_CACHED}
    threads = torch.get_num_threads()
    alone: dict[str, dict[str, Any]] = {}
    for name, job in jobs.items():
        alone[name] = denoise(job["model"], job["settings"], job["story"])
        engine = alone[name].pop("engine")
        alone[name]["film"] = stop_and_whole(engine, job) if job["resumes"] else ""
    torch.set_num_threads(threads)
    ranks = [_start(rank, jobs) for rank in range(3)]
    try:
        said = [process.communicate(timeout=300) for process in ranks]
        for process, (_, errors) in zip(ranks, said, strict=True):
            assert process.returncode == 0, errors
    finally:
        for process in ranks:
            process.kill()
    return alone, [json.loads(output) for output, _ in said]


def _start(rank: int, jobs: dict[str, Any]) -> subprocess.Popen[str]:
    environment = {**os.environ, "MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    command = [sys.executable, "-P", __file__, json.dumps(jobs)]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


Films = tuple[dict[str, dict[str, Any]], list[dict[str, dict[str, Any]]]]


@pytest.mark.parametrize(("name", "count"), [(name, count) for name, counts in RANKS.items() for count in counts])
def test_stages_give_the_bits_of_one_rank_whole_and_resumed(name: str, count: int, films: Films) -> None:
    alone, ranks = films[0][name], [said[f"{name} on {count}"] for said in films[1][:count]]
    assert ranks[0]["digest"] == alone["digest"]
    assert ranks[0]["film"] == alone["film"]
    assert alone["frames"] == sum(FRAMES)
    assert alone["layers"] == sum(rank["layers"] for rank in ranks)
    assert all(rank["layers"] for rank in ranks)


@pytest.mark.parametrize("name", SPARSE_AND_CACHED)
def test_policy_and_cache_are_at_work(
    name: str, films: Films, checkpoint_of: Callable[[str], Path], tmp_path: Path
) -> None:
    story = tmp_path / "story.yaml"
    story.write_text("size: [64, 64]\nscenes:\n- {prompt: a red circle, for: 33f}\n")
    model, settings = str(checkpoint_of(name)), [*SETTINGS, *SPARSE_AND_CACHED[name]]
    without = {kind: [x for x in settings if not x.startswith(kind)] for kind in ("attention.", "cache.")}
    digests = [denoise(model, some, str(story))["digest"] for some in (settings, *without.values())]
    assert len(set(digests)) == 3


if __name__ == "__main__":
    print(json.dumps(on_ranks(json.loads(sys.argv[1]))))
