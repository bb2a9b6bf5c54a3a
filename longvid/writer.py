"""The film on disk: segments and a playlist that plays while the film renders, and the joined MP4 at the end."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import av
import numpy as np
from numpy.typing import NDArray

from longvid.errors import InputError, RuntimeFailure
from longvid.folder_lock import FolderLock, lock_folder
from longvid.hls import Playlist, write_whole
from longvid.manifest import ANEW, MANIFEST, state_folder, working_folder
from longvid.segments import SegmentEncoder, count_frames, frame_rate, join_segments
from longvid.settings import OutputSettings

_OUT_OF_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class WriterState:
    """What there is of a film: so many complete segments on the disk, and the frames that came after them.

    `open_frames` uint8 [n, height, width, 3], fewer than a segment holds. `short` are the segments with which the film
    ended once, before it went on, if they hold fewer frames than the others: (segment, frames).
    """

    segments: int
    open_frames: NDArray[np.uint8]
    short: tuple[tuple[int, int], ...] = ()


class FilmWriter:
    """Writes a film as it is rendered. Memory holds one segment, whatever the film's length.

    While it renders, `folder` (`film.mp4.longvid/`) holds the segments and `playlist`; what an interrupted render left
    there, checkpoints too, is overwritten, or gone on with by `resume`. `finish` joins the segments to `path`, which
    takes the film's room on the disk once more, and removes the folder. Leaving the context without `finish` keeps
    segments and playlist, playable, and checkpoints.

    `width` and `height` are those of the frames that come, before `output.scale`. Raises InputError for a path that
    cannot be written, for one at which another render is at work, and for odd sizes; RuntimeFailure for a disk that
    fails or is full.
    """

    def __init__(
        self,
        path: str | Path,
        *,
        width: int,
        height: int,
        fps: float,
        output: OutputSettings,
        kept_segments: int | None = None,
        short: Sequence[tuple[int, int]] = (),
    ) -> None:
        self.path = Path(path)
        self.folder = working_folder(self.path)
        self.rate = frame_rate(fps)
        self.frames_written = 0
        """Frames in complete segments."""
        self._size, self._output = (width, height), output
        self._segment_frames = max(1, round(output.segment_s * self.rate))
        self._segments: list[str] = []
        self._short = dict(short)
        self._encoder: SegmentEncoder | None = None
        self._open_frames: list[NDArray[np.uint8]] = []
        self._closed = False
        self._lock = FolderLock(None)
        _check_size(width * output.scale, height * output.scale)
        self.playlist = self.folder / "film.m3u8"
        self._open_folder(kept_segments)

    @classmethod
    def resume(
        cls,
        path: str | Path,
        *,
        width: int,
        height: int,
        fps: float,
        output: OutputSettings,
        state: WriterState,
    ) -> Self:
        """Go on from a `WriterState`; the film's bytes are those of a writer that was never interrupted.

        The segments that came later are removed. Raises InputError where one of the first is missing or not whole.
        """
        shape: dict[str, Any] = {"width": width, "height": height, "fps": fps, "output": output}
        writer = cls(path, **shape, kept_segments=state.segments, short=state.short)
        assert len(state.open_frames) < writer._segment_frames, "these frames fill a segment"
        writer.append(state.open_frames)
        return writer

    def state(self) -> WriterState:
        """What there is now; `close` ends the open segment, so there is none after it."""
        width, height = self._size
        open_frames = np.array(self._open_frames, np.uint8).reshape(-1, height, width, 3)
        return WriterState(len(self._segments), open_frames, tuple(self._short.items()))

    def append(self, frames: NDArray[np.uint8]) -> tuple[Path, ...]:
        """Write frames, uint8 [n, height, width, 3]. Returns the segments that they completed."""
        width, height = self._size
        assert not self._closed, "the film is finished"
        assert frames.dtype == np.uint8 and frames.shape[1:] == (height, width, 3), (frames.dtype, frames.shape)
        first_new = len(self._segments)
        with self._disk():
            for frame in frames:
                self._encode(frame)
        return tuple(self.folder / name for name in self._segments[first_new:])

    def finish(self) -> Path:
        """Join the segments to the film and remove them, unless the settings keep them. Returns the film's path.

        What an interruption left as `film.partial.mp4` goes away: all of it is in the film.
        """
        self.close()
        self._join(self.path)
        self._partial_path.unlink(missing_ok=True)
        if not self._output.keep_state:
            self._remove_folder()
        return self.path

    def partial(self) -> Path | None:
        """Join what there is to `film.partial.mp4` and return its path; None where not even one frame came."""
        self.close()
        if not self._segments:
            return None
        self._join(self._partial_path)
        return self._partial_path

    @property
    def _partial_path(self) -> Path:
        return self.path.with_name(f"{self.path.stem}.partial.mp4")

    def close(self) -> None:
        """End the open segment and the playlist. No frames can follow."""
        if self._closed:
            return
        self._closed = True
        with self._disk():
            self._end_segment()
            self._playlist.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # The error on its way out says what went wrong; a full disk would only fail a second time here.
        try:
            with contextlib.suppress(RuntimeFailure) if error else contextlib.nullcontext():
                self.close()
        finally:
            self._lock.release()

    def _encode(self, frame: NDArray[np.uint8]) -> None:
        encoder = self._encoder or SegmentEncoder(
            self._size, self.rate, start=self.frames_written, crf=self._output.crf, scale=self._output.scale
        )
        self._encoder = None  # Ctrl-C inside `push` may cost the segment a packet: then it must not be used
        encoder.push(frame)
        self._encoder = encoder
        self._open_frames.append(frame.copy())
        if encoder.num_frames == self._segment_frames:
            self._end_segment()

    def _end_segment(self) -> None:
        # Forgotten first: an encoder can end only once, even when the disk is full.
        encoder, self._encoder = self._encoder, None
        self._open_frames = []
        if encoder is None:
            return
        name = segment_name(len(self._segments))
        write_whole(self.folder / name, encoder.finish())
        if encoder.num_frames < self._segment_frames:
            self._short[len(self._segments)] = encoder.num_frames
        self._segments.append(name)
        self.frames_written += encoder.num_frames
        self._playlist.append(name, encoder.num_frames / self.rate)

    def _join(self, target: Path) -> None:
        temporary = self.folder / "film.tmp"
        try:
            with self._disk():
                num_frames = join_segments((self.folder / name for name in self._segments), self.rate, temporary)
                if num_frames != self.frames_written:
                    raise RuntimeFailure(
                        f"{self.folder}: segments hold {num_frames} frames, but {self.frames_written} were written"
                    )
                temporary.replace(target)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)

    def _open_folder(self, kept_segments: int | None) -> None:
        try:
            check_path(self.path)
            self._lock = lock_folder(self.folder, self.path)
            if kept_segments is None:
                self._remove_files()
            else:
                self._keep(kept_segments)
            seconds = self._segment_frames / self.rate
            held = ((name, self._held(index) / self.rate) for index, name in enumerate(self._segments))
            self._playlist = Playlist(self.playlist, seconds, held)
        except OSError as error:
            if error.errno in _OUT_OF_SPACE:
                raise self._failure(error) from error
            raise InputError(f"{self.path}: cannot write there: {error.strerror}") from error
        except InputError:
            self._lock.release()
            raise

    def _keep(self, num_segments: int) -> None:
        names = [segment_name(index) for index in range(num_segments)]
        for index, name in enumerate(names):
            self._check_segment(self.folder / name, self._held(index))
        for file in (*self.folder.glob("seg_*.ts"), *self.folder.glob("*.tmp")):
            if file.name not in names:
                file.unlink()
        self._segments, self.frames_written = names, sum(map(self._held, range(num_segments)))

    def _held(self, index: int) -> int:
        """Frames of a complete segment."""
        return self._short.get(index, self._segment_frames)

    def _check_segment(self, path: Path, expected: int) -> None:
        try:
            problem = f"holds {num_frames} frames" if (num_frames := count_frames(path)) != expected else ""
        except OSError as error:
            problem = f"cannot be read ({error.strerror})"
        if problem:
            raise InputError(f"{path}: {problem}, but {expected} frames were written there; {ANEW}")

    def _remove_folder(self) -> None:
        # The film is complete: leftovers are no reason to fail, and files of others are not ours to remove.
        with contextlib.suppress(OSError):
            self._remove_files()
            self.folder.rmdir()

    def _remove_files(self) -> None:
        state = state_folder(self.path)
        (state / MANIFEST).unlink(missing_ok=True)  # first: without it, what is left is no checkpoint
        if state.exists():
            shutil.rmtree(state)
        for pattern in ("seg_*.ts", "film.m3u8", "*.tmp"):
            for file in self.folder.glob(pattern):
                file.unlink()

    @contextlib.contextmanager
    def _disk(self) -> Iterator[None]:
        try:
            yield
        except (OSError, av.FFmpegError) as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> RuntimeFailure:
        reason = getattr(error, "strerror", None) or str(error)
        full = getattr(error, "errno", None) in _OUT_OF_SPACE
        return RuntimeFailure(
            f"{self.path}: {'the disk is full' if full else 'cannot write the film'}: {reason}; "
            f"{self.frames_written} frames are safe in {self.folder}"
        )


def segment_name(index: int) -> str:
    """The file of a segment in the film's working folder."""
    return f"seg_{index:05d}.ts"


def _check_size(width: int, height: int) -> None:
    if width % 2 or height % 2:
        raise InputError(
            f"a film of {width} x {height} pixels: H.264 in yuv420p needs an even width and height; set output.scale=2"
        )


def check_path(path: Path) -> None:
    """Refuse a film's path that cannot be right, with an InputError: this costs nothing, loading a model does."""
    if path.suffix.lower() != ".mp4":
        raise InputError(f"{path}: the film's name must end in .mp4")
    if path.is_dir():
        raise InputError(f"{path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise InputError(f"{path}: there is no folder {path.parent}")
    if not os.access(path.parent, os.W_OK):
        raise InputError(f"{path}: cannot write in the folder {path.parent.resolve()}")


def check_file(option: str, path: Path | None) -> None:
    """Refuse a file that cannot be written, with an InputError that names the option."""
    if path is None:
        return
    if path.is_dir():
        raise InputError(f"{option} {path}: is a folder; name a file")
    if not path.parent.is_dir():
        raise InputError(f"{option} {path}: there is no folder {path.parent}")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise InputError(f"{option} {path}: cannot be written")
