"""HunyuanVideo in the engine against stock diffusers on the same weights, noise and steps."""

from __future__ import annotations

import json
import shutil
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
from longvid.models.costs import measure_costs
from longvid.models.facts import facts_of, weight_bytes
from longvid.models.hunyuan import HunyuanPrompt, HunyuanStage
from longvid.models.hunyuan_vae import HunyuanStreamDecoder
from longvid.models.loader import checkpoint_of as take_pipeline
from longvid.models.loader import open_checkpoint
from longvid.models.parts import ModelPart
from longvid.parallel.stage import Unit
from longvid.plan import Chunk, PromptBlend
from longvid.script import parse_script
from longvid.settings import load_settings

CheckpointOf = Callable[[str], Path]
CPU = torch.device("cpu")
STORY = """
size: [32, 48]
seed: 3
negative: "blue cat"
scenes:
  - {prompt: "a red circle moving left", for: %sf}
"""


@pytest.fixture(scope="module")
def root(checkpoint_of: CheckpointOf) -> Path:
    return checkpoint_of("hunyuan")


@pytest.mark.parametrize(("guidance", "embedded"), [(1.0, None), (3.0, 2.5)])
def test_sequential_render_equals_the_stock_pipeline(root: Path, guidance: float, embedded: float | None) -> None:
    told = [] if embedded is None else [f"sampler.embedded_guidance={embedded}"]
    steps = ["schedule=sequential", "sampler.steps=4", f"sampler.guidance={guidance}"]
    engine = Engine.load(root, overrides=[*steps, *told])
    plan = engine.plan(parse_script(STORY % 29, "story.yaml"))
    (finished,) = engine.denoise(plan)
    pipe = diffusers.HunyuanVideoPipeline.from_pretrained(root)
    pipe.set_progress_bar_config(disable=True)
    latents = pipe(
        prompt=plan.prompts[0],
        negative_prompt=plan.negatives[0],
        width=plan.width,
        height=plan.height,
        num_frames=29,
        num_inference_steps=4,
        true_cfg_scale=guidance,
        **({} if embedded is None else {"guidance_scale": embedded}),
        latents=engine._noise(plan)(plan.chunks[0])[None],
        output_type="latent",
    ).frames[0]
    assert latents.shape == finished.latents.shape
    assert (latents - finished.latents).abs().max() <= 1e-4
    with torch.no_grad():
        pixels = pipe.vae.decode(finished.latents[None] / pipe.vae.config.scaling_factor).sample[0]
    assert torch.equal(torch.from_numpy(engine.decode(plan, finished)), as_frames(pixels))


def as_frames(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8).permute(1, 2, 3, 0)


