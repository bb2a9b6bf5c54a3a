"""Sparse attention and a cache in a diffusers pipeline that your program uses as before.

python examples/accelerate_pipeline.py [FRAMES [FOLDER]]
"""

import sys
import time
from pathlib import Path
from typing import Any

import torch
from diffusers import WanPipeline

import longvid
from longvid.models.facts import find_model


def main(frames: int | str = 961, folder: str | Path | None = None) -> None:
    pipe = WanPipeline.from_pretrained(folder or find_model("mini"))
    whole = seconds(pipe, int(frames))
    longvid.accelerate(pipe, attention="adaspa")
    sparse = seconds(pipe, int(frames))
    longvid.accelerate(pipe, attention="adaspa", cache="taylorseer")
    both = seconds(pipe, int(frames))
    longvid.restore(pipe)
    print(f"{frames} frames: dense {whole:.1f} s, adaspa {sparse:.1f} s, with taylorseer {both:.1f} s")


def seconds(pipe: Any, frames: int) -> float:
    """The time of a clip without its decoding."""
    shape = {"num_frames": frames, "height": 64, "width": 64, "output_type": "latent"}
    start = time.perf_counter()
    pipe(
        "a large red circle moving left over a blue background",
        **shape,
        num_inference_steps=8,
        guidance_scale=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    return time.perf_counter() - start


if __name__ == "__main__":
    main(*sys.argv[1:])
