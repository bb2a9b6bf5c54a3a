"""Films of every family with their tokens over real ranks (`mesh.seq`): those of one rank, but for rounding.

The file is its own worker: with a folder it forks four ranks, and a process that makes the same films alone. Each rank
takes part in the films that have so many ranks.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import socket
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch

import longvid
from longvid.cache.settings import plan_cache
from longvid.engine import Engine
from longvid.errors import InputError
from longvid.events import Event, RoundDone
from longvid.manifest import has_checkpoint, state_folder
from longvid.models.facts import facts_of
from longvid.models.families import require
from longvid.models.loader import open_checkpoint, open_loading
from longvid.parallel.collectives import Group, disconnect
from longvid.parallel.pipeline import SAVE_NOTICE
from longvid.settings import load_settings
from longvid.sparsity.make import make_attention

SETTINGS = ["runtime.threads=1", "sampler.steps=4", "sampler.guidance=3", "queue.chunk_latents=2"]
SETTINGS += ["queue.context_latents=1", "runtime.timeout_s=300", "runtime.checkpoint_s=0"]
CACHED = ["queue.left=cached"]
STA = ["policy=sta", "tile=[1, 2, 2]", "window=[3, 1, 1]", "crossover=always"]
ADASPA = ["policy=adaspa", "tile=16", "sparsity=0.5", "search_at=[0.25]", "crossover=always"]
FIRST_BLOCK = ["policy=first_block", "threshold=5", "first_steps=1"]
LAST_LAYER = ["policy=taylorseer", "level=last_layer", "interval=2", "first_steps=1"]


def of(section: str, settings: list[str]) -> list[str]:
    return [f"{section}.{setting}" for setting in settings]


CHUNKS = ["schedule=chunks", "sampler.guidance=1", "chunks.group=2", "chunks.fuse=0.5"]
FAMILIES = {
    "hunyuan": [*CACHED, *of("cache", [*FIRST_BLOCK, "negative_every=2"])],
    "cogvideox 2b": CHUNKS,
    "cogvideox 5b": [*CACHED, *of("attention", STA), *of("cache", LAST_LAYER)],
    "cogvideox 1.5": ["queue.chunk_latents=1", *CACHED, *of("attention", ADASPA)],
    "ltx": ["queue.chunk_latents=1", *CACHED, *of("cache", ["policy=taylorseer", "level=module", "interval=2"])],
    "ti2v": CHUNKS,
}
ULYSSES, RING = {"seq": 2}, {"seq": 2, "ring": 2}
MESHES: dict[str, dict[str, dict[str, int]]] = {
    "hunyuan": {"ulysses": ULYSSES, "both": {"seq": 4, "ring": 2}, "ulysses in stages": {**ULYSSES, "stage": 2}},
    "cogvideox 2b": {"ring and chunks": {**RING, "chunk": 2}},
    "cogvideox 5b": {"ring": RING, "guided ring": {**RING, "guidance": 2}},
    "cogvideox 1.5": {"ulysses": ULYSSES},
    "ltx": {"ring": RING},
    "ti2v": {"ulysses and chunks": {**ULYSSES, "chunk": 2}},
}
RESUMED = ("hunyuan ulysses", "ltx ring", "ti2v ulysses and chunks")
ZERO = {"hunyuan": "ulysses", "ltx": "ring"} if find_spec("deepspeed") else {}
"""On which of their meshes weights are spread, too."""
FIRST_BLOCK_ALWAYS = {"policy": "first_block", "threshold": 5.0, "first_steps": 1, "max_skips": 2}
PIPELINES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ti2v": ({"policy": "adaspa", "sparsity": 0.6, "tile": 16, "crossover": "always"}, FIRST_BLOCK_ALWAYS),
    "hunyuan": ({"policy": "adaspa", "sparsity": 0.6, "tile": 16, "crossover": "always"}, FIRST_BLOCK_ALWAYS),
    "cogvideox 5b": (
        {"policy": "sta", "tile": [1, 2, 2], "window": [3, 1, 1], "crossover": "always"},
        {"policy": "taylorseer", "level": "last_layer", "interval": 2, "first_steps": 1},
    ),
    "ltx": (
        {"policy": "asa", "tile": 16, "sample": 4, "mass": 0.3, "min_keep": 0.0, "crossover": "always"},
        {"policy": "taylorseer", "level": "module", "interval": 2, "first_steps": 1},
    ),
}
NUM_RANKS = 4
FRAMES = (11, 14, 14)
CASES = [(name, mesh) for name, meshes in MESHES.items() for mesh in meshes]


def count_of(mesh: dict[str, int]) -> int:
    return mesh.get("seq", 1) * mesh.get("stage", 1) * mesh.get("guidance", 1) * mesh.get("chunk", 1)


def make(job: dict[str, Any], folder: Path, name: str) -> None:
    """One rank's part of a film. The leader leaves its latents; where it is resumed, both films' digests."""
    engine = Engine.load(job["model"], overrides=job["settings"])
    plan = engine.plan(job["story"])
    latents = [finished.latents for finished in engine.denoise(plan)]
    digests = []
    if job["resumes"]:
        whole, resumed = folder / f"{name} whole.mp4", folder / f"{name} resumed.mp4"
        is_leader = engine.mesh.is_leader
        engine.render(job["story"], whole, lambda event: keep_state(event, whole, resumed) if is_leader else None)
        engine.render(job["story"], resumed, resume=True)
        if engine.mesh.is_leader:
            digests = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (whole, resumed)]
    if engine.mesh.is_leader:
        said = {"latents": latents, "digests": digests, "layers": len(engine.layers), "weights": held(engine)}
        torch.save(said, folder / f"{name}.pt")
    engine.leave()


def accelerate_pipelines(job: dict[str, Any], folder: Path) -> None:
    """One rank's part of stock pipelines that are accelerated; latents of each way, by its name."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name, path in job["models"].items():
        pipe: Any = diffusers.DiffusionPipeline.from_pretrained(path)
        pipe.set_progress_bar_config(disable=True)

        def film(pipe: Any = pipe) -> torch.Tensor:
            size = {"width": 64, "height": 64, "num_frames": 17, "num_inference_steps": 4, "output_type": "latent"}
            latents: torch.Tensor = pipe("a red cat", generator=torch.Generator().manual_seed(1), **size).frames
            return latents

        attention, cache = PIPELINES[name]
        axis = {"seq": job["count"], "ring": job["count"] if name == "cogvideox 5b" else 1}
        longvid.accelerate(pipe, **axis)
        found[name] = {"dense": film()}
        longvid.accelerate(pipe, attention, cache, **axis)
        found[name]["both"] = film()
        longvid.restore(pipe)
        found[name]["stock"] = film()
        hooks = [module for module in pipe.transformer.modules() if module._forward_pre_hooks or module._forward_hooks]
        assert not hooks and "forward" not in vars(pipe.transformer)
    rank = int(os.environ.get("RANK", "0"))
    torch.save(found, folder / f"pipelines {job['count']} {rank}.pt")
    disconnect()


