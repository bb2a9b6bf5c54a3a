"""CogVideoX in the engine against stock diffusers on the same weights, noise and steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from longvid.checkpoint import read_tensors, write_tensors
from longvid.engine import Engine
from longvid.errors import InputError
from longvid.fingerprint import Machine, fingerprint
from longvid.models.checkpoint import FilmInputs, StageOptions
from longvid.models.cogvideox import CogVideoXStage, unpack
from longvid.models.cogvideox_solvers import noise_seed_of, pack
from longvid.models.cogvideox_vae import CogVideoXStreamDecoder
from longvid.models.facts import facts_of
from longvid.models.loader import open_checkpoint
from longvid.models.parts import ModelPart
from longvid.parallel.stage import Unit
from longvid.parallel.topology import Topology, fitting_meshes, workload
from longvid.plan import Chunk, PromptBlend, make_plan
from longvid.script import parse_script
from longvid.settings import MeshSettings, SamplerSettings, load_settings

CheckpointOf = Callable[[str], Path]
CPU = torch.device("cpu")
KINDS = ["cogvideox 2b", "cogvideox 5b", "cogvideox 1.5"]
STORY = """
size: [64, 96]
seed: 3
negative: "blue cat"
scenes:
  - {prompt: "a red circle moving left", for: %sf}
