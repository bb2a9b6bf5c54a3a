"""Films on disk, read back with PyAV: counts, times, colours, segments, playlist, and what a full disk leaves."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import threading
from collections.abc import Iterator
from fractions import Fraction
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from av.video.reformatter import Interpolation
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from longvid import folder_lock
from longvid.errors import InputError, RuntimeFailure
from longvid.segments import count_frames, frame_rate
from longvid.settings import OutputSettings
from longvid.writer import FilmWriter, WriterState

Frames = NDArray[np.uint8]
SIDE = 64
BITS = 16


def numbered(first: int, count: int) -> Frames:
    """Frames that carry their number in 16 black or white squares."""
    numbers = np.arange(first, first + count)
    bits = (numbers[:, None] >> np.arange(BITS)) & 1
    cells = bits.reshape(count, 4, 4).repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)
    return np.repeat((cells * 200 + 20).astype(np.uint8)[..., None], 3, axis=3)


def numbers_of(frames: list[Frames]) -> list[int]:
    cells = np.stack(frames).mean(-1)
    step = cells.shape[1] // 4
    bits = cells[:, step // 2 :: step, step // 2 :: step].reshape(len(frames), BITS) > 120
    return list(map(int, bits @ (1 << np.arange(BITS))))


def decode(path: Path) -> list[Frames]:
    with av.open(str(path)) as film:
        return [frame.to_ndarray(format="rgb24") for frame in film.decode(video=0)]


def write(path: Path, frames: Frames, *, fps: float = 16, chunk: int = 23, **output: object) -> FilmWriter:
    settings = OutputSettings.model_validate(output)
    height, width = frames.shape[1:3]
    with FilmWriter(path, width=width, height=height, fps=fps, output=settings) as writer:
        for start in range(0, len(frames), chunk):
            writer.append(frames[start : start + chunk])
        assert writer.finish() == path
    return writer


@pytest.mark.parametrize(
    ("fps", "rate"), [(16, Fraction(16)), (23.976, Fraction(24000, 1001)), (12.5, Fraction(25, 2))]
)
def test_a_film_has_every_frame_once_in_order_at_its_rate(tmp_path: Path, fps: float, rate: Fraction) -> None:
    path = tmp_path / "film.mp4"
    write(path, numbered(0, 151), fps=fps, segment_s=1.3)
    with av.open(str(path)) as film:
        stream = film.streams.video[0]
        assert (stream.frames, stream.average_rate, stream.width, stream.height) == (151, rate, SIDE, SIDE)
        assert stream.codec_context.pix_fmt == "yuv420p"
        assert stream.duration * stream.time_base == 151 / rate
        decoded = list(film.decode(stream))
    assert [frame.pts * frame.time_base for frame in decoded] == [i / rate for i in range(151)]
    assert numbers_of([frame.to_ndarray(format="rgb24") for frame in decoded]) == list(range(151))


def test_the_index_comes_first_and_the_folder_is_gone(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    write(path, numbered(0, 50))
    content = path.read_bytes()
    assert 0 < content.find(b"moov") < content.find(b"mdat")
    assert os.listdir(tmp_path) == ["film.mp4"]


def test_keep_state_keeps_segments_and_an_ended_playlist(tmp_path: Path) -> None:
    writer = write(tmp_path / "film.mp4", numbered(0, 50), keep_state=True)
    names = sorted(file.name for file in writer.folder.iterdir())
    assert names == ["film.m3u8", "seg_00000.ts", "seg_00001.ts"]
    assert writer.playlist.read_text().endswith("#EXT-X-ENDLIST\n")


def test_flat_saturated_colours_survive(tmp_path: Path) -> None:
    """Against an oracle of our own (BT.709, limited range), so that a swapped matrix on both sides cannot hide."""
    colours = [(215, 40, 40), (40, 165, 65), (45, 85, 225), (240, 215, 50), (140, 55, 190), (245, 135, 30)]
    colours += [(245, 245, 245), (15, 15, 15), (255, 0, 0), (0, 255, 0), (0, 0, 255), (255, 255, 255), (0, 0, 0)]
    image = np.repeat(np.array(colours, np.uint8)[None, :, None], 32, axis=2).reshape(1, 1, -1, 3).repeat(32, axis=1)
    for crf in (0, 18):
        path = tmp_path / "film.mp4"
        write(path, image.repeat(3, axis=0), crf=crf)
        with av.open(str(path)) as film:
            codec = film.streams.video[0].codec_context
            assert (codec.colorspace, codec.color_primaries, codec.color_trc, codec.color_range) == (1, 1, 1, 1)
            frame = list(film.decode(video=0))[1]
        assert np.abs(_rgb_of_centres(frame, len(colours)) - colours).max() < (2 if crf == 0 else 3)
        exact = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT
        seen = frame.reformat(format="rgb24", interpolation=exact).to_ndarray()[16, 16::32].astype(int)
        assert np.abs(seen - colours).max() <= 3


def _rgb_of_centres(frame: av.VideoFrame, count: int) -> NDArray[np.float64]:
    """Decoded Y, Cb, Cr at the centres of `count` patches, through the textbook formula of BT.709."""
    y, cb, cr = (
        np.frombuffer(bytes(plane), np.uint8).reshape(plane.height, plane.line_size)[:, : plane.width].astype(float)
        for plane in frame.planes
    )
    luma = (y[16, 16::32][:count] - 16) / 219
    blue, red = ((c[8, 8::16][:count] - 128) / 224 for c in (cb, cr))
    r, b = luma + 1.5748 * red, luma + 1.8556 * blue
    return 255 * np.stack([r, (luma - 0.2126 * r - 0.0722 * b) / 0.7152, b], axis=-1)


def test_upscaling_repeats_pixels(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    small = rng.choice(np.array([20, 120, 220], np.uint8), (1, 5, 7, 1)).repeat(3, axis=3).repeat(2, axis=0)
    path = tmp_path / "film.mp4"
    write(path, small, scale=4, crf=0)
    decoded = decode(path)[0].astype(int)
    assert decoded.shape == (20, 28, 3)
    assert np.abs(decoded - small[0].repeat(4, 0).repeat(4, 1)).max() <= 2


def test_every_segment_decodes_by_itself_and_knows_its_time(tmp_path: Path) -> None:
    writer = write(tmp_path / "film.mp4", numbered(0, 100), segment_s=1.5, keep_state=True)
    numbers = []
    for segment in sorted(writer.folder.glob("seg_*.ts")):
        with av.open(str(segment)) as container:
            decoded = list(container.decode(video=0))
        seen = numbers_of([frame.to_ndarray(format="rgb24") for frame in decoded])
        assert decoded[0].key_frame
        assert [float(frame.time) for frame in decoded] == pytest.approx([n / 16 for n in seen], abs=1e-4)
        assert count_frames(segment) == len(seen)
        numbers.append(seen)
    assert [len(seen) for seen in numbers] == [24, 24, 24, 24, 4]
    assert list(chain.from_iterable(numbers)) == list(range(100))


def test_the_playlist_is_valid_at_each_moment(tmp_path: Path) -> None:
    output = OutputSettings(segment_s=1.0)
    with FilmWriter(tmp_path / "film.mp4", width=SIDE, height=SIDE, fps=16, output=output) as writer:
        assert _segments(writer.playlist) == ([], False)
        for start in range(0, 80, 5):
            new = writer.append(numbered(start, 5))
            listed, ended = _segments(writer.playlist)
            assert not ended
            assert len(listed) == (start + 5) // 16
            assert writer.frames_written == 16 * len(listed)
            assert [path.name for path in new] == [name for name, _ in listed[len(listed) - len(new) :]]
            assert all(seconds == 1.0 and (writer.folder / name).is_file() for name, seconds in listed)
        writer.append(numbered(80, 3))
    listed, ended = _segments(writer.playlist)
    assert ended
    assert listed[-1] == ("seg_00005.ts", 3 / 16)
    assert numbers_of(decode(writer.playlist)) == list(range(83))


def test_a_player_can_follow_while_the_film_is_written(tmp_path: Path) -> None:
    output = OutputSettings(segment_s=0.5)
    with FilmWriter(tmp_path / "film.mp4", width=SIDE, height=SIDE, fps=16, output=output) as writer:
        writer.append(numbered(0, 40))
        with av.open(str(writer.playlist), options={"live_start_index": "0"}) as player:
            frames = player.decode(video=0)
            seen = [next(frames).to_ndarray(format="rgb24") for _ in range(20)]
            writer.append(numbered(40, 33))
            writer.close()
            seen += [frame.to_ndarray(format="rgb24") for frame in frames]
    assert numbers_of(seen) == list(range(73))


def _segments(playlist: Path) -> tuple[list[tuple[str, float]], bool]:
    """Names and seconds of a playlist's segments, and whether it is ended; holds it to RFC 8216."""
    text = playlist.read_text()
    assert text.endswith("\n")
    head, *lines = text.splitlines()
    assert head == "#EXTM3U"
    tags = dict(
        line[1:].partition(":")[::2] for line in lines if line.startswith("#") and not line.startswith("#EXTINF")
    )
    assert tags["EXT-X-PLAYLIST-TYPE"] == "EVENT"
    ended = "EXT-X-ENDLIST" in tags
    assert not ended or lines[-1] == "#EXT-X-ENDLIST"
    found = [
        (name, float(info.removeprefix("#EXTINF:").rstrip(",")))
        for info, name in pairwise(lines)
        if info.startswith("#EXTINF")
    ]
    assert all(round(seconds) <= int(tags["EXT-X-TARGETDURATION"]) for _, seconds in found)
    return found, ended


