"""Frames as they are made: a storyboard as numpy arrays, with nothing written to disk.

python examples/library_stream.py [STORY.yaml [MODEL]]
"""

import sys
from pathlib import Path

import longvid

STORY = Path(__file__).with_name("two_scenes.yaml")


def main(story: str | Path = STORY, model: str = "mini") -> None:
    engine = longvid.Engine.load(model)
    frames_seen = 0
    for clip in engine.stream(story):  # uint8 [frames, height, width, 3], as chunks finish
        red, green, blue = clip.mean(axis=(0, 1, 2))
        last = frames_seen + len(clip) - 1
        print(f"frames {frames_seen:4} to {last:4}: mean colour ({red:.0f}, {green:.0f}, {blue:.0f})")
        frames_seen += len(clip)


if __name__ == "__main__":
    main(*sys.argv[1:])
