"""The schedule: which unit of work runs when, and exactly what it reads. Pure data, made as it is read.

A schedule is a stream of Actions. Each names the values that it reads and makes, so that whoever carries it out does no
arithmetic and never polls: `z3@5` is the latents of chunk 3 after 5 steps, `kv4@7` the K/V of chunk 4 from round 7.

In the queue (DualParal, "Minute-Long Videos with Dual Parallelisms"), chunk i enters in round i and is at step
k = n - i in round n. A round takes one step of every queued chunk, newest first. `verify.grid` for 3 steps:

    round  c0  c1  c2  c3
        0   0   .   .   .
        1   1   0   .   .
        2   2   1   0   .   finish c0
        3   .   2   1   0   finish c1
        4   .   .   2   1   finish c2
        5   .   .   .   2   finish c3

forward(i, k) reads its own z[i]@k; as right context the K/V that forward(i+1, k-1) stored just before, in the same
round; and as left context either the last latents of z[i-1], recomputed through all layers (`left: recompute`), or the
K/V that forward(i-1, k) stored a round ago, when chunk i-1 was at the same step (`left: cached`).

After a transition `share`, the chunks of the new scene also read the K/V of how the scene before ended, as its chunk
stored them at the same step. They live until the last of these chunks was at that step.

With a `gap` of g steps between neighbours, chunk i enters in round g·i: fewer chunks are in flight.

In the chunk schedule (VIN, "Generating, Fast and Slow: Video Interface Networks"), all chunks are at one step. Left
context is recomputed from the last latents of the chunk before, at that step; in the early steps what both chunks
predict for these latents is fused. Chunks that are more than a group follow in groups, for memory must not grow with
the film: the first chunk of a group sees the finished latents of the one before. With groups of 2, for 2 steps:

    round  c0  c1  c2
        0   0   0   .
        1   1   1   .   finish c0 c1
        2   .   .   0
        3   .   .   1   finish c2

A cache may have steps forecast instead of computed: the same steps of every chunk. Their velocity comes of the chunk's
earlier ones, no layer runs, and whoever would read their K/V reads those of the last step that was computed. Of gated
steps the first rank decides behind the first layers whether the others run; the schedule is the same either way.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import groupby

from longvid.parallel.actions import Action, shift
from longvid.parallel.chunk_units import ChunkGroup
from longvid.parallel.queue_units import Queue
from longvid.parallel.rules import ChunkRules, QueueRules, rules_of
from longvid.plan import Chunk, FilmSpan, Plan
from longvid.settings import Settings


def make_schedule(plan: Plan, settings: Settings) -> Iterator[Action]:
    """The schedule that the settings ask for; of several films, each round by round beside the others."""

    def of_film(film: FilmSpan) -> Iterator[Action]:
        alone = _schedule(plan.chunks[film.chunks.start : film.chunks.stop], settings, plan.first_chunk)
        return (shift(action, film.chunks.start, film.first_round) for action in alone)

    return heapq.merge(*map(of_film, plan.films), key=lambda action: action.round)


def _schedule(chunks: Sequence[Chunk], settings: Settings, first: int) -> Iterator[Action]:
    """That of one film's chunks, those before `first` being finished."""
    steps = settings.sampler.steps
    if settings.schedule == "chunks":
        return chunk_schedule(chunks, steps, ChunkRules.of(settings))
    if settings.schedule == "sequential":
        return sequential_schedule(chunks, steps, QueueRules.of(settings), first)
    return queue_schedule(chunks, steps, QueueRules.of(settings), first)


def last_round(film: FilmSpan, settings: Settings) -> int:
    """The round in which a film's last chunk takes its last step."""
    return film.first_round + rules_of(settings).num_rounds(len(film.chunks), settings.sampler.steps) - 1


def first_round(plan: Plan, settings: Settings) -> int:
    """The round in which work begins: that in which a film that goes on would have come so far."""
    rules = rules_of(settings)
    return rules.gap * plan.first_chunk if isinstance(rules, QueueRules) else 0


def num_rounds(plan: Plan, settings: Settings) -> int:
    """Rounds from the first one until the last film is done."""
    return 1 + max(last_round(film, settings) for film in plan.films) - first_round(plan, settings)


def num_units(plan: Plan, settings: Settings, done: int) -> int:
    """Units of the rounds up to `done`."""
    rules, steps, begun = rules_of(settings), settings.sampler.steps, done + 1 - first_round(plan, settings)
    return sum(
        rules.num_units(len(film.chunks) - plan.first_chunk, steps, max(0, begun - film.first_round))
        for film in plan.films
    )


def num_finished(plan: Plan, settings: Settings, done: int) -> list[int]:
    """Chunks of each film that are finished when round `done` is over."""
    rules, steps, begun = rules_of(settings), settings.sampler.steps, done + 1 - first_round(plan, settings)
    return [
        plan.first_chunk
        + rules.num_finished(len(film.chunks) - plan.first_chunk, steps, max(0, begun - film.first_round))
        for film in plan.films
    ]


def queue_schedule(chunks: Sequence[Chunk], steps: int, rules: QueueRules, first: int = 0) -> Iterator[Action]:
    """The queue. Chunks of different shots follow each other without a pause.

    `left_level` is how far denoised forward(i, k) sees latents as left context: "same" reads z[i-1]@k, "fresher"
    z[i-1] as it stands, `gap` steps further (or finished). Chunks before `first` are finished: what the first one reads
    as left context is clean at all steps, and is recalled.
    """
    queue = Queue(chunks, steps, rules, first)
    gap = rules.gap
    for n in range(gap * first, rules.num_rounds(len(chunks), steps)):
        newest, oldest = min(n // gap, len(chunks) - 1), max(-(-(n - steps + 1) // gap), first)
        for shot, members in groupby(range(newest, oldest - 1, -1), key=lambda i: chunks[i].shot):
            yield from queue.of_shot(n, shot, list(members))


def sequential_schedule(
    chunks: Sequence[Chunk], steps: int, rules: QueueRules | None = None, first: int = 0
) -> Iterator[Action]:
    """One chunk after the other, each for all its steps: the oracle for short clips. No chunk may have context, but for
    the first one of a film that goes on.

    Of the rules only what a cache leaves out counts.
    """
    alone = [*chunks[:1], *chunks[first + 1 :]]
    assert all(chunk.num_left == chunk.num_right == 0 for chunk in alone), "a sequential chunk is a whole shot"
    return queue_schedule(chunks, steps, replace(rules or QueueRules(), gap=steps), first)


def chunk_schedule(chunks: Sequence[Chunk], steps: int, rules: ChunkRules) -> Iterator[Action]:
    """All chunks of a group at the same step, in the order of the film; one group after the other."""
    groups = rules.groups(len(chunks))
    for g, (group, after) in enumerate(zip(groups, (*groups[1:], range(0)), strict=True)):
        together = ChunkGroup(chunks, steps, rules, group, after)
        for k in range(steps):
            yield from together.round(g * steps + k, k)