"""


def load(checkpoint_of: CheckpointOf, kind: str, *overrides: str) -> Engine:
    return Engine.load(checkpoint_of(kind), overrides=["sampler.steps=4", "sampler.guidance=3", *overrides])


@pytest.mark.parametrize("kind", KINDS)
def test_sequential_render_equals_the_stock_pipeline(checkpoint_of: CheckpointOf, kind: str) -> None:
    engine = load(checkpoint_of, kind, "schedule=sequential")
    plan = engine.plan(parse_script(STORY % 17, "story.yaml"))
    (finished,) = engine.denoise(plan)
    frames = engine.decode(plan, finished)
    together = engine.facts.latent_channels // 4
    noise = engine._noise(plan)(plan.chunks[0])
    pipe = diffusers.CogVideoXPipeline.from_pretrained(checkpoint_of(kind))
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        prompt=plan.prompts[0],
        negative_prompt=plan.negatives[0],
        width=plan.width,
        height=plan.height,
        num_frames=17,
        num_inference_steps=4,
        guidance_scale=3.0,
        max_sequence_length=16,
        latents=unpack(noise, together)[None],
        generator=torch.Generator().manual_seed(noise_seed_of(noise)),
        output_type="latent",
    ).frames[0]
    assert pack(latents, together).shape == finished.latents.shape
    assert (pack(latents, together) - finished.latents).abs().max() <= 1e-4
    with torch.no_grad():
        whole = pipe.decode_latents(unpack(finished.latents, together)[None, together - 1 :])[0]
    expected = whole.add(1).mul(127.5).clamp(0, 255).round().permute(1, 2, 3, 0)
    assert torch.equal(torch.from_numpy(frames).float(), expected)


@pytest.mark.parametrize("together", [1, 2])
def test_streamed_decode_is_the_stock_decode_to_the_last_bit(
    checkpoint_of: CheckpointOf, tmp_path: Path, together: int
) -> None:
    vae = diffusers.AutoencoderKLCogVideoX.from_pretrained(checkpoint_of("cogvideox 5b") / "vae")
    count = 9 if together == 1 else 5
    latents = torch.randn(4 * together, count, 4, 6, generator=torch.Generator().manual_seed(0))
    whole = unpack(latents, together)[together - 1 :]
    with torch.no_grad():
        pixels = vae.decode(1 / vae.config.scaling_factor * whole.transpose(0, 1)[None]).sample[0]
    expected = pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
    assert len(expected) == 33
    for sizes in [(count,), (1,) * count, (2, count - 3, 1)]:
        decoder, parts, seen = CogVideoXStreamDecoder(vae, together), [], 0
        for push, part in enumerate(latents.split(sizes, 1)):
            assert sum(map(len, parts)) == decoder.frames_after(seen)
            if push == 1:  # go on from what a file holds
                write_tensors(tmp_path / "state", decoder.state())
                decoder = CogVideoXStreamDecoder(vae, together)
                decoder.load_state(dict(read_tensors(tmp_path / "state", lambda name: True, CPU)))
            parts.append(decoder.push(part, is_last=push + 1 == len(sizes)))
            seen += part.shape[1]
        assert torch.equal(torch.cat(parts), expected)


def test_a_shot_is_trimmed_to_its_frames_wherever_its_groups_end(checkpoint_of: CheckpointOf) -> None:
    for kind, frames in (("cogvideox 5b", 10), ("cogvideox 5b", 1), ("cogvideox 2b", 22), ("cogvideox 1.5", 12)):
        engine = load(checkpoint_of, kind, "queue.chunk_latents=1", "queue.context_latents=1", "sampler.guidance=1")
        plan = engine.plan(parse_script(STORY % frames, "story.yaml"))
        made = [engine.decode(plan, finished) for finished in engine.denoise(plan)]
        assert sum(map(len, made)) == frames
        assert {part.shape[1:] for part in made} == {(96, 64, 3)}


def unit_of(blends: list[PromptBlend], latents: torch.Tensor) -> Unit:
    count = latents.shape[1]
    chunk = Chunk(0, 0, 0, count, 0, 0, tuple(blends), (0,) * count, (0, 0))
    return Unit(chunk, 0, torch.full((count,), 500.0), (12, 8), latents)


def stage_of(checkpoint_of: CheckpointOf, kind: str, part: ModelPart) -> CogVideoXStage:
    stage = open_checkpoint(str(checkpoint_of(kind))).load_stage(part, torch.float32, CPU, StageOptions())
    assert isinstance(stage, CogVideoXStage)
    texts = [torch.randn(16, 16, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2)]
    stage.prepare(FilmInputs(texts, prompts_a_chunk=2))
    return stage


@pytest.mark.parametrize("kind", KINDS)
def test_parts_of_the_layers_give_the_bits_of_all(checkpoint_of: CheckpointOf, kind: str) -> None:
    channels = facts_of(str(checkpoint_of(kind))).latent_channels
    latents = torch.randn(channels, 3, 12, 8, generator=torch.Generator().manual_seed(3))
    blends = [PromptBlend(1, 1), PromptBlend(1, 0, 0.5), PromptBlend(0, 0)]
    for prompts in (blends, [PromptBlend(1, 1)] * 3):  # one prompt travels beside an empty place
        unit = unit_of(prompts, latents)
        whole = stage_of(checkpoint_of, kind, ModelPart(range(3))).forward(unit)
        first = stage_of(checkpoint_of, kind, ModelPart(range(1), is_last=False))
        hidden = first.forward(unit).hidden
        assert hidden is not None and (hidden.shape, hidden.dtype) == first.hidden_shape(3, (12, 8))
        last = stage_of(checkpoint_of, kind, ModelPart(range(1, 3), is_first=False))
        output = last.forward(replace(unit, latents=None, hidden=hidden))
        assert torch.equal(output.velocity, whole.velocity)


def test_each_latent_follows_its_own_scenes_prompt(checkpoint_of: CheckpointOf) -> None:
    stage = stage_of(checkpoint_of, "cogvideox 5b", ModelPart(range(3)))
    stage.dit.transformer_blocks = stage.dit.transformer_blocks[:1]  # in one layer prompts meet in no other way
    latents = torch.randn(4, 3, 12, 8, generator=torch.Generator().manual_seed(3))
    a, b = PromptBlend(0, 0), PromptBlend(1, 1)
    only_a, only_b, mixed, blended = (
        stage.forward(unit_of([a, x, b if x is not a else a], latents)).velocity[0]
        if x is not b
        else stage.forward(unit_of([b, b, b], latents)).velocity[0]
        for x in (a, b, PromptBlend(0, 1, 1.0), PromptBlend(0, 1, 0.5))
    )
    assert (mixed[:, 0] - only_a[:, 0]).abs().max() <= 1e-5
    assert (mixed[:, 1:] - only_b[:, 1:]).abs().max() <= 1e-5
    assert min((blended[:, 1] - x[:, 1]).abs().max() for x in (only_a, only_b)) > 1e-4


def test_neighbours_kv_act_as_tokens_beside_the_input(checkpoint_of: CheckpointOf) -> None:
    stage = stage_of(checkpoint_of, "cogvideox 5b", ModelPart(range(3)))
    stage.dit.transformer_blocks = stage.dit.transformer_blocks[:1]
    generator = torch.Generator().manual_seed(4)
    left, own, right = (torch.randn(4, n, 12, 8, generator=generator) for n in (1, 3, 2))
    a = PromptBlend(0, 0)
    joined = stage.forward(unit_of([a] * 6, torch.cat([left, own, right], 1))).velocity[0, :, 1:4]

    def stored(latents: torch.Tensor) -> object:
        count = latents.shape[1]
        return stage.forward(replace(unit_of([a] * count, latents), store=(slice(0, count),))).kv[0]

    alone = replace(unit_of([a] * 3, own), chunk=Chunk(0, 0, 0, 3, 1, 2, (a,) * 4, (0,) * 3, (0, 0)))
    got = stage.forward(replace(alone, left=stored(left), right=stored(right))).velocity[0]
    assert (got - joined).abs().max() <= 1e-5
    assert (stage.forward(alone).velocity[0] - joined).abs().max() > 1e-4


@pytest.mark.parametrize("kind", KINDS[:2])
def test_a_solver_goes_on_from_every_step_to_the_same_bits(
    checkpoint_of: CheckpointOf, tmp_path: Path, kind: str
) -> None:
    sampler = open_checkpoint(str(checkpoint_of(kind))).make_sampler(SamplerSettings(steps=4), 1)
    draw = torch.Generator().manual_seed(5)
    velocities = [torch.randn(4, 3, 4, 4, generator=draw) for _ in range(4)]
    solver, samples, files = sampler.new_solver(), [torch.randn(4, 3, 4, 4, generator=draw)], []
    for step, velocity in enumerate(velocities):
        files.append(tmp_path / str(step))
        write_tensors(files[-1], solver.state())
        samples.append(solver.step(velocity, step, samples[-1]))
    assert all(torch.isfinite(sample).all() for sample in samples)
    for cut, file in enumerate(files):
        resumed = sampler.new_solver()
        resumed.load_state(dict(read_tensors(file, lambda name: True, CPU)))
        for step in range(cut, 4):
            assert torch.equal(resumed.step(velocities[step], step, samples[step]), samples[step + 1])


def test_without_rotary_positions_there_is_no_right_context(checkpoint_of: CheckpointOf) -> None:
    """Positions are in the tokens, so a neighbour's K/V are for another place."""
    for kind, expected in (("cogvideox 2b", {0}), ("cogvideox 5b", {0, 1})):
        settings = load_settings(overrides=["queue.chunk_latents=2", "queue.context_latents=1"])
        plan = make_plan(parse_script(STORY % 33, "story.yaml"), settings, facts_of(str(checkpoint_of(kind))))
        assert {chunk.num_right for chunk in plan.chunks} == expected
        assert {chunk.num_left for chunk in plan.chunks} == {0, 1}


