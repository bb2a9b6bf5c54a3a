"""The two sides of `longvid bench film`. As a program it runs one of them and prints what it measured as JSON."""

from __future__ import annotations

import contextlib
import json
import resource
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanPipeline

from longvid.bench.film import FilmBench
from longvid.engine import Engine
from longvid.errors import Interrupted, LongvidError
from longvid.models.loader import open_checkpoint
from longvid.models.parts import ModelPart
from longvid.models.wan_checkpoint import WanCheckpoint
from longvid.plan import ModelFacts
from longvid.ranks import pick_device
from longvid.script import Duration, Scene, Script
from longvid.settings import Settings, load_settings
from longvid.writer import FilmWriter

PROMPT = "a large red circle moving left over a blue background"
SEED = 0
Shape = tuple[int, int, int]
"""Frames, height and width of a film."""


class Stopwatch:
    """Seconds by part of the work, and of the whole. GPU work that was started counts to the part that started it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._began = self._lap = self._now()
        self.parts = {"denoise_s": 0.0, "decode_s": 0.0, "write_s": 0.0}

    def lap(self, part: str) -> None:
        """Put the time since the last lap down to `part`."""
        now = self._now()
        self.parts[part] += now - self._lap
        self._lap = now

    def total_s(self) -> float:
        return self._lap - self._began

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def measure(side: str, bench: FilmBench) -> dict[str, Any]:
    """Render the film in a temporary folder. Times, peak memory (10^6 bytes), frames and the machine's part in it."""
    run = {"longvid": render_ours, "diffusers": render_stock}[side]
    settings = load_settings(None, bench.overrides())
    device = pick_device(settings)
    with tempfile.TemporaryDirectory(prefix="longvid-bench-") as folder:
        watch, (num_frames, height, width) = run(bench, settings, Path(folder) / "film.mp4")
    return {
        "total_s": watch.total_s(),
        **watch.parts,
        "peak_mb": peak_mb(device),
        "frames": num_frames,
        "width": width,
        "height": height,
        "threads": torch.get_num_threads(),
        "device": str(device),
    }


def render_ours(bench: FilmBench, settings: Settings, path: Path) -> tuple[Stopwatch, Shape]:
    """What `Engine.render` does, with a clock between its parts."""
    engine = Engine.load(overrides=bench.overrides())
    num_frames = bench_frames(bench, engine.facts)
    script = Script((Scene(PROMPT, Duration(num_frames, "f")),), seed=SEED, size=bench.size)
    watch = Stopwatch(engine.device)
    plan = engine.plan(script)
    with FilmWriter(path, width=plan.width, height=plan.height, fps=plan.fps, output=settings.output) as writer:
        for finished in engine.denoise(plan):
            watch.lap("denoise_s")
            frames = engine.decode(plan, finished)
            watch.lap("decode_s")
            writer.append(frames)
            watch.lap("write_s")
        watch.lap("denoise_s")
        writer.finish()
        watch.lap("write_s")
    return watch, (num_frames, plan.height, plan.width)


@torch.no_grad()
def render_stock(bench: FilmBench, settings: Settings, path: Path) -> tuple[Stopwatch, Shape]:
    """The stock pipeline on the same parts, called as its documentation does."""
    if settings.runtime.threads:
        torch.set_num_threads(settings.runtime.threads)
    device = pick_device(settings)
    parts, dtype = open_checkpoint(bench.model), getattr(torch, bench.dtype)
    assert isinstance(parts, WanCheckpoint)
    layers = ModelPart(range(parts.facts.num_layers))
    transformer = parts.load_layers(layers, dtype, device)
    vae = parts.load_vae(dtype, device)
    pipeline = WanPipeline(*parts.load_text(dtype, device), vae, parts.scheduler, transformer)
    pipeline.set_progress_bar_config(disable=True)
    num_frames = bench_frames(bench, parts.facts)
    width, height = bench.size or (parts.facts.width, parts.facts.height)
    watch = Stopwatch(device)

    def after_step(_pipe: Any, _step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        watch.lap("denoise_s")
        return tensors

    video = pipeline(
        prompt=PROMPT,
        width=width,
        height=height,
        num_frames=num_frames,
        num_inference_steps=bench.steps,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(SEED),
        callback_on_step_end=after_step,
        output_type="np",
    ).frames[0]
    watch.lap("decode_s")
    with FilmWriter(path, width=width, height=height, fps=parts.facts.fps, output=settings.output) as writer:
        for first in range(0, num_frames, 64):
            frames = np.rint(video[first : first + 64] * 255).astype(np.uint8)
            watch.lap("decode_s")
            writer.append(frames)
            watch.lap("write_s")
        writer.finish()
        watch.lap("write_s")
    return watch, (num_frames, height, width)


def bench_frames(bench: FilmBench, facts: ModelFacts) -> int:
    """Frames of the film: whole latents, since the stock pipeline makes no others."""
    num_frames = Duration(bench.seconds, "s").frames(facts.fps)
    return facts.grid.num_frames(facts.grid.num_latents(num_frames))


def bench_of(fields: dict[str, Any]) -> FilmBench:
    """What JSON made lists of is tuples again."""
    given: dict[str, Any] = {key: tuple(value) if isinstance(value, list) else value for key, value in fields.items()}
    return FilmBench(**given)


def peak_mb(device: torch.device) -> float:
    """The most memory that this process has held, in 10^6 bytes: of the GPU if it used one, else resident."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e6
    # Linux lets a child begin with its parent's ru_maxrss; VmHWM begins anew with the program.
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


def main() -> int:
    """Run the side that the arguments name; one JSON object on stdout, with `error` where the message is the user's."""
    side, bench = sys.argv[1], bench_of(json.loads(sys.argv[2]))
    try:
        with contextlib.redirect_stdout(sys.stderr):
            result, code = measure(side, bench), 0
    except LongvidError as error:
        result, code = {"error": str(error)}, error.exit_code
    except KeyboardInterrupt:  # the parent says so
        return Interrupted.exit_code
    print(json.dumps(result))
    return code


if __name__ == "__main__":
    sys.exit(main())
