"""The HLS playlist of a film that is still being written: valid at every moment, and appended to as segments come."""

from __future__ import annotations

import math
from fractions import Fraction
from pathlib import Path


class Playlist:
    """An EVENT playlist beside its segments (RFC 8216). No segment is longer than `longest_s` seconds.

    Each change replaces the whole file, so that no player reads half of one.
    """

    def __init__(self, path: Path, longest_s: Fraction) -> None:
        self.path = path
        self._lines = [
            "#EXTM3U",
            "#EXT-X-VERSION:6",
            f"#EXT-X-TARGETDURATION:{math.ceil(longest_s)}",
            "#EXT-X-MEDIA-SEQUENCE:0",
            "#EXT-X-PLAYLIST-TYPE:EVENT",
            "#EXT-X-INDEPENDENT-SEGMENTS",
        ]
        self._save()

    def append(self, name: str, seconds: Fraction) -> None:
        """Add a segment that lies complete beside the playlist."""
        self._lines += [f"#EXTINF:{float(seconds):.6f},", name]
        self._save()

    def end(self) -> None:
        """Say that no segment follows."""
        self._lines.append("#EXT-X-ENDLIST")
        self._save()

    def _save(self) -> None:
        write_whole(self.path, ("\n".join(self._lines) + "\n").encode())


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that its name never stands for a part of it. Raises OSError."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a full disk, its room lets the playlist end
        raise
