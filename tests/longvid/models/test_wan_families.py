"""Wan 2.2, and Wan from an image: the engine against stock diffusers on the same weights, noise and steps."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from PIL import Image

from longvid.engine import Engine
from longvid.errors import InputError
from longvid.models.facts import facts_of
from longvid.models.wan import WanStage
from longvid.models.wan_experts import ExpertKv, WanExpertsStage
from longvid.models.wan_image import WanImageStage
from longvid.parallel.stage import Output, Unit
from longvid.plan import make_plan
from longvid.script import parse_script
from longvid.settings import load_settings

CheckpointOf = Callable[[str], Path]
KINDS = ["ti2v", "ti2v from an image", "a14b", "i2v 2.1", "i2v 2.2"]
STEPS = 4


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "first.png"
    pixels = torch.randint(0, 256, (50, 40, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    Image.fromarray(pixels.numpy()).save(path)
    return path


def story(kind: str, image: Path, frames: int = 21) -> str:
    first = f"image: {image}" if "i2v " in kind or "image" in kind else "seed: 3"
    side = 64 if "ti2v" in kind else 32
    scene = f'{{prompt: "a red circle moving left", for: {frames}f}}'
    return f'{first}\nsize: [{side}, 96]\nnegative: "blue cat"\nscenes:\n  - {scene}\n'


def load(checkpoint_of: CheckpointOf, kind: str, *overrides: str) -> Engine:
    guidance = ["sampler.guidance=4", *(["sampler.guidance_low=2.5"] if kind in ("a14b", "i2v 2.2") else [])]
    fixed = [f"sampler.steps={STEPS}", *guidance]
    return Engine.load(checkpoint_of(kind.partition(" from")[0]), overrides=[*fixed, *overrides])


def stock_latents(checkpoint: Path, engine: Engine, kind: str, text: str, image: Path) -> torch.Tensor:
    plan = engine.plan(parse_script(text, "story.yaml"))
    of_image = plan.shots[0].image is not None
    pipe = (diffusers.WanImageToVideoPipeline if of_image else diffusers.WanPipeline).from_pretrained(checkpoint)
    pipe.set_progress_bar_config(disable=True)
    low = {"guidance_scale_2": 2.5} if pipe.config.boundary_ratio else {}
    result = pipe(
        prompt=plan.prompts[0],
        negative_prompt=plan.negatives[0],
        width=plan.width,
        height=plan.height,
        num_frames=plan.num_frames,
        num_inference_steps=STEPS,
        guidance_scale=4.0,
        latents=engine._noise(plan)(plan.chunks[0])[None],
        output_type="latent",
        **({"image": Image.open(image).convert("RGB")} if of_image else {}),
        **low,
    )
    latents: torch.Tensor = result.frames[0]
    return latents


@pytest.mark.parametrize("kind", KINDS)
def test_sequential_render_equals_the_stock_pipeline(checkpoint_of: CheckpointOf, kind: str, image: Path) -> None:
    engine, text = load(checkpoint_of, kind, "schedule=sequential"), story(kind, image)
    (finished,) = engine.denoise(engine.plan(parse_script(text, "story.yaml")))
    expected = stock_latents(checkpoint_of(kind.partition(" from")[0]), engine, kind, text, image)
    assert finished.latents.shape == expected.shape
    assert (finished.latents - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("kind", ["a14b", "i2v 2.1"])
def test_a_pipeline_in_memory_gives_the_bits_of_its_directory(
    checkpoint_of: CheckpointOf, kind: str, image: Path
) -> None:
    found = []
    for model in (checkpoint_of(kind), diffusers.DiffusionPipeline.from_pretrained(checkpoint_of(kind))):
        engine = Engine.load(model, overrides=["schedule=sequential", "sampler.steps=3"])
        (finished,) = engine.denoise(engine.plan(parse_script(story(kind, image, 9), "story.yaml")))
        found.append(finished.latents)
    assert torch.equal(*found)


@pytest.mark.parametrize("kind", KINDS)
def test_the_image_and_the_second_expert_matter(checkpoint_of: CheckpointOf, kind: str, image: Path) -> None:
    """So that the comparison above is one: what makes a family different changes its latents."""
    if kind == "ti2v":
        assert facts_of(str(checkpoint_of(kind))).per_token_timesteps
        return
    found = []
    for change in (False, True):
        engine = load(checkpoint_of, kind, "schedule=sequential")
        plan = engine.plan(parse_script(story(kind, image, 9), "story.yaml"))
        if change and isinstance(engine._stage, WanExpertsStage):
            engine._stage._low = engine._stage._high
        elif change:
            other = image.with_name("other.png")
            Image.new("RGB", (40, 50), "red").save(other)
            plan = replace(plan, shots=(replace(plan.shots[0], image=other),))
        (finished,) = engine.denoise(plan)
        found.append(finished.latents)
    assert (found[0] - found[1]).abs().max() > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_a_film_in_the_queue_is_decoded_as_stock_decodes_its_latents(
    checkpoint_of: CheckpointOf, kind: str, image: Path
) -> None:
    engine = load(checkpoint_of, kind, "queue.chunk_latents=2", "queue.context_latents=1")
    plan = engine.plan(parse_script(story(kind, image, 25), "story.yaml"))
    assert len(plan.chunks) == 3
    finished = list(engine.denoise(plan))
    frames = torch.cat([torch.from_numpy(engine.decode(plan, part)) for part in finished])
    assert frames.shape == (25, plan.height, plan.width, 3)
    latents, shape = torch.cat([part.latents for part in finished], 1)[None], (1, -1, 1, 1, 1)
    mean, std = (torch.tensor(engine.vae.config[f"latents_{name}"]).view(shape) for name in ("mean", "std"))
    with torch.no_grad():
        whole = engine.vae.decode(latents * std + mean).sample[0]
    expected = whole.add(1).mul(127.5).permute(1, 2, 3, 0)
    assert (frames.float() - expected).abs().max() <= 0.51


def test_a_latent_image_is_the_film_s_first_latent_and_is_told_to_be_clean(
    checkpoint_of: CheckpointOf, image: Path
) -> None:
    kind = "ti2v from an image"
    engine = load(checkpoint_of, kind, "queue.chunk_latents=2", "queue.context_latents=1")
    plan = engine.plan(parse_script(story(kind, image), "story.yaml"))
    seen: list[Unit] = []
    conditioned = WanImageStage.conditioned

    def listen(stage: WanImageStage, unit: Unit) -> Unit:
        seen.append(conditioned(stage, unit))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanImageStage, "conditioned", listen)
        first, *_ = engine.denoise(plan)
    latents = engine._conditioning.encode_image(image, plan).latents
    assert torch.equal(first.latents[:, :1], latents)
    for unit in seen:
        is_first = unit.chunk.start == 0
        if is_first:
            assert unit.timesteps[0] == 0 and unit.timesteps[1:].min() > 0
        assert unit.latents is not None and torch.equal(unit.latents[:, :1], latents) == is_first


def test_later_chunks_get_the_condition_of_a_clip_of_any_length(checkpoint_of: CheckpointOf, image: Path) -> None:
    """Mask 0 and the latents of grey frames behind the image, as the stock pipeline makes them for the whole clip."""
    engine = load(checkpoint_of, "i2v 2.2")
    plan = engine.plan(parse_script(story("i2v 2.2", image), "story.yaml"))
    condition, count = engine._conditioning.encode_image(image, plan), 60
    pipe = diffusers.WanImageToVideoPipeline.from_pretrained(checkpoint_of("i2v 2.2"))
    pixels = pipe.video_processor.preprocess(Image.open(image), height=plan.height, width=plan.width)
    frames = 4 * count - 3
    _, expected = pipe.prepare_latents(pixels, 1, 4, plan.height, plan.width, frames, torch.float32, "cpu")
    assert condition.latents.shape[1] < count
    assert (condition.channels(range(count)) - expected[0]).abs().max() <= 1e-5
    assert torch.equal(condition.channels(range(30, 34)), condition.channels(range(count))[:, 30:34])


@pytest.mark.parametrize("left", ["recompute", "cached"])
def test_context_never_mixes_the_experts_kv(checkpoint_of: CheckpointOf, left: str) -> None:
    """Right context is left out after the change of experts, for as many steps as neighbours are apart, and no more."""
    settings = [f"queue.left={left}", "queue.gap=2", "sampler.steps=8", "queue.chunk_latents=2"]
    engine = load(checkpoint_of, "a14b", *settings, "queue.context_latents=1")
    stage = engine._stage
    assert isinstance(stage, WanExpertsStage)
    levels = [engine._sampler.timestep(step) for step in range(8)]
    change = next(step for step, level in enumerate(levels) if level < 800)
    assert 2 <= change <= 5
    read: list[tuple[Unit, WanStage]] = []
    asked: list[Unit] = []
    whole = WanExpertsStage.forward

    def listen_to_all(stage: WanExpertsStage, unit: Unit) -> Output:
        asked.append(unit)
        return whole(stage, unit)

    forward = WanStage.forward

    def listen(expert: WanStage, unit: Unit) -> Output:
        read.append((unit, expert))
        return forward(expert, unit)

    plan = engine.plan(parse_script(story("a14b", Path(), 25), "story.yaml"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(WanExpertsStage, "forward", listen_to_all)
        patch.setattr(WanStage, "forward", listen)
        list(engine.denoise(plan))
    for before, (unit, expert) in zip(asked, read, strict=True):
        assert expert is (stage._high if unit.step < change else stage._low)
        for kv in (unit.left, unit.right):
            assert kv is None or (isinstance(kv, ExpertKv) and kv.expert is expert)
        assert (before.right is not None and unit.right is None) == (
            before.right is not None and change <= unit.step < change + 2
        )
    assert any(unit.step >= change + 2 and unit.right is not None for unit, _ in read)


@pytest.mark.parametrize(
    ("kind", "overrides", "message"),
    [
        ("a14b", ["cache.policy=taylorseer"], "cache.policy must be none, not taylorseer: .* has two experts"),
        ("a14b", ["attention.policy=sta"], "attention.policy must be dense, not sta: .* has two experts"),
        ("ti2v", ["sampler.guidance_low=2"], "sampler.guidance_low is of models with two experts"),
    ],
)
def test_what_a_model_cannot_do_is_refused_before_weights_are_loaded(
    checkpoint_of: CheckpointOf, kind: str, overrides: list[str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def loads(*_: Any) -> None:
        pytest.fail("weights were loaded")

    monkeypatch.setattr("longvid.models.wan_checkpoint.WanCheckpoint.load_text", loads)
    with pytest.raises(InputError, match=message):
        Engine.load(checkpoint_of(kind), overrides=overrides)


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        ("i2v 2.1", "scenes: [{prompt: a, for: 1s}]", r"story.yaml:1: .* makes films of an image: give `image`"),
        ("a14b", "image: x.png\nscenes: [{prompt: a, for: 1s}]", r"story.yaml:2: .* takes no image"),
        ("ti2v", "image: x.png\nscenes: [{prompt: a, for: 1s}]", r"story.yaml:2: image x.png: no such file"),
        (
            "i2v 2.1",
            "image: x.png\nscenes:\n- {prompt: a, for: 1s}\n- {prompt: a, for: 9s, transition: blend, image: y.png}",
            r"story.yaml:4: only a scene that begins with a cut has an image",
        ),
    ],
)
def test_images_that_do_not_fit_are_refused_with_their_line(
    checkpoint_of: CheckpointOf, kind: str, text: str, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        make_plan(parse_script(text, "story.yaml"), load_settings(), facts_of(str(checkpoint_of(kind))))


def test_a_file_that_is_no_image_is_named(checkpoint_of: CheckpointOf, tmp_path: Path) -> None:
    file = tmp_path / "first.png"
    file.write_text("no image")
    engine = load(checkpoint_of, "ti2v")
    plan = engine.plan(parse_script(story("ti2v from an image", file), "story.yaml"))
    with pytest.raises(InputError, match=r"first\.png: is not an image that can be read"):
        next(engine.denoise(plan))


def test_every_shot_begins_with_its_own_image_or_the_story_s(image: Path, tmp_path: Path) -> None:
    scenes = "- {prompt: a, for: 1s}\n- {prompt: a, for: 2s, transition: blend}\n- {prompt: a, for: 1s, image: b.png}"
    script = parse_script(f"image: {image}\nscenes:\n{scenes}", str(tmp_path / "story.yaml"))
    assert [scene.image for scene in script.scenes] == [image, None, tmp_path / "b.png"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"boundary_ratio": None}, "two transformers need a boundary_ratio between 0 and 1, not None"),
        ({"transformer_2": [None, None]}, "its boundary_ratio is 0.8, but it has no transformer_2"),
        ({"transformer": [None, None]}, "has no transformer"),
    ],
)
def test_an_index_that_contradicts_itself_is_refused(
    checkpoint_of: CheckpointOf, tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    for part in ("transformer", "transformer_2", "vae"):
        (tmp_path / part).mkdir()
        (tmp_path / part / "config.json").write_bytes((checkpoint_of("a14b") / part / "config.json").read_bytes())
    index = json.loads((checkpoint_of("a14b") / "model_index.json").read_text())
    (tmp_path / "model_index.json").write_text(json.dumps(index | changes))
    with pytest.raises(InputError, match=message):
        facts_of(str(tmp_path))
