"""A film file with settings of one's own, and a callback that is told how far it is.

python examples/library_render.py [STORY.yaml [MODEL [FILM.mp4]]]
"""

import sys
from pathlib import Path

import longvid
from longvid.events import ChunkDone, Event, FilmDone, Notice

STORY = Path(__file__).with_name("two_scenes.yaml")


def on_event(event: Event) -> None:
    match event:
        case ChunkDone():
            print(f"chunk {event.chunk} of {event.num_chunks}, {event.frames_done} frames")
        case Notice():
            print(f"note: {event.text}")
        case FilmDone():
            print(f"{event.path}: {event.num_frames} frames in {event.seconds:.1f} s")


def main(story: str | Path = STORY, model: str = "mini", film: str = "two_scenes.mp4") -> None:
    engine = longvid.Engine.load(model, overrides=["sampler.steps=6", "output.scale=2"])
    engine.render(story, film, on_event)


if __name__ == "__main__":
    main(*sys.argv[1:])