@pytest.mark.parametrize("tile", [256, 32])
@pytest.mark.parametrize("count", [3, 9])
def test_streamed_decode_is_the_stock_decode_to_the_last_bit(root: Path, tmp_path: Path, count: int, tile: int) -> None:
    vae = diffusers.AutoencoderKLHunyuanVideo.from_pretrained(root / "vae")
    vae.enable_tiling(tile, tile, tile_sample_stride_height=tile * 3 // 4, tile_sample_stride_width=tile * 3 // 4)
    latents = torch.randn(4, count, 6, 4, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = as_frames(vae.decode(latents[None] / vae.config.scaling_factor).sample[0])
    assert len(expected) == 1 + 4 * (count - 1)
    for sizes in [(count,), (1,) * count, (2, count - 2)]:
        decoder, parts, seen = HunyuanStreamDecoder(vae), [], 0
        for push, part in enumerate(latents.split(sizes, 1)):
            assert sum(map(len, parts)) == decoder.frames_after(seen)
            if push == 1:  # go on from what a file holds
                write_tensors(tmp_path / "state", decoder.state())
                decoder = HunyuanStreamDecoder(vae)
                decoder.load_state(dict(read_tensors(tmp_path / "state", lambda name: True, CPU)))
            parts.append(decoder.push(part, is_last=push + 1 == len(sizes)))
            seen += part.shape[1]
        assert torch.equal(torch.cat(parts), expected)


def unit_of(blends: list[PromptBlend], latents: torch.Tensor) -> Unit:
    count = latents.shape[1]
    chunk = Chunk(0, 0, 0, count, 0, 0, tuple(blends), (0,) * count, (0, 0))
    return Unit(chunk, 0, torch.full((count,), 500.0), (6, 4), latents)


def stage_of(root: Path, part: ModelPart) -> HunyuanStage:
    stage = open_checkpoint(str(root)).load_stage(part, torch.float32, CPU, StageOptions())
    assert isinstance(stage, HunyuanStage)
    stage.prepare(FilmInputs([prompt_of(9, 1), prompt_of(5, 2)], prompts_a_chunk=2))
    return stage


def prompt_of(length: int, seed: int) -> HunyuanPrompt:
    draw = torch.Generator().manual_seed(seed)
    return HunyuanPrompt(torch.randn(length, 16, generator=draw), torch.randn(16, generator=draw))


@pytest.mark.parametrize("cut", [1, 2])
def test_parts_of_the_layers_give_the_bits_of_all(root: Path, cut: int) -> None:
    """The first cut is between the dual layer and the single ones, the second among the latter."""
    latents = torch.randn(4, 3, 6, 4, generator=torch.Generator().manual_seed(3))
    for blends in ([PromptBlend(1, 1), PromptBlend(1, 0, 0.5), PromptBlend(0, 0)], [PromptBlend(1, 1)] * 3):
        unit = unit_of(blends, latents)
        whole = stage_of(root, ModelPart(range(3))).forward(unit)
        first = stage_of(root, ModelPart(range(cut), is_last=False))
        hidden = first.forward(unit).hidden
        assert hidden is not None and (hidden.shape, hidden.dtype) == first.hidden_shape(3, (6, 4))
        last = stage_of(root, ModelPart(range(cut, 3), is_first=False))
        output = last.forward(replace(unit, latents=None, hidden=hidden))
        assert torch.equal(output.velocity, whole.velocity)


def test_parts_hold_the_tensors_of_their_layers_alone(root: Path) -> None:
    whole = weight_bytes(str(root), ModelPart(range(3)), 4)
    parts = [ModelPart(range(2), is_last=False), ModelPart(range(2, 3), is_first=False)]
    dits = [stage_of(root, part).dit for part in parts]
    assert [(len(dit.transformer_blocks), len(dit.single_transformer_blocks)) for dit in dits] == [(1, 1), (0, 1)]
    held = [{name for name, x in dit.named_parameters() if not x.is_meta} for dit in dits]
    shared = sum(x.nbytes for name, x in dits[0].named_parameters() if name.startswith("time_text_embed"))
    assert sum(weight_bytes(str(root), part, 4) for part in parts) == whole + shared
    assert "context_embedder.proj_in.weight" in held[0] and "proj_out.weight" in held[1]
    assert not held[0] & {"proj_out.weight"} and not any(name.startswith("context_embedder") for name in held[1])


def test_layers_of_both_kinds_are_measured(root: Path) -> None:
    checkpoint = open_checkpoint(str(root))
    settings = load_settings(overrides=["queue.chunk_latents=2", "queue.context_latents=1"])
    costs = measure_costs(checkpoint, checkpoint.load_decoder(torch.float32, CPU), settings, CPU)
    dual, *single = costs.layers
    assert len(single) == 2 and len(set(single)) == 1 and min(dual, *single) > 0
    assert dual != single[0]


def test_a_units_vector_of_all_prompts_is_their_mean(root: Path) -> None:
    stage = stage_of(root, ModelPart(range(3)))
    latents = torch.zeros(4, 4, 6, 4)
    a, b, both = PromptBlend(0, 0), PromptBlend(1, 1), PromptBlend(0, 1, 0.5)

    def temb(*blends: PromptBlend) -> torch.Tensor:
        return stage.embed_time(unit_of(list(blends), latents[:, : len(blends)]), 0)

    def expected(pooled: torch.Tensor) -> torch.Tensor:
        return stage.dit.time_text_embed(torch.tensor([500.0]), pooled[None], torch.tensor([6000.0]))[0]

    first, second = (prompt.pooled for prompt in (prompt_of(9, 1), prompt_of(5, 2)))
    assert torch.equal(temb(a, a, a), expected(first))
    assert (temb(a, a, a, b) - expected(0.75 * first + 0.25 * second)).abs().max() <= 1e-6
    assert torch.equal(temb(a, b), temb(both, both))


def test_neighbours_kv_act_as_tokens_beside_the_input(root: Path) -> None:
    stage = stage_of(root, ModelPart(range(3)))
    stage.dit.single_transformer_blocks = stage.dit.single_transformer_blocks[
        :0
    ]  # in one layer they meet in no other way
    generator = torch.Generator().manual_seed(4)
    left, own, right = (torch.randn(4, n, 6, 4, generator=generator) for n in (1, 3, 2))
    a = PromptBlend(0, 0)
    joined = stage.forward(unit_of([a] * 6, torch.cat([left, own, right], 1))).velocity[0, :, 1:4]

    def stored(latents: torch.Tensor) -> object:
        count = latents.shape[1]
        return stage.forward(replace(unit_of([a] * count, latents), store=(slice(0, count),))).kv[0]

    alone = replace(unit_of([a] * 3, own), chunk=Chunk(0, 0, 0, 3, 1, 2, (a,) * 4, (0,) * 3, (0, 0)))
    got = stage.forward(replace(alone, left=stored(left), right=stored(right))).velocity[0]
    assert (got - joined).abs().max() <= 1e-5
    assert (stage.forward(alone).velocity[0] - joined).abs().max() > 1e-4


def test_a_pipeline_in_memory_gives_the_bits_of_its_folder(root: Path) -> None:
    overrides = ["sampler.steps=2", "queue.chunk_latents=2", "queue.context_latents=1"]
    films = []
    for model in (root, diffusers.HunyuanVideoPipeline.from_pretrained(root)):
        engine = Engine.load(model, overrides=overrides)
        films.append(torch.cat([x.latents for x in engine.denoise(engine.plan(parse_script(STORY % 17, "s.yaml")))], 1))
    assert torch.equal(*films)


def change(root: Path, file: str, **values: object) -> None:
    path = root / file
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def lose_a_shard(root: Path) -> None:
    max((root / "transformer").glob("*.safetensors")).unlink()


def truncate_a_shard(root: Path) -> None:
    path = max((root / "transformer").glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-100])


def leave_only_a_pickle(root: Path) -> None:
    for path in (root / "text_encoder_2").glob("*.safetensors"):
        path.unlink()
    torch.save({}, root / "text_encoder_2/pytorch_model.bin")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lose_a_shard, r"transformer/.*safetensors: is missing, and .*index\.json names it"),
        (truncate_a_shard, r"transformer/.*safetensors: is corrupt or truncated"),
        (leave_only_a_pickle, r"text_encoder_2: holds no \.safetensors file"),
        (lambda root: change(root, "transformer/config.json", num_single_layers=5), r"lacks .* tensors"),
        (lambda root: change(root, "transformer/config.json", mlp_ratio=2.0), r"safetensors: .* its config asks for"),
        (lambda root: change(root, "transformer/config.json", rope_axes_dim=[4, 4, 4]), "must add up to its attention"),
        (lambda root: change(root, "transformer/config.json", in_channels=8), "in_channels of its transformer must be"),
        (lambda root: change(root, "transformer/config.json", patch_size_t=2), "patch_size_t of 2"),
        (
            lambda root: change(root, "transformer/config.json", image_condition_type="token_replace"),
            "is an image-to-video HunyuanVideo",
        ),
        (lambda root: change(root, "scheduler/scheduler_config.json", shift="x"), "cannot be loaded as a HunyuanVideo"),
        (lambda root: change(root, "tokenizer/tokenizer_config.json", padding_side="left"), "padding_side must be"),
        (
            lambda root: change(root, "model_index.json", _class_name="HunyuanVideo15Pipeline"),
            "cannot run a 'HunyuanVideo15Pipeline'",
        ),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], message: str, root: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model"
    shutil.copytree(root, copy)
    damage(copy)
    with pytest.raises(InputError, match=message):
        engine = Engine.load(copy, overrides=["schedule=sequential", "sampler.steps=1"])
        list(engine.denoise(engine.plan(parse_script(STORY % 5, "story.yaml"))))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("sampler.solver=unipc", "sampler.solver must be auto or euler"),
        ("sampler.guidance_low=2", "sampler.guidance_low is of models with two experts"),
        ("cache={policy: taylorseer, level: module}", "left out whole, not module by module"),
    ],
)
def test_what_the_family_cannot_do_is_refused(root: Path, setting: str, message: str) -> None:
    section, _, value = setting.partition("={")
    pairs = [f"{section}.{part.replace(': ', '=')}" for part in value.rstrip("}").split(", ")] if value else [setting]
    with pytest.raises(InputError, match=message):
        Engine.load(root, overrides=pairs)


