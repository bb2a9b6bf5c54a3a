"""A damaged or foreign checkpoint is refused with one message that names the file."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from longvid.errors import InputError
from longvid.models.facts import facts_of
from longvid.models.loader import ModelPart, open_checkpoint

CPU = torch.device("cpu")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def load_all(name: str) -> None:
    checkpoint = open_checkpoint(name)
    checkpoint.load_text(torch.float32, CPU)
    checkpoint.load_vae(torch.float32, CPU)
    checkpoint.load_layers(ModelPart(range(checkpoint.facts.num_layers)), torch.float32, CPU)


def truncate(root: Path) -> None:
    path = root / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def fill_with_garbage(root: Path) -> None:
    (root / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"\x80\x04garbage" * 100)


def leave_only_a_pickle(root: Path) -> None:
    (root / WEIGHTS).unlink()
    torch.save({}, root / "transformer/diffusion_pytorch_model.bin")


def ask_for_more_layers(root: Path) -> None:
    change_json(root / "transformer/config.json", num_layers=9)


def change_a_size(root: Path) -> None:
    change_json(root / "transformer/config.json", ffn_dim=64)


def change_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (truncate, "safetensors: is corrupt or truncated"),
        (fill_with_garbage, "vae/diffusion_pytorch_model.safetensors: is corrupt"),
        (leave_only_a_pickle, r"transformer: holds no .safetensors file"),
        (ask_for_more_layers, "lacks .* tensors"),
        (change_a_size, "cannot be loaded as a Wan checkpoint"),
        (lambda root: (root / "model_index.json").unlink(), "model_index.json: cannot be read"),
        (lambda root: (root / "model_index.json").write_text("{"), "model_index.json: is not JSON"),
        (lambda root: (root / "model_index.json").write_text("[]"), "expected a JSON object"),
        (lambda root: change_json(root / "model_index.json", _class_name="LTXPipeline"), "expected a WanPipeline"),
        (lambda root: change_json(root / "model_index.json", transformer_2=["diffusers", "X"]), "two transformers"),
        (lambda root: change_json(root / "model_index.json", scheduler=["diffusers", "Nope"]), "unknown scheduler"),
    ],
)
def test_damage_is_named(damage: Callable[[Path], None], message: str, euler_checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "model"
    shutil.copytree(euler_checkpoint, root)
    damage(root)
    with pytest.raises(InputError, match=message):
        load_all(str(root))


def test_an_unknown_model_is_refused_with_the_known_names() -> None:
    with pytest.raises(InputError, match=r"neither a directory nor a known name .*mini"):
        open_checkpoint("nowhere")


def test_facts_come_from_config_files_alone(euler_checkpoint: Path, tmp_path: Path) -> None:
    loaded = open_checkpoint(str(euler_checkpoint)).facts
    bare = tmp_path / "bare"
    shutil.copytree(euler_checkpoint, bare, ignore=shutil.ignore_patterns("*.safetensors"))
    facts = facts_of(str(bare))
    assert (facts.grid, facts.num_layers, facts.latent_channels) == (loaded.grid, 3, 4)
    assert (facts.grid.temporal, facts.grid.spatial, facts.max_latents) == (4, 8, 64)
