"""Films for the tests of schedules: plans of given shots, chunk and context sizes, with the contract's ragged ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from longvid.plan import Chunk, Plan, PromptBlend, Shot

FilmMaker = Callable[[list[int], int, int], Plan]


@pytest.fixture(scope="session")
def make_film() -> FilmMaker:
    return _make_film


def _make_film(shot_latents: list[int], chunk_latents: int, context_latents: int) -> Plan:
    chunks: list[Chunk] = []
    shots: list[Shot] = []
    first_frame = 0
    for shot, total in enumerate(shot_latents):
        sizes = _chunk_sizes(total, chunk_latents, context_latents)
        shots.append(Shot(shot, len(chunks), len(sizes), total, 4 * total - 3, first_frame))
        for position, size in enumerate(sizes):
            left = min(context_latents, sizes[position - 1]) if position else 0
            right = min(context_latents, sizes[position + 1]) if position + 1 < len(sizes) else 0
            chunks.append(
                Chunk(
                    index=len(chunks),
                    shot=shot,
                    start=sum(sizes[:position]),
                    num_latents=size,
                    num_left=left,
                    num_right=right,
                    prompts=(PromptBlend(0, 0, 0.0),) * (left + size),
                    noise=tuple(range(size)),
                    noise_key=(0, len(chunks)),
                )
            )
        first_frame += shots[-1].num_frames
    return Plan(
        shots=tuple(shots),
        chunks=tuple(chunks),
        scenes=(),
        prompts=("a circle",),
        negatives=("",),
        fps=24.0,
        width=16,
        height=16,
        num_frames=first_frame,
        seed=0,
    )


def _chunk_sizes(total: int, chunk_latents: int, context_latents: int) -> list[int]:
    sizes = [min(total, chunk_latents + context_latents)]
    while sum(sizes) < total:
        sizes.append(min(chunk_latents, total - sum(sizes)))
    return sizes
