"""Segments of a film, each a few seconds of H.264 that decode by themselves, and their join without re-encoding.

A segment is MPEG-TS, begins with a key frame and has no B-frames: its packets come in the order of display, so
timestamps are frame numbers and segments meet without gaps or edit lists. One encoder a segment means that a film's
bytes do not depend on where an earlier run ended.
"""

from __future__ import annotations

import functools
import io
import os
from collections.abc import Iterable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc, Interpolation
from numpy.typing import NDArray

# Averages chroma over each 2 x 2 pixels, and computes the same bits on every processor.
_EXACT = Interpolation.AREA | Interpolation.ACCURATE_RND | Interpolation.BITEXACT
_NEVER = 1 << 20
_TS_PACKET, _TS_SYNC, _TS_VIDEO = 188, 0x47, 0x100
"""Bytes of an MPEG-TS packet, its first byte, and the stream that FFmpeg numbers first."""


def frame_rate(fps: float) -> Fraction:
    """The exact rate that a number of frames a second stands for: 16, 25/2, and 24000/1001 for 23.976."""
    ntsc = Fraction(round(fps * 1.001) * 1000, 1001)
    if abs(fps - round(fps)) > 1e-3 and abs(fps - ntsc) < 1e-3:
        return ntsc
    return Fraction(fps).limit_denominator(1001)


class SegmentEncoder:
    """Encodes consecutive frames into one segment in memory. The first is frame `start` of the film.

    `size` (width, height) is that of the frames that come; each of their pixels becomes `scale` x `scale` pixels.
    """

    def __init__(self, size: tuple[int, int], rate: Fraction, *, start: int, crf: int, scale: int) -> None:
        width, height = size
        self.num_frames = 0
        self._start, self._rate, self._scale = start, rate, scale
        self._buffer = io.BytesIO()
        # Without copyts, FFmpeg shifts each segment's clock to its own start; the flag lets packet counters begin anew.
        options = {"mpegts_copyts": "1", "mpegts_flags": "initial_discontinuity", "fflags": "+bitexact"}
        self._container = av.open(self._buffer, "w", format="mpegts", options=options)
        self._stream = self._container.add_stream("libx264", rate=rate, options={"crf": str(crf), **_same_bits()})
        self._stream.width, self._stream.height, self._stream.pix_fmt = width * scale, height * scale, "yuv420p"
        codec = self._stream.codec_context
        codec.time_base = 1 / rate
        codec.max_b_frames, codec.gop_size = 0, _NEVER
        codec.thread_count = 1  # the bits of x264's output depend on it
        codec.color_primaries, codec.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        codec.colorspace, codec.color_range = Colorspace.ITU709, ColorRange.MPEG

    def push(self, image: NDArray[np.uint8]) -> None:
        """Encode one frame, uint8 [height, width, 3]."""
        if self._scale > 1:
            image = image.repeat(self._scale, axis=0).repeat(self._scale, axis=1)
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(image), format="rgb24").reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.ITU709,
            src_color_range=ColorRange.JPEG,
            dst_color_range=ColorRange.MPEG,
            interpolation=_EXACT,
        )
        frame.pts, frame.time_base = self._start + self.num_frames, 1 / self._rate
        self.num_frames += 1
        self._container.mux(self._stream.encode(frame))

    def finish(self) -> bytes:
        """The complete segment."""
        self._container.mux(self._stream.encode(None))
        self._container.close()
        return self._buffer.getvalue()


@functools.cache
def _same_bits() -> dict[str, str]:
    """Keeps x264 from AVX-512: on small pictures that code reads stale memory, and one picture in 10,000 differs.

    The AVX2 code makes the same bytes.
    """
    cpu = Path("/proc/cpuinfo")
    return {"x264-params": "asm=avx2"} if cpu.exists() and "avx512f" in cpu.read_text() else {}


def count_frames(path: Path) -> int:
    """Frames of a segment by its packets' headers; 0 for a file that is no whole MPEG-TS. Raises OSError."""
    content = np.fromfile(path, np.uint8)
    if len(content) % _TS_PACKET:
        return 0
    packets = content.reshape(-1, _TS_PACKET)
    stream = (packets[:, 1] & 0x1F).astype(int) << 8 | packets[:, 2]
    begins_frame = (packets[:, 0] == _TS_SYNC) & (packets[:, 1] & 0x40 > 0) & (stream == _TS_VIDEO)
    return int(begins_frame.sum())


def join_segments(segments: Iterable[Path], rate: Fraction, target: Path) -> int:
    """Join segments into an MP4 whose index comes first. Returns its number of frames.

    Raises OSError and av.FFmpegError; what is then left at `target` is no film.
    """
    num_frames = 0
    options = {"movflags": "+faststart", "fflags": "+bitexact"}
    with av.open(str(target), "w", format="mp4", options=options) as film:
        stream = None
        for path in segments:
            with av.open(str(path), format="mpegts") as segment:
                source = segment.streams.video[0]
                if stream is None:
                    stream = film.add_stream_from_template(source)
                    stream.time_base = 1 / rate
                for packet in segment.demux(source):
                    if packet.size == 0:  # demux ends with an empty packet, which would flush a decoder
                        continue
                    # MPEG-TS rounds times to 1/90000 s and wraps after 26 hours; frame numbers do neither.
                    packet.stream, packet.time_base = stream, 1 / rate
                    packet.pts = packet.dts = num_frames
                    packet.duration = 1
                    num_frames += 1
                    film.mux(packet)
    with target.open("rb+") as file:
        os.fsync(file.fileno())  # some file systems report a full disk only here
    return num_frames