def held(engine: Engine) -> int:
    """Numbers that the weights of this rank's layers are; DeepSpeed keeps its part beside a weight."""
    stage: Any = engine._stage
    weights = [weight for layer in stage.layers for weight in layer.parameters()]
    return sum(weight.numel() + getattr(weight, "ds_tensor", torch.empty(0)).numel() for weight in weights)


def keep_state(event: Event, film: Path, copy: Path) -> None:
    """On the leader: once a film's first checkpoint is there, the state that a kill would leave, for another film."""
    if not isinstance(event, RoundDone) or event.round <= SAVE_NOTICE or state_folder(copy).parent.exists():
        return
    for _ in range(100):  # a thread is writing it; no other begins while the leader is here
        if has_checkpoint(film):
            shutil.copytree(state_folder(film).parent, state_folder(copy).parent)
            return
        time.sleep(0.02)


def run_rank(rank: int, folder: Path) -> None:
    """All films of a rank; the process that is none of the ranks makes those of one."""
    for name, job in json.loads((folder / "jobs.json").read_text()).items():
        count = job["count"]
        if count > 1 and 0 <= rank < count:
            place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
            os.environ |= {key: str(value) for key, value in {**place, "MASTER_PORT": job["port"]}.items()}
            os.environ["MASTER_ADDR"] = "127.0.0.1"
        if (count > 1 and 0 <= rank < count) or (count == 1 and rank == -1):
            if "models" in job:
                accelerate_pipelines(job, folder)
            else:
                make(job, folder, name)


