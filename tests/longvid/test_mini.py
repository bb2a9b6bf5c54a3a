"""The embedded model: stock, small, and obedient."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from longvid.engine import Engine
from longvid.metrics.adherence import read_clip, score
from longvid.models.facts import find_model
from longvid.notices import notices
from longvid.script import Duration, Scene, Script, parse_script
from longvid.training import world

MINI = find_model("mini")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.load("mini")


def test_it_is_at_most_30_mb_and_all_of_it_safetensors() -> None:
    files = [path for path in MINI.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 30e6
    weights = {path.suffix for path in files} - {".json", ".md"}
    assert weights == {".safetensors"}


def test_stock_diffusers_generates_what_the_engine_generates_at_once() -> None:
    from diffusers import WanPipeline

    engine = Engine.load("mini", overrides=["schedule=sequential", "sampler.steps=4"])
    plan = engine.plan(parse_script("scenes:\n  - {prompt: a large red circle moving left, for: 21f}\n", "s"))
    (finished,) = engine.denoise(plan)
    pipeline = WanPipeline.from_pretrained(MINI, torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    (theirs,) = pipeline(
        prompt=plan.prompts[0],
        width=plan.width,
        height=plan.height,
        num_frames=plan.num_frames,
        num_inference_steps=4,
        guidance_scale=1.0,
        latents=engine._noise(plan)(plan.chunks[0])[None],
        output_type="latent",
    ).frames
    assert theirs.abs().max() > 0.5
    assert (finished.latents - theirs).abs().max() <= 1e-4


def test_films_show_what_the_prompts_say(engine: Engine) -> None:
    rng = np.random.default_rng(5)
    scores = []
    for seed in range(10):
        look = world.sample_look(rng)
        story = Script((Scene(world.caption(look), Duration(49, "f")),), seed=seed)
        frames = np.concatenate(list(engine.stream(story)))
        scores.append(score(read_clip(frames), look.attributes()))
    for attribute in ("colour", "background"):
        assert np.mean([s[attribute] for s in scores]) >= 0.9
    assert np.mean([s[name] for s in scores for name in world.ATTRIBUTES]) >= 0.85


def test_the_words_of_the_example_are_all_known(engine: Engine) -> None:
    example = Path(__file__).parents[2] / "examples" / "minute.yaml"
    plan = engine.plan(example)
    assert not list(notices(plan, engine.settings, engine.facts, engine.attention, engine.costs, engine.device))
    assert plan.num_frames >= 60 * engine.facts.fps


def test_a_prompt_of_512_columns_is_what_it_was_trained_with(engine: Engine) -> None:
    """The null prompt differs from a caption: the padding does not drown the words."""
    states = [torch.zeros(1, 128), torch.randn(12, 128, generator=torch.Generator().manual_seed(0))]
    engine._stage.set_prompts(states, states)
    empty, words = engine._stage._texts[0]
    assert float(empty.bias.max()) == pytest.approx(np.log(511), rel=1e-6)
    assert words.layers[0][0].shape[1] == 13
