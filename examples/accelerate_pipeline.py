"""Sparse attention in a diffusers pipeline that your program uses as before.

python examples/accelerate_pipeline.py [FOLDER [FRAMES [FILM.mp4]]]
"""

import sys
from pathlib import Path

from diffusers import WanPipeline
from diffusers.utils import export_to_video

import longvid
from longvid.models.facts import find_model


def main(folder: str | Path | None = None, frames: int | str = 481, film: str = "accelerated.mp4") -> None:
    pipe = WanPipeline.from_pretrained(folder or find_model("mini"))
    longvid.accelerate(pipe, attention="adaspa")  # longvid.restore(pipe) undoes it
    shape = {"num_frames": int(frames), "height": 64, "width": 64}
    prompt = "a large red circle moving left over a blue background"
    result = pipe(prompt, **shape, num_inference_steps=8, guidance_scale=1.0)
    export_to_video(result.frames[0], film, fps=16)
    print(f"wrote {film}")


if __name__ == "__main__":
    main(*sys.argv[1:])
