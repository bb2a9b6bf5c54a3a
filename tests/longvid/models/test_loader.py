"""A damaged or foreign checkpoint is refused with one message that names the file."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import diffusers
import pytest
import torch

from longvid.errors import InputError
from longvid.models.facts import facts_of
from longvid.models.loader import open_checkpoint
from longvid.models.parts import ModelPart
from longvid.models.wan_checkpoint import WanCheckpoint
from longvid.models.wan_facts import WAN_PARTS

CPU = torch.device("cpu")
WEIGHTS = "transformer/diffusion_pytorch_model.safetensors"


def load_all(name: str) -> None:
    checkpoint = open_checkpoint(name)
    assert isinstance(checkpoint, WanCheckpoint)
    checkpoint.load_text(torch.float32, CPU)
    checkpoint.load_vae(torch.float32, CPU)
    checkpoint.load_layers(ModelPart(range(checkpoint.facts.num_layers)), torch.float32, CPU)


def truncate(root: Path) -> None:
    path = root / WEIGHTS
    path.write_bytes(path.read_bytes()[:-1000])


def fill_with_garbage(root: Path) -> None:
    (root / "vae/diffusion_pytorch_model.safetensors").write_bytes(b"\x80\x04garbage" * 100)


def lose_a_shard(root: Path) -> None:
    shutil.rmtree(root / "transformer")
    dit = diffusers.WanTransformer3DModel(num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4)
    dit.save_pretrained(root / "transformer", max_shard_size="1MB")
    max((root / "transformer").glob("*.safetensors")).unlink()


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
        (change_a_size, r"safetensors: blocks.* is \[32\], and its config asks for \[64\]"),
        (lambda root: (root / "model_index.json").unlink(), "model_index.json: cannot be read"),
        (lambda root: (root / "model_index.json").write_text("{"), "model_index.json: is not JSON"),
        (lambda root: (root / "model_index.json").write_text("[]"), "expected a JSON object"),
        (
            lambda root: change_json(root / "model_index.json", _class_name="MochiPipeline"),
            "cannot run a 'MochiPipeline'",
        ),
        (
            lambda root: change_json(root / "model_index.json", transformer_2=["diffusers", "X"]),
            "need a boundary_ratio",
        ),
        (lambda root: change_json(root / "transformer/config.json", in_channels=36), "in_channels of its .* must be 4"),
        (lambda root: change_json(root / "transformer/config.json", patch_size=[2, 2, 2]), "a patch_size of"),
        (lambda root: change_json(root / "transformer/config.json", num_layers="x"), "lack what a wan checkpoint has"),
        (lose_a_shard, "transformer/.*-of-.*safetensors: is missing, and diffusion.*index.json names it"),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parts_hold_the_same_tensors_as_the_whole_model(euler_checkpoint: Path, dtype: torch.dtype) -> None:
    whole = diffusers.WanTransformer3DModel.from_pretrained(euler_checkpoint / "transformer", torch_dtype=dtype)
    checkpoint, seen = open_checkpoint(str(euler_checkpoint)), set()
    assert isinstance(checkpoint, WanCheckpoint)
    count = checkpoint.facts.num_layers
    for part in (ModelPart(range(1), is_last=False), ModelPart(range(1, count), is_first=False)):
        dit = checkpoint.load_layers(part, dtype, CPU)
        for name, tensor in whole.state_dict().items():
            if part.owns(name, WAN_PARTS):
                loaded = dit.state_dict()[part.local_name(name, WAN_PARTS)]
                assert loaded.dtype == tensor.dtype and torch.equal(loaded, tensor), name
                seen.add(name)
    assert seen == set(whole.state_dict())


def test_a_part_reads_its_own_tensors_alone(tmp_path: Path) -> None:
    """In a fresh process: the bytes that come from the disk, and the peak of memory."""
    dit = diffusers.WanTransformer3DModel(
        num_attention_heads=8,
        attention_head_dim=64,
        in_channels=16,
        out_channels=16,
        text_dim=64,
        ffn_dim=2048,
        num_layers=24,
    )
    dit.save_pretrained(tmp_path, max_shard_size="100MB")
    size = sum(path.stat().st_size for path in tmp_path.glob("*.safetensors"))
    whole, half = (peak_growth(tmp_path, layers) for layers in (24, 12))
    assert size > 400e6
    assert whole[0] == pytest.approx(size, rel=0.05)
    assert half[0] < 0.6 * size
    assert half[1] < 0.7 * whole[1]


def peak_growth(folder: Path, layers: int) -> tuple[int, int]:
    """Bytes of tensors that were read, and by how much memory grew."""
    code = f"""
import json, torch
from pathlib import Path
from safetensors import safe_open
import longvid.models.weights as loader
from longvid.models.parts import ModelPart
from longvid.models.wan_checkpoint import WanTransformer3DModel as wan
from longvid.models.wan_facts import WAN_PARTS as names
read = 0
class Counting:
    def __init__(self, file): self.file = file
    def __enter__(self): self.open = self.file.__enter__(); return self
    def __exit__(self, *error): return self.file.__exit__(*error)
    def keys(self): return self.open.keys()
    def get_tensor(self, name):
        global read
        tensor = self.open.get_tensor(name)
        read += tensor.nbytes
        return tensor
loader.safe_open = lambda *args, **options: Counting(safe_open(*args, **options))
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024
before = peak()
part = ModelPart(range({layers}), is_last={layers == 24})
dit = loader.load_part(wan, Path({str(folder)!r}), part, names, torch.float32, torch.device("cpu"))
sum(float(tensor.sum()) for tensor in dit.parameters() if not tensor.is_meta)  # the file may only be mapped
print(json.dumps([read, peak() - before]))
"""
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    read, growth = json.loads(done.stdout)
    return read, growth
