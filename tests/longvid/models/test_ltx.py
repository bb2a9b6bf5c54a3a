"""LTX-Video in the engine against stock diffusers on the same weights, noise and steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import diffusers
import pytest
import torch

from longvid.checkpoint import read_tensors, write_tensors
from longvid.engine import Engine
from longvid.errors import InputError
from longvid.models.checkpoint import FilmInputs, StageOptions
from longvid.models.loader import open_checkpoint
from longvid.models.ltx import LtxStage
from longvid.models.ltx_vae import LtxStreamDecoder
from longvid.models.parts import ModelPart
from longvid.parallel.stage import Unit
from longvid.plan import Chunk, PromptBlend
from longvid.script import parse_script
from longvid.settings import SamplerSettings

CheckpointOf = Callable[[str], Path]
CPU = torch.device("cpu")
STORY = """
size: [96, 64]
fps: 10
negative: "blue cat"
scenes:
  - {prompt: "a red circle moving left", for: %sf}
"""


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_sequential_render_equals_the_stock_pipeline(checkpoint_of: CheckpointOf, guidance: float) -> None:
    overrides = ["schedule=sequential", "sampler.steps=4", f"sampler.guidance={guidance}"]
    engine = Engine.load(checkpoint_of("ltx"), overrides=overrides)
    plan = engine.plan(parse_script(STORY % 33, "story.yaml"))
    (finished,) = engine.denoise(plan)
    pipe = diffusers.LTXPipeline.from_pretrained(checkpoint_of("ltx"))
    pipe.set_progress_bar_config(disable=True)
    packed = pipe(
        prompt=plan.prompts[0],
        negative_prompt=plan.negatives[0],
        width=plan.width,
        height=plan.height,
        num_frames=33,
        frame_rate=10,
        num_inference_steps=4,
        guidance_scale=guidance,
        latents=pipe._pack_latents(engine._noise(plan)(plan.chunks[0])[None]),
        output_type="latent",
    ).frames
    expected = pipe._unpack_latents(packed, 5, 2, 3)[0]
    assert finished.latents.shape == expected.shape
    assert (finished.latents - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["ltx", "ltx 0.9.1"])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_streamed_decode_is_the_stock_framewise_decode_to_the_last_bit(
    checkpoint_of: CheckpointOf, tmp_path: Path, kind: str, count: int
) -> None:
    pipe = diffusers.LTXPipeline.from_pretrained(checkpoint_of(kind))
    vae, latents = pipe.vae, torch.randn(8, count, 2, 3, generator=torch.Generator().manual_seed(0))
    z = pipe._denormalize_latents(latents[None], vae.latents_mean, vae.latents_std, vae.config.scaling_factor)
    vae.use_framewise_decoding = True
    with torch.no_grad():
        pixels = vae.decode(z, torch.zeros(1) if vae.config.timestep_conditioning else None).sample[0]
    expected = pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 3, 0)
    assert len(expected) == 8 * count - 7
    for sizes in ((count,), (1,) * count):
        decoder, parts = LtxStreamDecoder(vae), []
        for push, part in enumerate(latents.split(sizes, 1)):
            assert sum(map(len, parts)) == decoder.frames_after(push)
            write_tensors(tmp_path / "state", decoder.state())
            decoder = LtxStreamDecoder(vae)  # goes on from what a file holds
            decoder.load_state(dict(read_tensors(tmp_path / "state", lambda name: True, CPU)))
            parts.append(decoder.push(part, is_last=push + 1 == len(sizes)))
        assert torch.equal(torch.cat(parts), expected)


def stage_of(checkpoint_of: CheckpointOf, part: ModelPart) -> LtxStage:
    stage = open_checkpoint(str(checkpoint_of("ltx"))).load_stage(part, torch.float32, CPU, StageOptions())
    assert isinstance(stage, LtxStage)
    texts = [torch.randn(n, 16, generator=torch.Generator().manual_seed(n)) for n in (4, 7)]
    stage.prepare(FilmInputs(texts, fps=10))
    return stage


def unit_of(timesteps: list[float], blends: list[PromptBlend], latents: torch.Tensor) -> Unit:
    count = latents.shape[1]
    chunk = Chunk(0, 0, 0, count, 0, 0, tuple(blends), (0,) * count, (0, 0))
    return Unit(chunk, 0, torch.tensor(timesteps), (2, 3), latents)


def test_parts_of_the_layers_give_the_bits_of_all(checkpoint_of: CheckpointOf) -> None:
    latents = torch.randn(8, 3, 2, 3, generator=torch.Generator().manual_seed(3))
    unit = unit_of([0.0, 500.0, 900.0], [PromptBlend(1, 1), PromptBlend(1, 0, 0.5), PromptBlend(0, 0)], latents)
    whole = stage_of(checkpoint_of, ModelPart(range(3))).forward(unit)
    first = stage_of(checkpoint_of, ModelPart(range(2), is_last=False))
    hidden = first.forward(unit).hidden
    assert hidden is not None and (hidden.shape, hidden.dtype) == first.hidden_shape(3, (2, 3))
    last = stage_of(checkpoint_of, ModelPart(range(2, 3), is_first=False))
    assert torch.equal(last.forward(replace(unit, latents=None, hidden=hidden)).velocity, whole.velocity)


def test_each_latent_has_its_own_timestep_as_in_the_stock_model(checkpoint_of: CheckpointOf) -> None:
    latents = torch.randn(8, 3, 2, 3, generator=torch.Generator().manual_seed(3))
    levels, text = [0.0, 500.0, 900.0], torch.randn(4, 16, generator=torch.Generator().manual_seed(4))
    got = stage_of(checkpoint_of, ModelPart(range(3))).forward(unit_of(levels, [PromptBlend(0, 0)] * 3, latents))
    dit = diffusers.LTXVideoTransformer3DModel.from_pretrained(checkpoint_of("ltx") / "transformer").eval()
    with torch.no_grad():
        tokens = dit(
            latents.flatten(1).T[None],
            text[None],
            torch.tensor(levels).repeat_interleave(6)[None],
            torch.ones(1, 4),
            num_frames=3,
            height=2,
            width=3,
            rope_interpolation_scale=(0.8, 32, 32),
            return_dict=False,
        )[0]
    assert got.velocity is not None
    assert (got.velocity[0] - tokens[0].T.reshape(8, 3, 2, 3)).abs().max() <= 1e-5


def test_neighbours_kv_act_as_tokens_beside_the_input(checkpoint_of: CheckpointOf) -> None:
    stage = stage_of(checkpoint_of, ModelPart(range(3)))
    stage.dit.transformer_blocks = stage.dit.transformer_blocks[:1]
    generator = torch.Generator().manual_seed(4)
    left, own, right = (torch.randn(8, n, 2, 3, generator=generator) for n in (1, 3, 2))
    a = PromptBlend(0, 0)
    joined = stage.forward(unit_of([500.0] * 6, [a] * 6, torch.cat([left, own, right], 1))).velocity[0, :, 1:4]

    def stored(latents: torch.Tensor) -> object:
        count = latents.shape[1]
        return stage.forward(replace(unit_of([500.0] * count, [a] * count, latents), store=(slice(0, count),))).kv[0]

    chunk = Chunk(0, 0, 0, 3, 1, 2, (a,) * 4, (0,) * 3, (0, 0))
    alone = replace(unit_of([500.0] * 3, [a] * 3, own), chunk=chunk)
    got = stage.forward(replace(alone, left=stored(left), right=stored(right))).velocity[0]
    assert (got - joined).abs().max() <= 1e-5
    assert (stage.forward(alone).velocity[0] - joined).abs().max() > 1e-4


def test_noise_levels_depend_on_the_tokens_of_a_unit_or_on_the_shift(checkpoint_of: CheckpointOf) -> None:
    checkpoint = open_checkpoint(str(checkpoint_of("ltx")))
    few, many = (checkpoint.make_sampler(SamplerSettings(steps=4), tokens).timestep(2) for tokens in (500, 4000))
    assert few < many
    shifted = SamplerSettings(steps=4, shift=2.0)
    assert len({checkpoint.make_sampler(shifted, tokens).timestep(2) for tokens in (500, 4000)}) == 1
    with pytest.raises(InputError, match=r"sampler\.solver must be auto or euler"):
        checkpoint.make_sampler(SamplerSettings(solver="unipc"), 500)
