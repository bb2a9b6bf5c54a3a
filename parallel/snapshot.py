"""Snapshots: which latents the global tokens (VIN) of a round are made of. Pure arithmetic, the same on every rank.

The tokens of round n tell how the shot's chunks stood when round n - LAG began. What is newer is not waited for: on
several stages the last units of a round are still on their way when the next begins, and a snapshot of them would empty
the pipe once a round. A round's lag costs nothing as long as the queue itself fills the pipe.
"""

from __future__ import annotations

from collections.abc import Iterator

from longvid.plan import Chunk

LAG = 1
"""Rounds between a snapshot and the round that reads it."""


def key_latents(chunk: Chunk, spacing: int) -> list[int]:
    """Which of a chunk's own latents are key latents: those whose place in the shot is a multiple of `spacing`."""
    return [latent for latent in range(chunk.num_latents) if (chunk.start + latent) % spacing == 0]


def versions_at(shot: range, at: int, steps: int, gap: int) -> Iterator[tuple[int, int]]:
    """The chunks of a shot in flight as round `at` begins, and the steps they have taken: pure noise is left out."""
    oldest = oldest_in_flight(shot, at, steps, gap)
    newest = min((at - 1) // gap, shot[-1])
    return ((chunk, at - gap * chunk) for chunk in range(oldest, newest + 1))


def oldest_in_flight(shot: range, at: int, steps: int, gap: int) -> int:
    """The first chunk of a shot that is not finished as round `at` begins; behind the last, if all are."""
    finished = max(0, (at - steps) // gap + 1)
    return min(max(shot.start, finished), shot.stop)


def is_remembered(chunk: int, first: int, oldest: int, octaves: int) -> bool:
    """Whether a finished chunk is read, when `oldest` is the oldest in flight: the long memory of a shot.

    Of the chunks 1, 2-3, 4-7, 8-15, ... before the oldest in flight one each, so many times, and the shot's first. One
    that was left out once is never read again.
    """
    if not octaves:
        return False
    octave = (oldest - chunk).bit_length() - 1
    return chunk == first or (octave < octaves and (chunk - first) % (1 << octave) == 0)


def snapshot(shot: range, n: int, steps: int, gap: int, octaves: int) -> tuple[tuple[int, int], ...]:
    """(chunk, version) of all latents that the tokens of round n are made of, in the order of the film."""
    stood = n - LAG
    oldest = oldest_in_flight(shot, stood, steps, gap)
    spans = [range(max(shot.start, oldest - (1 << octaves) + 1), oldest)] if octaves else []
    if spans and spans[0].start > shot.start:
        spans.insert(0, range(shot.start, shot.start + 1))
    finished = [(i, steps) for span in spans for i in span if is_remembered(i, shot.start, oldest, octaves)]
    return (*finished, *versions_at(shot, stood, steps, gap))
