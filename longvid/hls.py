"""The HLS playlist of a film that is still being written: valid at every moment, and appended to as segments come."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path


class Playlist:
    """An EVENT playlist beside its segments (RFC 8216). No segment is longer than `longest_s` seconds.

    `segments` are the names and seconds of those that are there already.

    Each change replaces the whole file, so that no player reads half of one.
    """

    def __init__(self, path: Path, longest_s: Fraction, segments: Iterable[tuple[str, Fraction]] = ()) -> None:
        self.path = path
        self._lines = [
            "#EXTM3U",
            "#EXT-X-VERSION:6",
            f"#EXT-X-TARGETDURATION:{math.ceil(longest_s)}",
            "#EXT-X-MEDIA-SEQUENCE:0",
            "#EXT-X-PLAYLIST-TYPE:EVENT",
            "#EXT-X-INDEPENDENT-SEGMENTS",
        ]
        for name, seconds in segments:
            self._lines += _entry(name, seconds)
        self._save()

    def append(self, name: str, seconds: Fraction) -> None:
        """Add a segment that lies complete beside the playlist."""
        self._lines += _entry(name, seconds)
        self._save()

    def end(self) -> None:
        """Say that no segment follows."""
        self._lines.append("#EXT-X-ENDLIST")
        self._save()

    def _save(self) -> None:
        write_whole(self.path, ("\n".join(self._lines) + "\n").encode())


def _entry(name: str, seconds: Fraction) -> list[str]:
    return [f"#EXTINF:{float(seconds):.6f},", name]


def write_whole(path: Path, content: bytes, *, durable: bool = False) -> None:
    """Write a file so that its name never stands for a part of it; durable: not after a power cut either.

    Raises OSError.
    """
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        if durable:
            sync(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk, its room lets the playlist end
        raise
    if durable:
        sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's bytes, or a folder's names, are on the disk. Raises OSError."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)
