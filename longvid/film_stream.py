"""A film as its frames come: `Engine.stream` gives it to whoever iterates over it and may change what is to come."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator

import numpy as np
from numpy.typing import NDArray

from longvid.errors import InputError
from longvid.events import Event
from longvid.live import Wish, Wishes
from longvid.script import parse_prompt

Frames = NDArray[np.uint8]
OnEvent = Callable[[Event], None]


def ignore_event(event: Event) -> None:
    """The default callback."""


class FilmStream(Iterator[Frames]):
    """A film's frames, piece by piece, uint8 [T, height, width, 3]; what is still to come may be changed."""

    def __init__(self, frames: Generator[Frames, None, None], wishes: Wishes | None) -> None:
        self._frames, self._wishes = frames, wishes

    def __next__(self) -> Frames:
        return next(self._frames)

    def prompt(self, text: str, negative: str | None = None) -> None:
        """Have the scene that is on follow another prompt, from the next chunk that can take it to the scene's end.

        From any thread; on a rank other than the leader it does nothing. The event PromptChanged says from which frame.
        Raises InputError for what no storyboard could hold.
        """
        text = parse_prompt(text, "a prompt")
        if not text:
            raise InputError("a prompt must say something")
        negative = None if negative is None else parse_prompt(negative, "a negative")
        if self._wishes is None:
            raise InputError(
                "with schedule=chunks all chunks are at one step, and none can take another prompt: use queue"
            )
        self._wishes.ask(Wish(text, negative))

    def close(self) -> None:
        """Stop early."""
        self._frames.close()
