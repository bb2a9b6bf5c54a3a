"""A render's events become a bar on a terminal and plain lines elsewhere."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from longvid.events import ChunkDone, FilmDone, Notice, RoundDone, Started
from longvid.progress import LINE_EVERY_S, Tally, clock_time, show_progress

STARTED = Started(num_frames=480, num_chunks=20, num_rounds=27, width=64, height=48, fps=16.0)
HIDE_CURSOR, SHOW_CURSOR, ERASE_LINE = "\x1b[?25l", "\x1b[?25h", "\x1b[2K"


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def round_done(n):
    """Round n of 27, counted from 1: the queue fills, runs full with 8 chunks, and empties."""
    units = [min(i, 8, 28 - i) for i in range(1, 28)]
    return RoundDone(n, 27, units[n - 1], sum(units[:n]), sum(units))


def render(show, clock, round_s):
    """The events of a render whose rounds take `round_s` seconds; 20 chunks of 8 steps."""
    show(Started(480, 20, 27, 64, 48, 16.0))
    for n in range(1, 28):
        clock.now += round_s
        show(round_done(n))
        if n >= 8:
            show(ChunkDone(n - 7, 20, (n - 7) * 24))
    show(FilmDone(Path("film.mp4"), 480, 27 * round_s))


def lines_of(round_s, terminal=False):
    file, clock = io.StringIO(), FakeClock()
    console = Console(file=file, force_terminal=terminal, width=100, color_system=None)
    with show_progress(console, clock) as show:
        render(show, clock, round_s)
    return file.getvalue()


def test_a_quick_render_says_only_when_it_starts_and_ends() -> None:
    first, last = lines_of(round_s=0.01).splitlines()
    assert first == "rendering 30.0 s of film, 480 frames of 64 x 48 at 16 fps: 20 chunks in 27 rounds"
    assert last == "film.mp4: 480 frames in 0.3 s (1777.8 frames/s)"


def test_plain_lines_come_at_most_every_few_seconds() -> None:
    between = lines_of(round_s=1.0).splitlines()[1:-1]
    assert 27 / LINE_EVERY_S - 1 <= len(between) <= 27 / LINE_EVERY_S
    assert between[2] == "round 15/27, chunk 7/20, film 10.5/30.0 s, 11.2 frames/s, 0:08 left"


def test_plain_lines_have_no_control_characters_and_do_not_wrap() -> None:
    file = io.StringIO()
    with show_progress(Console(file=file, force_terminal=False, width=20)) as show:
        show(Notice("line 3: the model does not know [bold]'cat'[/bold] (nearest: 'car')"))
    assert file.getvalue() == "note: line 3: the model does not know [bold]'cat'[/bold] (nearest: 'car')\n"


@pytest.mark.parametrize("error", [None, KeyboardInterrupt, RuntimeError])
def test_a_terminal_is_clean_after_the_end_however_it_ends(error: type[BaseException] | None) -> None:
    file, clock = io.StringIO(), FakeClock()
    console = Console(file=file, force_terminal=True, width=100, color_system=None)
    try:
        with show_progress(console, clock) as show:
            show(STARTED)
            show(Notice("[sic] a note stays"))
            if error:
                raise error
    except (KeyboardInterrupt, RuntimeError):
        pass
    written = file.getvalue()
    assert "note: [sic] a note stays" in written
    assert written.rindex(SHOW_CURSOR) > written.rindex(HIDE_CURSOR)
    # The bar's line is erased, and nothing is written after that.
    assert written.rindex(ERASE_LINE) > written.rindex("round 0/27")


def test_the_bar_fits_a_terminal_of_80_columns() -> None:
    file, clock = io.StringIO(), FakeClock()
    console = Console(file=file, force_terminal=True, width=80, color_system=None)
    with show_progress(console, clock) as show:
        show(STARTED)
        clock.now += 2
        show(round_done(10))
        show(ChunkDone(3, 20, 72))
    assert "round 10/27, chunk 3/20, film 4.5/30.0 s, 36.0 frames/s, 0:04 left" in file.getvalue()


def test_time_left_follows_the_pace_of_the_latest_rounds() -> None:
    clock = FakeClock()
    tally = Tally(clock)
    assert tally.left_s() is None
    tally.add(STARTED)
    for n in range(1, 13):
        clock.now += 1.0 if n <= 3 else 3.0
        tally.add(round_done(n))
    units_of_the_latest_8_rounds, units_left = 5 + 6 + 7 + 5 * 8, 160 - 36 - 4 * 8
    assert tally.left_s() == pytest.approx(units_left * 8 * 3.0 / units_of_the_latest_8_rounds)
    clock.now += 100
    assert tally.left_s() == 0


def test_clock_time_reads_like_a_clock() -> None:
    assert [clock_time(s) for s in (0, 39.4, 725, 12000)] == ["0:00", "0:39", "12:05", "3:20:00"]
