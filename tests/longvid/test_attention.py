"""Sparse attention in whole renders: what it leaves out changes the film, what it keeps does not."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from longvid.engine import Engine
from longvid.errors import InputError
from longvid.events import Notice
from longvid.kernels.dense import Partial
from longvid.kernels.score import block_mass
from longvid.models.facts import facts_of
from longvid.script import parse_script
from longvid.settings import load_settings
from longvid.sparsity.adaspa import AdaSpaPolicy, choose
from longvid.sparsity.make import make_attention
from longvid.sparsity.option_search import OptionSearch
from longvid.sparsity.policy import Call
from longvid.sparsity.search import Search
from longvid.sparsity.settings import AdaSpa, Sta, TileFrames
from longvid.sparsity.tiles import tiling
from longvid.tune import tune, tune_options

STORY = """
seed: 3
negative: "blue"
scenes:
  - {prompt: "a red circle moving left", for: 65f}
"""
QUEUE = ["sampler.steps=5", "queue.chunk_latents=7", "queue.context_latents=2", "runtime.threads=1"]
TILE = "attention.tile=16"
POLICIES = {
    "adaspa": (["attention.sparsity=0", TILE], [TILE, "attention.sparsity=0.9"]),
    "tile": (["attention.global_latents=1024", TILE], [TILE, "attention.global_latents=0"]),
    "sta": (["attention.window=[64,64,64]"], ["attention.tile=[1,3,2]", "attention.window=[3,1,1]"]),
    "radial": (["attention.decay=16", TILE], [TILE, "attention.decay=0.2"]),
    "grat": (["attention.group=[2,2,1]"], ["attention.group=[1,1,1]"]),
    "svg2": (["attention.top_p=1", "attention.min_keep=1"], ["attention.top_p=0.3"]),
    "svg_ear": (["attention.top_p=1", "attention.min_keep=1"], ["attention.top_p=0.3"]),
    "rettention": (["attention.keep=1", "attention.growth=0", TILE], [TILE]),
    "asa": (["attention.mass=1", "attention.max_keep=1", "attention.tile=16"], [TILE, "attention.max_keep=0.2"]),
}


def latents_of(model: Path, *overrides: str) -> torch.Tensor:
    engine = Engine.load(model, overrides=[*QUEUE, *overrides])
    plan = engine.plan(parse_script(STORY, "story.yaml"))
    return torch.cat([finished.latents for finished in engine.denoise(plan)], dim=1)


@pytest.fixture(scope="module", params=["recompute", "cached"])
def left(request: pytest.FixtureRequest) -> str:
    return f"queue.left={request.param}"


@pytest.fixture(scope="module")
def dense(tiny_model: Path, left: str) -> torch.Tensor:
    return latents_of(tiny_model, left, "sampler.guidance=2")


@pytest.mark.parametrize("policy", sorted(POLICIES.keys() - {"grat"}))
def test_a_policy_that_keeps_all_gives_the_dense_latents(
    tiny_model: Path, left: str, dense: torch.Tensor, policy: str
) -> None:
    common = [left, "sampler.guidance=2", f"attention.policy={policy}", "attention.crossover=always"]
    found = latents_of(tiny_model, *common, *POLICIES[policy][0])
    assert (found - dense).abs().max() <= 1e-4 * dense.abs().max()


@pytest.mark.parametrize("policy", sorted(POLICIES))
def test_a_policy_that_leaves_something_out_gives_finite_latents_near_the_dense_ones(
    tiny_model: Path, left: str, dense: torch.Tensor, policy: str
) -> None:
    common = [left, "sampler.guidance=2", f"attention.policy={policy}", "attention.crossover=always"]
    found = latents_of(tiny_model, *common, *POLICIES[policy][1])
    assert not torch.equal(found, dense)
    assert (found - dense).abs().mean() <= 0.5 * dense.abs().mean()


def test_a_sampled_search_of_adaspa_finds_nearly_what_an_exact_one_finds() -> None:
    """On the included model, in a clip of 21 tiles a side: 0.95 of its mass, in every head."""
    settings = ["schedule=sequential", "sampler.steps=2", "attention.policy=adaspa", "attention.crossover=always"]
    engine = Engine.load("mini", overrides=settings)
    assert engine.attention is not None
    listener = Listener()
    engine.attention.policy = listener
    for _ in engine.denoise(engine.plan(parse_script(STORY.replace("65f", "321f"), "story.yaml"))):
        pass
    default = AdaSpa(policy="adaspa")
    assert default.sample_every > 4 and len(listener.heard) == engine.facts.num_layers
    for call, q, k, lse in listener.heard:
        tiles = tiling(call.tokens, default.tile, q.device)
        mass = block_mass(q, k, lse, tiles.q, tiles.k)
        even = torch.full((call.heads.count,), default.sparsity)
        exact = mass * choose(mass, even, tiles)
        sampled = block_mass(q, k, lse, tiles.q, tiles.k, sample_every=default.sample_every)
        found = mass * choose(sampled, even, tiles)
        assert (found.sum((0, 2, 3)) >= 0.95 * exact.sum((0, 2, 3))).all(), (call.layer, call.step)


class Listener(AdaSpaPolicy):
    """Dense attention, of which it takes down queries, keys and LSE behind the first step."""

    def __init__(self) -> None:
        super().__init__(AdaSpa(policy="adaspa"))
        self.heard: list[tuple[Call, torch.Tensor, torch.Tensor, torch.Tensor]] = []

    def layout(self, *_: object) -> None:
        return

    def finish(
        self, q: torch.Tensor, k: torch.Tensor, _v: torch.Tensor, partial: Partial, _layout: object, call: Call
    ) -> torch.Tensor:
        if call.step:
            self.heard.append((call, q, k, partial[1]))
        return partial[0]


def test_where_tiles_are_slower_attention_stays_dense_and_says_so_once(tiny_model: Path) -> None:
    engine = Engine.load(tiny_model, overrides=[*QUEUE, "attention.policy=adaspa"])
    events: list[object] = []
    list(engine.stream(parse_script(STORY, "story.yaml"), events.append))
    [notice] = [event.text for event in events if isinstance(event, Notice) and "attention.policy" in event.text]
    assert "adaspa would be slower than dense attention" in notice
    expected = latents_of(tiny_model)
    assert torch.equal(latents_of(tiny_model, "attention.policy=adaspa"), expected)


def test_a_ring_refuses_a_policy_that_looks_at_all_keys(tiny_model: Path) -> None:
    settings = load_settings(None, ["attention.policy=adaspa", "mesh.ring=2", "mesh.seq=2"])
    with pytest.raises(InputError, match=r"mesh\.ring must be 1, not 2: attention\.policy adaspa"):
        make_attention(settings, facts_of(str(tiny_model)), None)


def test_a_tuned_profile_serves_its_model_alone(tiny_model: Path, tmp_path: Path, left: str) -> None:
    story, path = tmp_path / "story.yaml", tmp_path / "profile.json"
    story.write_text(STORY)
    chunks: list[tuple[int, int]] = []
    settings = load_settings(None, [*QUEUE, left, f"model.path={tiny_model}"])
    how = Search(tile=16, tolerance=0.5)
    profile = tune(story, settings, chunks=2, how=how, on_chunk=lambda *done: chunks.append(done))
    assert chunks == [(1, 2), (2, 2)]
    assert (profile.num_layers, profile.num_heads) == (2, 2)
    profile.write(path)
    sparse = [f"attention.profile={path}", "attention.policy=sparse_vdit", "attention.crossover=always"]
    assert latents_of(tiny_model, left, *sparse).isfinite().all()
    profile.model_copy(update={"model": "another"}).write(path)
    with pytest.raises(InputError, match="is the profile of 'another'"):
        Engine.load(tiny_model, overrides=sparse)


def test_tuned_windows_and_latents_serve_their_model_alone(tiny_model: Path, tmp_path: Path) -> None:
    story, path = tmp_path / "story.yaml", tmp_path / "choices.json"
    story.write_text(STORY)
    for chosen in (
        Sta(policy="sta", tile=(1, 2, 2), window=(3, 1, 1)),
        TileFrames(policy="tile", tile=16, global_latents=1),
    ):
        settings = load_settings(None, [*QUEUE, f"model.path={tiny_model}"])
        found = tune_options(story, settings, chunks=1, how=OptionSearch(chosen), on_chunk=lambda *done: None)
        assert (found.num_layers, found.num_heads, found.policy) == (2, 2, chosen.policy)
        assert found.density <= found.even_density + 1e-9 and found.error <= found.even_error + 1e-9
        found.write(path)
        sparse = [f"attention.policy={chosen.policy}", f"attention.profile={path}", "attention.crossover=always"]
        assert latents_of(tiny_model, *sparse).isfinite().all()
        found.model_copy(update={"model": "another"}).write(path)
        with pytest.raises(InputError, match="is the profile of 'another'"):
            Engine.load(tiny_model, overrides=sparse)