def test_embedded_guidance_is_of_distilled_models(checkpoint_of: CheckpointOf, root: Path) -> None:
    assert facts_of(str(root)).embedded_guidance
    with pytest.raises(InputError, match=r"sampler\.embedded_guidance is of models distilled for it"):
        Engine.load(checkpoint_of("cogvideox 5b"), overrides=["sampler.embedded_guidance=6"])


def test_a_template_that_the_tokenizer_makes_too_short_is_refused(root: Path) -> None:
    prompts = open_checkpoint(str(root)).load_prompts(torch.float32, CPU)
    with pytest.raises(InputError, match="makes fewer than 95 tokens"):
        replace(prompts, tokenizer=OneToken(prompts.tokenizer)).encode(["a"])  # type: ignore[type-var]


class OneToken:
    """A tokenizer to which any text is one token."""

    padding_side = "right"

    def __init__(self, inner: object) -> None:
        self._inner = inner

    def __call__(self, text: str, **options: object) -> object:
        return self._inner("a", **options)  # type: ignore[operator]


def test_a_pipelines_own_tiling_is_kept(root: Path) -> None:
    pipe = diffusers.HunyuanVideoPipeline.from_pretrained(root)
    assert not take_pipeline(pipe).load_decoder(torch.float32, CPU).vae.use_tiling
    assert open_checkpoint(str(root)).load_decoder(torch.float32, CPU).vae.use_tiling