def test_an_error_keeps_what_came_playable_and_joins_to_a_partial_film(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    writer = FilmWriter(path, width=SIDE, height=SIDE, fps=16, output=OutputSettings())
    with pytest.raises(KeyboardInterrupt), writer:
        writer.append(numbered(0, 45))
        raise KeyboardInterrupt
    assert not path.exists()
    assert numbers_of(decode(writer.playlist)) == list(range(45))
    partial = writer.partial()
    assert partial == tmp_path / "film.partial.mp4"
    assert numbers_of(decode(partial)) == list(range(45))
    assert writer.folder.is_dir()


def test_no_frames_make_no_partial_film(tmp_path: Path) -> None:
    with FilmWriter(tmp_path / "film.mp4", width=SIDE, height=SIDE, fps=16, output=OutputSettings()) as writer:
        assert writer.partial() is None


def test_rendering_anew_overwrites_an_interrupted_render_but_not_the_files_of_others(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    write(path, numbered(500, 200), keep_state=True)
    note = tmp_path / "film.mp4.longvid" / "note.txt"
    note.write_text("mine")
    write(path, numbered(0, 40))
    assert numbers_of(decode(path)) == list(range(40))
    assert [file.name for file in note.parent.iterdir()] == ["note.txt"]


def test_bytes_depend_on_the_frames_alone(tmp_path: Path) -> None:
    frames = numbered(0, 90)
    write(tmp_path / "a.mp4", frames, chunk=7)
    write(tmp_path / "b.mp4", frames, chunk=90)
    write(tmp_path / "c.mp4", frames[:89], chunk=90)
    assert (tmp_path / "a.mp4").read_bytes() == (tmp_path / "b.mp4").read_bytes()
    assert (tmp_path / "a.mp4").read_bytes() != (tmp_path / "c.mp4").read_bytes()


def snapshot(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize("num_frames", [1, 8, 19])
def test_a_film_resumed_at_any_frame_has_the_same_bytes(tmp_path: Path, num_frames: int) -> None:
    frames, segment = numbered(0, num_frames), 8
    write(tmp_path / "whole.mp4", frames, segment_s=0.5, keep_state=True)
    settings = OutputSettings(segment_s=0.5, keep_state=True)
    for cut in range(num_frames + 1):
        for later in sorted({cut, min(cut + 11, num_frames)}):  # frames that came after the state was taken
            path = tmp_path / f"film_{cut}_{later}.mp4"
            size: Any = {"width": SIDE, "height": SIDE, "fps": 16, "output": settings}
            with FilmWriter(path, **size) as writer:
                writer.append(frames[:cut])
                state = writer.state()
                writer.append(frames[cut:later])
            assert (state.segments, len(state.open_frames)) == divmod(cut, segment)
            (writer.folder / "state").mkdir()
            with FilmWriter.resume(path, **size, state=state) as writer:
                assert [name for name, _ in _segments(writer.playlist)[0]] == [
                    f"seg_{i:05d}.ts" for i in range(state.segments)
                ]
                assert (writer.folder / "state").is_dir()
                writer.append(frames[cut:])
                writer.finish()
            (writer.folder / "state").rmdir()
            assert path.read_bytes() == (tmp_path / "whole.mp4").read_bytes()
            assert snapshot(writer.folder) == snapshot(tmp_path / "whole.mp4.longvid")


def test_the_state_keeps_its_own_frames(tmp_path: Path) -> None:
    frames = numbered(0, 5)
    with FilmWriter(tmp_path / "film.mp4", width=SIDE, height=SIDE, fps=16, output=OutputSettings()) as writer:
        writer.append(frames)
        frames[:] = 0
        assert np.array_equal(writer.state().open_frames, numbered(0, 5))


@pytest.mark.parametrize("damage", ["missing", "truncated", "empty", "other"])
def test_a_film_is_not_resumed_on_segments_that_are_not_whole(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "film.mp4"
    size: Any = {"width": SIDE, "height": SIDE, "fps": 16, "output": OutputSettings(segment_s=0.5)}
    with FilmWriter(path, **size) as writer:
        writer.append(numbered(0, 30))
    segment = writer.folder / "seg_00001.ts"
    content = segment.read_bytes()
    if damage == "missing":
        segment.unlink()
    else:
        last = (writer.folder / "seg_00003.ts").read_bytes()
        segment.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "other": last}[damage])
    before = snapshot(writer.folder)
    with pytest.raises(InputError, match=r"seg_00001\.ts"):
        FilmWriter.resume(path, **size, state=WriterState(3, numbered(24, 2)))
    assert snapshot(writer.folder) == before
    FilmWriter.resume(path, **size, state=WriterState(1, numbered(8, 2))).close()


def test_checkpoints_stay_until_the_film_is_finished_or_begun_anew(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    state = tmp_path / "film.mp4.longvid" / "state"

    def checkpoint() -> None:
        (state / "round_000001").mkdir(parents=True)
        (state / "round_000001" / "rank_000.safetensors").write_bytes(b"")
        (state / "manifest.json").write_text("{}")

    with (
        pytest.raises(KeyboardInterrupt),
        FilmWriter(path, width=SIDE, height=SIDE, fps=16, output=OutputSettings()) as writer,
    ):
        checkpoint()
        writer.append(numbered(0, 5))
        raise KeyboardInterrupt
    assert (state / "manifest.json").exists()
    write(path, numbered(0, 5), keep_state=True)
    assert not state.exists()
    checkpoint()
    left = WriterState(0, numbered(0, 5))
    FilmWriter.resume(path, width=SIDE, height=SIDE, fps=16, output=OutputSettings(), state=left).finish()
    assert os.listdir(tmp_path) == ["film.mp4"]


def test_paths_that_cannot_hold_a_film_are_refused_before_any_work(tmp_path: Path) -> None:
    (tmp_path / "folder.mp4").mkdir()
    (tmp_path / "taken.mp4.longvid").write_text("a file where the working folder must go")
    cases = {
        "film.avi": "end in .mp4",
        "folder.mp4": "is a folder",
        "missing/film.mp4": "no folder",
        "taken.mp4": "cannot write",
        "x" * 260 + ".mp4": "cannot write",
    }
    for name, message in cases.items():
        with pytest.raises(InputError, match=message):
            FilmWriter(tmp_path / name, width=SIDE, height=SIDE, fps=16, output=OutputSettings())
    with pytest.raises(InputError, match="even"):
        FilmWriter(tmp_path / "film.mp4", width=63, height=64, fps=16, output=OutputSettings())
    assert sorted(os.listdir(tmp_path)) == ["folder.mp4", "taken.mp4.longvid"]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_write_permission_is_refused(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match="cannot write"):
        FilmWriter(tmp_path / "film.mp4", width=SIDE, height=SIDE, fps=16, output=OutputSettings())


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_a_disk_that_fills_up_while_rendering_leaves_what_was_safe(tiny_disk: Path) -> None:
    rng = np.random.default_rng(0)
    path = tiny_disk / "film.mp4"
    writer = FilmWriter(path, width=SIDE, height=SIDE, fps=16, output=OutputSettings(segment_s=0.5))
    with pytest.raises(RuntimeFailure, match="disk is full") as caught, writer:
        for _ in range(100):
            writer.append(rng.integers(0, 255, (8, SIDE, SIDE, 3), np.uint8))
    assert caught.value.exit_code == 3
    assert str(path) in str(caught.value)
    assert writer.frames_written >= 8
    assert f"{writer.frames_written} frames are safe" in str(caught.value)
    assert not path.exists()
    assert len(decode(writer.folder / "seg_00000.ts")) == 8
    listed, _ = _segments(writer.playlist)
    assert not list(writer.folder.glob("*.tmp"))
    assert writer.frames_written - 8 * len(listed) in (0, 8)  # the playlist itself may be what did not fit


def test_a_disk_without_room_for_the_join_leaves_segments_and_no_film(tiny_disk: Path) -> None:
    rng = np.random.default_rng(0)
    path = tiny_disk / "film.mp4"
    with FilmWriter(path, width=SIDE, height=SIDE, fps=16, output=OutputSettings(segment_s=0.5)) as writer:
        free = os.statvfs(tiny_disk)
        while free.f_bfree > 0.4 * free.f_blocks:
            writer.append(rng.integers(0, 255, (8, SIDE, SIDE, 3), np.uint8))
            free = os.statvfs(tiny_disk)
        with pytest.raises(RuntimeFailure, match="disk is full"):
            writer.finish()
    assert os.listdir(tiny_disk) == ["film.mp4.longvid"]
    assert not list(writer.folder.glob("*.tmp"))
    assert len(decode(writer.playlist)) == writer.frames_written


def test_memory_does_not_grow_with_the_film(tmp_path: Path) -> None:
    program = """
        import resource, sys, numpy as np
        from longvid.settings import OutputSettings
        from longvid.writer import FilmWriter, WriterState
        frames = np.random.default_rng(0).integers(0, 255, (16, 32, 32, 3), np.uint8)
        with FilmWriter(sys.argv[1], width=32, height=32, fps=16, output=OutputSettings()) as writer:
            peaks = []
            for second in range(150):
                writer.append(frames)
                peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            writer.finish()
        print(peaks[19], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    """
    command = [sys.executable, "-c", textwrap.dedent(program), str(tmp_path / "film.mp4")]
    early, late = map(int, subprocess.run(command, capture_output=True, text=True, check=True).stdout.split())
    assert late < 1.05 * early


@given(st.integers(1, 240))
def test_whole_and_ntsc_rates_are_exact(fps: int) -> None:
    assert frame_rate(fps) == fps
    assert frame_rate(fps * 1000 / 1001) == Fraction(fps * 1000, 1001)


def test_one_render_at_a_time_writes_a_film(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(folder_lock, "WAIT_S", 0.2)
    path, frames = tmp_path / "film.mp4", numbered(0, 40)
    size: dict[str, Any] = {"width": SIDE, "height": SIDE, "fps": 16, "output": OutputSettings()}
    with FilmWriter(path, **size) as first:
        first.append(frames)
        with pytest.raises(InputError, match=r"film\.mp4: another render is at work on it"):
            FilmWriter(path, **size)
        with pytest.raises(InputError, match="another render"):
            FilmWriter.resume(path, **size, state=WriterState(0, frames[:0]))
        first.finish()
    assert numbers_of(decode(path)) == list(range(40))
    write(path, frames[:5])
    assert len(decode(path)) == 5, "a film that is finished may be rendered anew"


def test_a_render_waits_for_one_that_is_about_to_end(tmp_path: Path) -> None:
    path = tmp_path / "film.mp4"
    held = folder_lock.lock_folder(tmp_path / "film.mp4.longvid", path)
    ending = threading.Timer(0.3, held.release)
    ending.start()
    write(path, numbered(0, 5))
    ending.join()
    assert len(decode(path)) == 5
