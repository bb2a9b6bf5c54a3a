"""Several films in one pipe: their plans as one, each film in rounds of its own. Pure.

A film alone fills the pipe only where it has as many chunks in flight as there are stages, and not while its first
chunks enter and its last ones leave. Films read nothing of each other, so rounds of several can be carried out side by
side: a *lane* is what one film has in flight. The next film enters a lane in the round after the last chunk of the one
before has, as though it were that film's next chunk. So a film's values are those that it has alone, and only the
order of work is another.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import replace

from longvid.errors import InputError
from longvid.parallel.rules import QueueRules
from longvid.plan import Chunk, FilmSpan, Plan, PromptBlend


def num_lanes(wanted: int | str, stages: int, steps: int, rules: QueueRules) -> int:
    """Films in flight at once; `auto`: so many that there are more units in flight than stages."""
    if wanted != "auto":
        return int(wanted)
    in_flight = -(-steps // rules.gap)
    return 1 if stages == 1 else -(-(stages + 1) // in_flight)


def first_rounds(plans: Sequence[Plan], done: Sequence[int], lanes: int, rules: QueueRules) -> tuple[int, list[int]]:
    """The round from which the films go on together, and each film's first round.

    `done` is the last round of its own that a film has behind it, -1 for one that begins now. Films on their way
    go on at once, in a lane each; the others begin as lanes are free, in order.
    """
    start = max(done) + 1
    firsts = [start - 1 - behind for behind in done]
    free = [
        max(start, first + rules.gap * len(plan.chunks))
        for plan, first, behind in zip(plans, firsts, done, strict=True)
        if behind >= 0
    ]
    free += [start] * (lanes - len(free))
    heapq.heapify(free)
    for index, (plan, behind) in enumerate(zip(plans, done, strict=True)):
        if behind < 0:
            firsts[index] = heapq.heappop(free)
            heapq.heappush(free, firsts[index] + rules.gap * len(plan.chunks))
    return start, firsts


def join(plans: Sequence[Plan], firsts: Sequence[int]) -> Plan:
    """One plan of several films of one size and frame rate. `firsts` are their first rounds.

    A single film that begins in round 0 is left as it is, and so is one that goes on, which is alone. Raises InputError
    for films of other sizes or frame rates.
    """
    if len(plans) == 1 and not firsts[0]:
        return plans[0]
    shape, *others = {(plan.width, plan.height, plan.fps) for plan in plans}
    if others:
        sizes = ", ".join(sorted(f"{width} x {height} at {fps:g} fps" for width, height, fps in (shape, *others)))
        raise InputError(f"films that are made together must have one size and frame rate, not {sizes}")
    pairs = [list(zip(plan.prompts, plan.negatives, strict=True)) for plan in plans]
    ids = {pair: i for i, pair in enumerate(dict.fromkeys(pair for of_film in pairs for pair in of_film))}
    joined = Plan(
        shots=(),
        chunks=(),
        scenes=(),
        prompts=tuple(prompt for prompt, _ in ids),
        negatives=tuple(negative for _, negative in ids),
        fps=plans[0].fps,
        width=plans[0].width,
        height=plans[0].height,
        num_frames=sum(plan.num_frames for plan in plans),
        seed=plans[0].seed,
    )
    for plan, of_film, first in zip(plans, pairs, firsts, strict=True):
        joined = _append(joined, plan, [ids[pair] for pair in of_film], first)
    return joined


def _append(joined: Plan, plan: Plan, prompts: Sequence[int], first_round: int) -> Plan:
    """Another film behind those that were joined; `prompts` are the new ids of its own."""
    chunk, shot = len(joined.chunks), len(joined.shots)

    def renamed(blend: PromptBlend) -> PromptBlend:
        return PromptBlend(prompts[blend.a], prompts[blend.b], blend.weight)

    shots = (replace(s, index=shot + s.index, first_chunk=chunk + s.first_chunk) for s in plan.shots)

    def moved(c: Chunk) -> Chunk:
        end = c.scene_end
        return replace(
            c,
            index=chunk + c.index,
            shot=shot + c.shot,
            prompts=tuple(map(renamed, c.prompts)),
            shares=None if c.shares is None else chunk + c.shares,
            scene_end=end and replace(end, last_reader=chunk + end.last_reader),
        )

    chunks = map(moved, plan.chunks)
    scenes = (replace(s, prompt=prompts[s.prompt], shot=shot + s.shot) for s in plan.scenes)
    span = FilmSpan(range(chunk, chunk + len(plan.chunks)), range(shot, shot + len(plan.shots)), first_round)
    return replace(
        joined,
        shots=(*joined.shots, *shots),
        chunks=(*joined.chunks, *chunks),
        scenes=(*joined.scenes, *scenes),
        joined=(*joined.joined, span),
    )
