"""Reading a film without holding it: frames as RGB, one by one, and errors that name the file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
from numpy.typing import NDArray

from longvid.errors import InputError


class FilmReader:
    """An open film; a context manager. Raises InputError for what is no film, is damaged, or is cut off."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self._container = av.open(str(path))
        except (OSError, av.FFmpegError) as error:
            raise InputError(f"{path}: cannot read a film from it: {error.strerror}") from error
        video = self._container.streams.video
        if not video or not video[0].average_rate:
            self._container.close()
            raise InputError(f"{path}: {'does not say its frame rate' if video else 'holds no video'}")
        self._stream = video[0]
        self.fps = float(video[0].average_rate)
        self.width, self.height = video[0].width, video[0].height

    def frames(self) -> Iterator[NDArray[np.uint8]]:
        """Every frame, uint8 [height, width, 3]."""
        count = 0
        try:
            for frame in self._container.decode(self._stream):
                yield np.asarray(frame.to_ndarray(format="rgb24"), np.uint8)
                count += 1
        except av.FFmpegError as error:
            raise InputError(f"{self.path}: is damaged after frame {count}: {error.strerror}") from error
        promised = self._stream.frames  # 0 where the format does not say
        if count < max(1, promised):
            raise InputError(f"{self.path}: is cut off: it holds {count} of {promised or 'its'} frames")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._container.close()
