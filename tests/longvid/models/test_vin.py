"""The VIN adapter: untrained it changes nothing, its attention is exact over parts, and wrong ones are refused."""

from __future__ import annotations

import json
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from longvid.engine import Engine
from longvid.errors import InputError
from longvid.models.vin import Vin, merge
from longvid.models.vin_config import VinConfig

SIZES = {"hidden_size": 24, "latent_channels": 4, "num_layers": 2, "num_heads": 2}
CONFIG = VinConfig(**SIZES, tokens=3, spacing=2, processors=1, heads=2)
SMALL = ["sampler.steps=3", "queue.chunk_latents=2", "queue.context_latents=1"]
STORY = """
seed: 3
scenes:
  - {prompt: "a red circle moving left over a blue background", for: 41f}
  - {prompt: "a blue square", for: 13f, transition: cut}
"""


def make_adapter(folder: Path, gate: float, config: VinConfig = CONFIG) -> Path:
    """An adapter of random weights, its gates open so far."""
    torch.manual_seed(1)
    vin = Vin(config)
    for layer in vin.layers.values():
        torch.nn.init.constant_(layer.gate, gate)
    vin.save(folder, torch.float32)
    return folder


def frames(model: Path | str, story: Path, overrides: Sequence[str]) -> np.ndarray:
    engine = Engine.load(model, overrides=[*SMALL, *overrides])
    return np.concatenate(list(engine.stream(story)))


@pytest.fixture
def long_story(tmp_path: Path) -> Path:
    path = tmp_path / "long.yaml"
    path.write_text(STORY)
    return path


def test_an_untrained_adapter_leaves_every_bit_of_a_film_as_it_is_and_an_open_gate_does_not(
    tiny_model: Path, long_story: Path, tmp_path: Path
) -> None:
    """Also with guidance, where each branch has tokens of its own."""
    guided = ["sampler.guidance=2"]
    without = frames(tiny_model, long_story, guided)
    closed, opened = make_adapter(tmp_path / "closed", 0.0), make_adapter(tmp_path / "opened", 1.0)
    tied = [
        frames(tiny_model, long_story, [*guided, "vin.policy=on", f"vin.path={adapter}"])
        for adapter in (closed, opened)
    ]
    assert np.array_equal(tied[0], without)
    assert not np.array_equal(tied[1], without)


@given(st.integers(0, 7), st.lists(st.integers(0, 7), max_size=3), st.integers(0, 99))
@settings(deadline=None, max_examples=40)
def test_partials_of_any_parts_of_the_key_latents_merge_to_attention_to_all(
    count: int, cuts: list[int], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    vin = Vin(CONFIG, [])
    latents = torch.randn(4, count, 4, 6, generator=generator)
    timesteps, places = 1000 * torch.rand(count, generator=generator), torch.arange(count).float()
    edges = sorted({0, count, *(min(cut, count) for cut in cuts)})
    spans = [slice(a, b) for a, b in pairwise(edges)] or [slice(0, 0)]
    with torch.no_grad():
        whole = vin.partial(latents, timesteps, places)
        parts = merge([vin.partial(latents[:, span], timesteps[span], places[span]) for span in spans])
    assert whole[0].shape == (2, 3, 12) and whole[1].shape == (2, 3)
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_a_batch_of_films_gets_what_each_gets_alone_and_tokens_follow_latents_noise_place_and_text() -> None:
    generator = torch.Generator().manual_seed(0)
    vin = Vin(CONFIG, [])
    latents, text = torch.randn(2, 4, 3, 4, 6, generator=generator), torch.randn(5, 24, generator=generator)
    timesteps, places = torch.tensor([0.0, 300.0, 900.0]), torch.tensor([40.0, 2.0, 0.0])
    with torch.no_grad():
        together = vin.partial(latents, timesteps.expand(2, -1), places.expand(2, -1))
        alone = vin.partial(latents[1], timesteps, places)
        torch.testing.assert_close(together[0][1], alone[0])
        told = vin.encode(latents[1], timesteps, places, text)
        others = [
            vin.encode(latents[0], timesteps, places, text),
            vin.encode(latents[1], timesteps.flip(0), places, text),
            vin.encode(latents[1], timesteps, places.flip(0), text),
            vin.encode(latents[1], timesteps, places, text[:2]),
        ]
    assert told.shape == (3, 24)
    assert all((told - other).abs().max() > 1e-4 for other in others)


def test_a_stage_reads_its_part_of_an_adapter(tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "vin", 0.5)
    whole, last = Vin.load(folder), Vin.load(folder, [1], encodes=False)
    assert set(last.layers) == {"1"} and last.encoder is None
    for name, value in last.state_dict().items():
        assert torch.equal(value, whole.state_dict()[name])


def damage_nothing_there(folder: Path) -> None:
    (folder / "vin.json").unlink()


def damage_config(folder: Path) -> None:
    (folder / "vin.json").write_text('{"tokens": "many"}')


def damage_size(folder: Path) -> None:
    config = json.loads((folder / "vin.json").read_text())
    (folder / "vin.json").write_text(json.dumps({**config, "tokens": 5}))


def damage_weights(folder: Path) -> None:
    weights = folder / "vin.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


def damage_by_another_model(folder: Path) -> None:
    config = json.loads((folder / "vin.json").read_text())
    (folder / "vin.json").write_text(json.dumps({**config, "num_layers": 30}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (damage_nothing_there, "has no adapter"),
        (damage_config, "is not the config of a VIN adapter"),
        (damage_size, "its config asks for"),
        (damage_weights, "cannot be read"),
        (damage_by_another_model, "is the adapter of another model: its num_layers is 30"),
    ],
)
def test_an_adapter_that_is_missing_damaged_or_another_models_is_refused(
    tiny_model: Path, tmp_path: Path, damage: object, message: str
) -> None:
    assert callable(damage)
    folder = make_adapter(tmp_path / "vin", 0.5)
    damage(folder)
    with pytest.raises(InputError, match=message):
        Engine.load(tiny_model, overrides=["vin.policy=on", f"vin.path={folder}"])


def test_tokens_are_refused_where_nothing_is_far(tiny_model: Path, tmp_path: Path) -> None:
    folder = make_adapter(tmp_path / "vin", 0.5)
    settings = ["schedule=sequential", "queue.context_latents=0", "vin.policy=on", f"vin.path={folder}"]
    with pytest.raises(InputError, match=r"vin.policy must be none with schedule: sequential"):
        Engine.load(tiny_model, overrides=settings)


def test_the_embedded_models_own_adapter_fits_it_and_is_at_work(long_story: Path) -> None:
    plain, tied = (frames("mini", long_story, vin) for vin in ([], ["vin.policy=on"]))
    difference = np.abs(plain.astype(int) - tied.astype(int)).mean()
    assert 0.01 < difference < 40
