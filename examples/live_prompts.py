"""A film that is steered while it is made: every few seconds of frames it is given another prompt.

python examples/live_prompts.py [STORY.yaml [MODEL]]
"""

import sys
from pathlib import Path

import longvid
from longvid.events import Event, Notice, PromptChanged

STORY = Path(__file__).with_name("minute.yaml")
PROMPTS = {
    40: "a large green square moving up over a black background",
    120: "a large yellow ring moving left over a black background",
}
"""What to ask for when so many frames are there."""


def on_event(event: Event) -> None:
    match event:
        case PromptChanged():
            print(f"from frame {event.first_frame}: {event.prompt}")
        case Notice():
            print(f"note: {event.text}")


def main(story: str | Path = STORY, model: str = "mini") -> None:
    engine = longvid.Engine.load(model)
    stream = engine.stream(story, on_event)
    waiting, frames_seen = dict(PROMPTS), 0
    for clip in stream:  # uint8 [frames, height, width, 3], as chunks finish
        frames_seen += len(clip)
        for count in [count for count in waiting if count <= frames_seen]:
            stream.prompt(waiting.pop(count))  # any thread may ask: one that reads a keyboard, or a web page's
    print(f"{frames_seen} frames")


if __name__ == "__main__":
    main(*sys.argv[1:])