def run_ranks(folder: Path) -> None:
    """Fork the ranks from a process that has their imports behind it and has computed nothing."""
    pipelines = ("WanPipeline", "HunyuanVideoPipeline", "CogVideoXPipeline", "LTXPipeline")
    assert all(getattr(diffusers, name) for name in pipelines)
    context = multiprocessing.get_context("fork")
    ranks = [context.Process(target=run_rank, args=(rank, folder), daemon=True) for rank in range(-1, NUM_RANKS)]
    for rank in ranks:
        rank.start()
    while any(rank.is_alive() for rank in ranks):
        if any(rank.exitcode for rank in ranks):
            sys.exit("a rank has failed")  # the others would wait for it
        time.sleep(0.1)
    sys.exit(max(abs(rank.exitcode or 0) for rank in ranks))


Films = dict[str, dict[str, Any]]


@pytest.fixture(scope="module")
def films(
    checkpoint_of: Callable[[str], Path],
    run_worker: Callable[[str, Path, float], int],
    tmp_path_factory: pytest.TempPathFactory,
) -> Films:
    """What the leader left of each film: `NAME` of one rank, `NAME MESH` of several."""
    folder, jobs = tmp_path_factory.mktemp("films"), {}
    for name, settings in FAMILIES.items():
        story = folder / f"{name}.yaml"
        blend = f"for: {FRAMES[1]}f, transition: {{kind: blend, over: 6f}}"
        story.write_text(
            f"size: [64, 64]\nnegative: moving left\nscenes:\n- {{prompt: a red circle, for: {FRAMES[0]}f}}\n"
            f"- {{prompt: a blue cat, {blend}}}\n- {{prompt: a blue circle, for: {FRAMES[2]}f, transition: cut}}\n"
        )
        one = {"model": str(checkpoint_of(name)), "story": str(story), "settings": [*SETTINGS, *settings]}
        jobs[name] = {**one, "count": 1, "resumes": False}
        for mesh, sizes in MESHES[name].items():
            jobs[f"{name} {mesh}"] = over_ranks(one, sizes, resumes=f"{name} {mesh}" in RESUMED)
    for name, mesh in ZERO.items():
        jobs[f"{name} zero"] = over_ranks(jobs[name], MESHES[name][mesh], "memory.offload=zero")
    models = {name: str(checkpoint_of(name)) for name in PIPELINES}
    for count in (1, 2):
        jobs[f"pipelines {count}"] = {"models": models, "count": count, "port": str(free_port())}
    (folder / "jobs.json").write_text(json.dumps(jobs))
    exit_code = run_worker(__file__, folder, 500)
    assert exit_code == 0, (folder / "log").read_text()
    return {path.stem: torch.load(path) for path in folder.glob("*.pt")}


def over_ranks(one: dict[str, Any], sizes: dict[str, int], *more: str, resumes: bool = False) -> dict[str, Any]:
    """The job of one rank on a mesh."""
    axes = {"stage": 1, "guidance": 1, "chunk": 1, **sizes}
    settings = [*one["settings"], *(f"mesh.{axis}={size}" for axis, size in axes.items()), *more]
    return {**one, "settings": settings, "resumes": resumes, "count": count_of(sizes), "port": str(free_port())}


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def error(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    """The largest difference, in units of the latents' largest value."""
    largest = max(float(x.abs().max()) for x in b)
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True)) / max(1.0, largest)


@pytest.mark.parametrize(("name", "mesh"), CASES)
def test_tokens_over_ranks_give_the_film_of_one(name: str, mesh: str, films: Films) -> None:
    assert len(films[name]["latents"]) >= 3
    assert error(films[f"{name} {mesh}"]["latents"], films[name]["latents"]) <= 1e-5


