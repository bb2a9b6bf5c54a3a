"""Long films with a diffusers pipeline that your program has loaded already.

The engine takes the pipeline's transformer over: use a second pipeline for plain diffusers calls.

    python examples/own_pipeline.py [STORY.yaml [FOLDER [FILM.mp4]]]
"""

import sys
from pathlib import Path

from diffusers import WanPipeline

from longvid import Engine
from longvid.models.facts import find_model

STORY = Path(__file__).with_name("two_scenes.yaml")


def main(
    story: str | Path = STORY,
    folder: str | Path | None = None,
    film: str = "two_scenes.mp4",
) -> None:
    pipeline = WanPipeline.from_pretrained(folder or find_model("mini"))  # loaded, changed and placed as you like
    engine = Engine.load(pipeline)
    plan = engine.plan(story)
    print(f"{plan.num_frames} frames of {plan.width} x {plan.height} in {len(plan.chunks)} chunks")
    print(f"wrote {engine.render(story, film)}")


if __name__ == "__main__":
    main(*sys.argv[1:])