@pytest.mark.parametrize(
    ("kind", "setting", "message"),
    [
        ("cogvideox 2b", "queue.left=cached", "queue.left must be recompute"),
        ("cogvideox 5b", "cache.level=module", "left out whole, not module by module"),
        ("cogvideox 5b", "sampler.solver=unipc", "sampler.solver must be auto, not unipc"),
        ("cogvideox 5b", "sampler.shift=3", "sampler.shift is of flow-matching models"),
    ],
)
def test_what_the_family_cannot_do_is_refused_before_weights_are_loaded(
    checkpoint_of: CheckpointOf, monkeypatch: pytest.MonkeyPatch, kind: str, setting: str, message: str
) -> None:
    name = "longvid.models.cogvideox_checkpoint.CogVideoXCheckpoint.load_prompts"
    monkeypatch.setattr(name, lambda *_: pytest.fail("weights were loaded"))
    with pytest.raises(InputError, match=message):
        Engine.load(checkpoint_of(kind), overrides=["cache.policy=taylorseer", setting])


@pytest.mark.parametrize("kind", [*KINDS, "a14b", "i2v 2.1", "ltx"])
def test_its_fingerprint_is_the_same_after_a_file(checkpoint_of: CheckpointOf, kind: str) -> None:
    facts, settings = facts_of(str(checkpoint_of(kind))), load_settings()
    script = parse_script(STORY % 9, "story.yaml")
    plan = make_plan(script, settings, replace(facts, image="none"))
    machine = Machine("cpu", 1, Topology())
    marks = fingerprint(script, plan, settings, facts, model={}, machine=machine)
    assert json.loads(json.dumps(marks)) == marks


def test_its_tokens_stay_on_one_rank(checkpoint_of: CheckpointOf) -> None:
    work = workload(load_settings(), facts_of(str(checkpoint_of("cogvideox 5b"))))
    assert [mesh.stage for mesh in fitting_meshes(2, MeshSettings(), work)] == [2]
    with pytest.raises(InputError, match=r"seq 2: with this model or cache\.policy tokens stay on one rank"):
        fitting_meshes(2, MeshSettings(seq=2), work)


def test_a_size_beyond_the_positions_is_refused(checkpoint_of: CheckpointOf) -> None:
    script = parse_script(STORY.replace("[64, 96]", "[96, 96]") % 9, "story.yaml")
    with pytest.raises(InputError, match=r"story\.yaml:2: size 96 x 96: .* takes at most 64 x 96"):
        make_plan(script, load_settings(), facts_of(str(checkpoint_of("cogvideox 1.5"))))
