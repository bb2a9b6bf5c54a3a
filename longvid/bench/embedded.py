"""How well the embedded model obeys: the measured table of its model card."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from longvid.engine import Engine
from longvid.measure import measure_render
from longvid.metrics.adherence import read_clip, score
from longvid.models.wan_vae import to_uint8
from longvid.script import Duration, Scene, Script
from longvid.training import world
from longvid.training.vae import held_out_psnr, to_pixels

CLIP_FRAMES = 49
Say = Callable[[str], None]


def measure_model(engine: Engine, *, clips: int, held_out: int, films: int, say: Say) -> dict[str, Any]:
    """All figures: adherence over drawn captions, trained and held out, its ceiling, the VAE, and long films."""
    vae = engine.vae
    result: dict[str, Any] = {"steps": engine.settings.sampler.steps, "clips": clips, "frames_a_clip": CLIP_FRAMES}
    say("reconstructions of drawn clips")
    result["vae_psnr_db"] = held_out_psnr(vae, clips=min(clips, 64), seed=1)
    result["ceiling"] = _rates(_reconstructions(engine, min(clips, 100)))
    say(f"{clips} clips of combinations that were trained")
    result["trained"] = _rates(_generated(engine, clips, is_held_out=False))
    say(f"{held_out} clips of combinations that were held out of training")
    result["held_out"] = _rates(_generated(engine, held_out, is_held_out=True))
    say(f"{films} films of one scene and 20 chunks or more")
    result["long_films"] = _long_films(engine, films)
    return result


def _rates(pairs: Iterable[tuple[world.Look, NDArray[np.uint8]]]) -> dict[str, float]:
    """Share of clips that show what their look says, for each attribute and all five together."""
    scores = [score(read_clip(frames), look.attributes()) for look, frames in pairs]
    rates = {name: float(np.mean([s[name] for s in scores])) for name in world.ATTRIBUTES}
    return {**rates, "joint": float(np.mean([all(s[name] for name in world.ATTRIBUTES) for s in scores]))}


def _generated(engine: Engine, count: int, *, is_held_out: bool) -> Iterable[tuple[world.Look, NDArray[np.uint8]]]:
    rng = np.random.default_rng(99)
    for seed in range(count):
        look = world.sample_look(rng, held_out=is_held_out)
        yield look, render_look(engine, look, seed, CLIP_FRAMES)


def render_look(engine: Engine, look: world.Look, seed: int, num_frames: int) -> NDArray[np.uint8]:
    """A film of one scene: uint8 [num_frames, height, width, 3]."""
    scene = Scene(world.caption(look, np.random.default_rng(seed)), Duration(num_frames, "f"))
    return np.concatenate(list(engine.stream(Script((scene,), seed=seed))))


def _reconstructions(engine: Engine, count: int) -> Iterable[tuple[world.Look, NDArray[np.uint8]]]:
    vae, side = engine.vae, engine.facts.width
    for seed in range(count):
        rng = np.random.default_rng((seed, 21))
        look = world.sample_look(rng)
        frames = world.make_clip(rng, CLIP_FRAMES, side, looks=[look]).frames
        with torch.no_grad():
            pixels = to_pixels(frames[None]).to(vae.dtype)
            decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample[0]
        yield look, to_uint8(decoded).numpy()


def _long_films(engine: Engine, count: int) -> dict[str, Any]:
    """Films of 20 chunks of one scene: joint adherence in each quarter, seams, and how many loop."""
    queue = engine.settings.queue
    num_frames = engine.facts.grid.num_frames(20 * queue.chunk_latents + queue.context_latents)
    rng = np.random.default_rng(77)
    films = []
    with TemporaryDirectory() as folder:
        for seed in range(count):
            look = world.sample_look(rng)
            story = Script((Scene(world.caption(look), Duration(num_frames, "f")),), seed=1000 + seed)
            path = engine.render(story, Path(folder) / "film.mp4")
            films.append(measure_render(path, story, engine.settings, None))
    quarters = np.array([film["joint_adherence_quarters"] for film in films], float)
    return {
        "films": count,
        "frames": num_frames,
        "joint_by_quarter": [round(float(value), 4) for value in np.nanmean(quarters, axis=0)],
        "seam_ratio_median": float(np.median([film["seam_ratio"] for film in films if film["seam_ratio"]])),
        "loops": sum(bool(film["loop"] and film["loop"]["found"]) for film in films),
    }


def as_markdown(result: dict[str, Any]) -> str:
    """The table of the model card."""
    rows = [("trained combinations", result["trained"]), ("held-out combinations", result["held_out"])]
    rows.append(("drawn clips through the VAE (ceiling)", result["ceiling"]))
    names = [*world.ATTRIBUTES, "joint"]
    lines = ["| | " + " | ".join(names) + " |", "|---" * (len(names) + 1) + "|"]
    lines += [f"| {title} | " + " | ".join(f"{rates[n] * 100:.1f} %" for n in names) + " |" for title, rates in rows]
    return "\n".join(lines)
