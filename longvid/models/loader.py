"""Checkpoints: a stock diffusers directory, checked and opened. Safetensors only, never pickles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from accelerate.utils import set_module_tensor_to_device
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoTokenizer, UMT5EncoderModel

from longvid.errors import InputError
from longvid.models.facts import extra_facts, facts_from, facts_of, find_model, read_json
from longvid.plan import ModelFacts


@dataclass(frozen=True)
class Checkpoint:
    """The parts of one Wan checkpoint that every rank can share: what opening it costs little."""

    facts: ModelFacts
    scheduler: Any
    root: Path | None
    pipeline: WanPipeline | None = None
    """Where the parts come from instead of ``root``, for a pipeline that is already loaded."""

    def load_text(self, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
        """Tokenizer and text encoder."""
        if self.pipeline is not None:
            return self.pipeline.tokenizer, self.pipeline.text_encoder
        assert self.root is not None
        with _errors_name(self.root):
            folder = self.root / "text_encoder"
            encoder = UMT5EncoderModel.from_pretrained(folder, dtype=dtype, use_safetensors=True)
            return AutoTokenizer.from_pretrained(self.root / "tokenizer"), encoder.eval().to(device)

    def load_vae(self, dtype: torch.dtype, device: torch.device) -> AutoencoderKLWan:
        """The VAE, in fp32 on a CPU."""
        if self.pipeline is not None:
            return self.pipeline.vae
        assert self.root is not None
        with _errors_name(self.root):
            vae = _load(AutoencoderKLWan, self.root / "vae", torch.float32 if device.type == "cpu" else dtype)
            return vae.eval().to(device)

    def load_layers(self, part: ModelPart, dtype: torch.dtype, device: torch.device) -> WanTransformer3DModel:
        """The transformer with some of its layers: no tensor of another part is read."""
        if self.pipeline is not None:
            dit = self.pipeline.transformer
            dit.blocks = dit.blocks[part.layers.start : part.layers.stop]
            return dit
        assert self.root is not None
        with _errors_name(self.root):
            return load_part(self.root / "transformer", part, dtype, device)


@dataclass(frozen=True)
class ModelPart:
    """What one stage owns of a transformer: some layers, and at the ends the patch embedding and the output layer."""

    layers: range
    is_first: bool = True
    is_last: bool = True

    def owns(self, name: str) -> bool:
        """Whether it needs a tensor, by its name in the checkpoint. Time and text embedders are needed by all."""
        kind, _, rest = name.partition(".")
        match kind:
            case "blocks":
                return int(rest.partition(".")[0]) in self.layers
            case "patch_embedding":
                return self.is_first
            case "proj_out" | "scale_shift_table" | "norm_out":
                return self.is_last
        return True

    def local_name(self, name: str) -> str:
        """The tensor's name in a model that holds this part's layers alone."""
        if not name.startswith("blocks."):
            return name
        _, layer, rest = name.split(".", 2)
        return f"blocks.{int(layer) - self.layers.start}.{rest}"


def open_checkpoint(name: str) -> Checkpoint:
    """Check a diffusers WanPipeline directory and read what is small.

    Raises InputError, naming the file, for anything missing, corrupt, truncated, or not safetensors.
    """
    root = find_model(name)
    index = read_json(root / "model_index.json")
    facts = facts_of(name)
    check_weights(root)
    with _errors_name(root):
        return Checkpoint(facts, _scheduler(root, index), root)


def checkpoint_of(pipeline: WanPipeline) -> Checkpoint:
    """A pipeline that is already loaded, its parts where they are and in their dtype."""
    origin = Path(str(pipeline.config.get("_name_or_path") or ""))
    extra = extra_facts(origin) if origin.is_dir() else {}
    facts = facts_from("pipeline", extra, pipeline.transformer.config, pipeline.vae.config, pipeline.config)
    return Checkpoint(facts, pipeline.scheduler, origin if extra else None, pipeline)


def load_part(folder: Path, part: ModelPart, dtype: torch.dtype, device: torch.device) -> WanTransformer3DModel:
    """A part of the transformer in ``folder``: tensors of other parts are neither read nor allocated."""
    config = WanTransformer3DModel.load_config(folder)
    with init_empty_weights(include_buffers=False):  # rotary tables are not in the checkpoint
        dit = WanTransformer3DModel.from_config(config)
    wanted = {name for name in dit.state_dict() if part.owns(name)}
    dit.blocks = nn.ModuleList(dit.blocks[layer] for layer in part.layers)
    in_fp32 = set(dit._keep_in_fp32_modules or ())
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in wanted & set(file.keys()):
                kept = torch.float32 if in_fp32 & set(name.split(".")) else dtype
                value = file.get_tensor(name)
                set_module_tensor_to_device(dit, part.local_name(name), device, value, dtype=kept)
                wanted.discard(name)
    if wanted:
        raise InputError(f"{folder}: lacks {len(wanted)} tensors that its config asks for, first {min(wanted)}")
    dit.rope.to(device)
    return dit.eval()


def check_weights(root: Path) -> None:
    """Open every weight file's header, so that a truncated one is named before anything is loaded."""
    for part in ("text_encoder", "transformer", "vae"):
        found = sorted((root / part).glob("*.safetensors"))
        if not found:
            raise InputError(f"{root / part}: holds no .safetensors file (other formats are never loaded)")
        for path in found:
            try:
                with safe_open(path, framework="pt") as file:
                    file.keys()
            except (SafetensorError, OSError) as error:
                raise InputError(f"{path}: is corrupt or truncated ({error})") from None


def _load(kind: Any, folder: Path, dtype: torch.dtype) -> Any:
    model, info = kind.from_pretrained(folder, torch_dtype=dtype, use_safetensors=True, output_loading_info=True)
    missing = info["missing_keys"]
    if missing:
        raise InputError(f"{folder}: lacks {len(missing)} tensors that its config asks for, first {sorted(missing)[0]}")
    return model


def _scheduler(root: Path, index: Mapping[str, Any]) -> Any:
    import diffusers

    name = index.get("scheduler", [None, None])[1]
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if kind is None:
        raise InputError(f"{root / 'model_index.json'}: unknown scheduler {name!r}")
    return kind.from_pretrained(root / "scheduler")


@contextmanager
def _errors_name(root: Path) -> Iterator[None]:
    try:
        yield
    except (InputError, torch.OutOfMemoryError):
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        if "memory" in str(error):
            raise
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{root}: cannot be loaded as a Wan checkpoint ({first})") from error