@pytest.mark.parametrize(
    ("name", "mesh", "larger"), [("hunyuan", "ulysses", "ulysses in stages"), ("cogvideox 5b", "ring", "guided ring")]
)
def test_stages_and_guidance_leave_the_bits_of_a_mesh_as_they_are(
    name: str, mesh: str, larger: str, films: Films
) -> None:
    one, other = films[f"{name} {mesh}"], films[f"{name} {larger}"]
    assert all(torch.equal(a, b) for a, b in zip(other["latents"], one["latents"], strict=True))


@pytest.mark.parametrize("key", RESUMED)
def test_a_film_that_was_stopped_goes_on_to_the_same_bytes(key: str, films: Films) -> None:
    whole, resumed = films[key]["digests"]
    assert resumed == whole


@pytest.mark.parametrize("name", ZERO)
def test_weights_in_parts_give_the_same_bits_and_each_rank_holds_less(name: str, films: Films) -> None:
    """Half of all weights, and one of three layers whole."""
    whole, parts = films[f"{name} {ZERO[name]}"], films[f"{name} zero"]
    assert all(torch.equal(a, b) for a, b in zip(parts["latents"], whole["latents"], strict=True))
    assert parts["weights"] < 0.85 * whole["weights"]


@pytest.mark.parametrize("name", PIPELINES)
def test_a_pipeline_over_ranks_gives_what_it_gives_on_one_and_stock_again(name: str, films: Films) -> None:
    alone, *ranks = (films[key][name] for key in ("pipelines 1 0", "pipelines 2 0", "pipelines 2 1"))
    stock = alone["stock"]
    for rank in ranks:
        for way in ("dense", "both"):
            assert error([rank[way]], [alone[way]]) <= 1e-5
        assert torch.equal(rank["stock"], stock)
    assert error([alone["dense"]], [stock]) == 0 and error([alone["both"]], [stock]) > 1e-4


def test_an_axis_that_does_not_fit_is_refused_and_leaves_the_pipeline(checkpoint_of: Callable[[str], Path]) -> None:
    pipe = diffusers.DiffusionPipeline.from_pretrained(checkpoint_of("hunyuan"))
    with pytest.raises(InputError, match=r"seq must be the number of ranks, not 2: no launcher started any"):
        longvid.accelerate(pipe, seq=2)
    with pytest.raises(InputError, match=r"seq 1 is not a multiple of ring 2"):
        longvid.accelerate(pipe, ring=2)
    with pytest.raises(InputError, match=r"ring must be 1, not 2: attention adaspa looks at all keys"):
        longvid.accelerate(pipe, "adaspa", seq=2, ring=2)
    assert not pipe.transformer._forward_pre_hooks


def test_weights_that_cannot_be_spread_are_refused(
    checkpoint_of: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint, pair = open_checkpoint(str(checkpoint_of("ltx"))), Group((0, 1), 0)
    cpu, settings = torch.device("cpu"), load_settings(overrides=["memory.offload=zero", "memory.quantize=int8"])
    with pytest.raises(InputError, match=r"over the ranks of mesh\.seq, and here that is 1: set it"):
        open_loading(checkpoint, settings, cpu)
    with pytest.raises(InputError, match=r"memory\.quantize must be none"):
        open_loading(checkpoint, settings, cpu, pair)
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    with pytest.raises(InputError, match=r"zero needs deepspeed .*: pip install longvid\[deepspeed\]"):
        open_loading(checkpoint, load_settings(overrides=["memory.offload=zero"]), cpu, pair)


@pytest.mark.parametrize("name", ["hunyuan", "cogvideox 5b"])
def test_what_cannot_be_is_refused_before_weights_load(name: str, checkpoint_of: Callable[[str], Path]) -> None:
    facts = facts_of(str(checkpoint_of(name)))
    settings = load_settings(overrides=["sequence.backend=xfuser"])
    with pytest.raises(InputError, match=r"xfuser has no attention in which text asks, too"):
        require(facts, settings, plan_cache(settings.cache, 4, facts.num_layers))
    with pytest.raises(InputError, match=r"mesh\.ring must be 1, not 2: attention\.policy adaspa looks at all keys"):
        make_attention(load_settings(overrides=[*of("attention", ADASPA), "mesh.ring=2"]), facts, None)


if __name__ == "__main__":
    run_ranks(Path(sys.argv[1]))
