"""Films for the tests of schedules: plans of given shots, chunk and context sizes, with the contract's ragged ends."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from longvid.geometry import LatentGrid
from longvid.plan import Chunk, ModelFacts, Plan, PromptBlend, Shot, make_plan
from longvid.script import Duration, Scene, Script, Transition
from longvid.settings import load_settings

FilmMaker = Callable[[list[int], int, int], Plan]
SceneMaker = Callable[..., Plan]


@pytest.fixture(scope="session")
def make_film() -> FilmMaker:
    return _make_film


@pytest.fixture(scope="session")
def make_scenes() -> SceneMaker:
    """One shot of scenes (latents, latents over which it shares with the scene before, 0 for none).

    `ends` are latents at which the film ended once.
    """
    return _make_scenes


def _make_scenes(
    scenes: list[tuple[int, int]], chunk_latents: int, context_latents: int, ends: tuple[int, ...] = ()
) -> Plan:
    def scene(index: int, length: int, over: int) -> Scene:
        share = Transition("share", Duration(min(over, length), "f")) if over else Transition("blend", Duration(1, "f"))
        return Scene(f"scene {index}", Duration(length, "f"), share if index else Transition())

    script = Script(tuple(scene(i, *lengths) for i, lengths in enumerate(scenes)))
    queue = [f"queue.chunk_latents={chunk_latents}", f"queue.context_latents={context_latents}"]
    facts = ModelFacts("toy", "toy", LatentGrid(temporal=1), 2, 4, 24.0, 64, 64, True, 10_000)
    return make_plan(script, load_settings(None, queue), facts, ends)


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
