"""The chunk schedule on a tiny random Wan: the same latents as a plain loop over the stock transformer."""

from __future__ import annotations

import copy
from pathlib import Path

import diffusers
import pytest
import torch

from longvid.engine import Engine
from longvid.errors import InputError
from longvid.events import Event, RoundDone
from longvid.parallel.topology import choose_by_shape, fitting_meshes, workload
from longvid.script import parse_script
from longvid.settings import MeshSettings, load_settings

STEPS, FUSED = 4, 2
TEXT = "scenes:\n  - {prompt: 'a red circle moving left', for: 45f}\n"
OVERRIDES = [
    "schedule=chunks",
    f"sampler.steps={STEPS}",
    f"chunks.fuse={FUSED / STEPS}",
    "queue.chunk_latents=3",
    "queue.context_latents=2",
]


@pytest.fixture(scope="module")
def engine(tiny_model: Path) -> Engine:
    return Engine.load(tiny_model, overrides=OVERRIDES)


@torch.no_grad()
def loop(model: Path, engine: Engine) -> list[torch.Tensor]:
    """Every chunk's latents by the formula: all chunks take a step, each with the last latents of the one before."""
    pipeline = diffusers.WanPipeline.from_pretrained(model)
    plan = engine.plan(parse_script(TEXT, "story.yaml"))
    text, _ = pipeline.encode_prompt(plan.prompts[0], do_classifier_free_guidance=False, max_sequence_length=512)
    pipeline.scheduler.set_timesteps(STEPS)
    solvers = [copy.deepcopy(pipeline.scheduler) for _ in plan.chunks]
    latents = [engine._noise(plan)(chunk) for chunk in plan.chunks]
    for step, time in enumerate(pipeline.scheduler.timesteps):
        predicted = []
        for i, chunk in enumerate(plan.chunks):
            left = [latents[i - 1][:, -chunk.num_left :]] if chunk.num_left else []
            seen = torch.cat([*left, latents[i]], dim=1)
            predicted.append(pipeline.transformer(seen[None], time[None], text, return_dict=False)[0][0])
        velocities = [made[:, chunk.num_left :].clone() for made, chunk in zip(predicted, plan.chunks, strict=True)]
        if step < FUSED:
            for i, (chunk, other) in enumerate(zip(plan.chunks[1:], predicted[1:], strict=True)):
                own = velocities[i][:, -chunk.num_left :]
                for f in range(chunk.num_left):
                    weight = (f + 1) / (chunk.num_left + 1)
                    own[:, f] = (1 - weight) * own[:, f] + weight * other[:, f]
        latents = [
            solver.step(velocity, time, sample, return_dict=False)[0]
            for solver, velocity, sample in zip(solvers, velocities, latents, strict=True)
        ]
    return latents


def test_all_chunks_at_one_step_equal_a_plain_loop(tiny_model: Path, engine: Engine) -> None:
    events: list[Event] = []
    plan = engine.plan(parse_script(TEXT, "story.yaml"))
    assert [(chunk.num_left, chunk.num_latents, chunk.num_right) for chunk in plan.chunks] == [
        (0, 5, 0),
        (2, 3, 0),
        (2, 3, 0),
        (2, 1, 0),
    ]
    finished = list(engine.denoise(plan, events.append))
    for found, expected in zip(finished, loop(tiny_model, engine), strict=True):
        assert (found.latents - expected).abs().max() <= 1e-4
    assert events == [RoundDone(k + 1, STEPS, 4, 4 * (k + 1), 4 * STEPS) for k in range(STEPS)]


def test_a_group_sees_the_finished_latents_of_the_one_before_and_nothing_of_the_next(
    tiny_model: Path, engine: Engine
) -> None:
    plan = engine.plan(parse_script(TEXT, "story.yaml"))
    engines = [Engine.load(tiny_model, overrides=[*OVERRIDES, "chunks.fuse=0", f"chunks.group={n}"]) for n in (4, 2)]
    at_once, in_two = ([finished.latents for finished in some.denoise(plan)] for some in engines)
    assert all(torch.equal(at_once[i], in_two[i]) for i in (0, 1))
    assert not torch.equal(at_once[2], in_two[2])


@pytest.mark.parametrize(
    ("overrides", "mesh", "message"),
    [
        ([], {"chunk": 2, "stage": 1}, "one chunk is at a step"),
        (["schedule=sequential"], {"chunk": 2, "stage": 1}, "one chunk is at a step"),
        (["schedule=chunks", "chunks.group=3"], {"chunk": 4}, "a group has 3 chunks"),
    ],
)
def test_a_chunk_axis_that_does_not_fit_is_refused(
    engine: Engine, overrides: list[str], mesh: dict[str, int], message: str
) -> None:
    work = workload(load_settings(None, overrides), engine.facts)
    with pytest.raises(InputError, match=message):
        fitting_meshes(2 if "stage" in mesh else 4, MeshSettings(**mesh), work)


def test_auto_spreads_chunks_over_ranks(engine: Engine) -> None:
    work = workload(engine.settings, engine.facts)
    topology = choose_by_shape(fitting_meshes(4, MeshSettings(), work), work)
    assert (topology.chunk, topology.num_ranks) == (4, 4)
