"""Checkpoints: a stock diffusers directory, checked and opened. Safetensors only, never pickles."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, UMT5EncoderModel

from longvid.errors import InputError
from longvid.models.facts import extra_facts, facts_from, facts_of, find_model, read_json
from longvid.plan import ModelFacts


@dataclass(frozen=True)
class Checkpoint:
    """The parts of one Wan checkpoint, loaded."""

    facts: ModelFacts
    tokenizer: Any
    text_encoder: Any
    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan
    scheduler: Any


def load_checkpoint(name: str, *, dtype: torch.dtype, device: torch.device) -> Checkpoint:
    """Load a diffusers WanPipeline directory; the VAE and the text encoder keep fp32 on a CPU.

    Raises InputError, naming the file, for anything missing, corrupt, truncated, or not safetensors.
    """
    root = find_model(name)
    index = read_json(root / "model_index.json")
    facts = facts_of(name)
    check_weights(root)
    with _errors_name(root):
        transformer = _load(WanTransformer3DModel, root / "transformer", dtype)
        vae = _load(AutoencoderKLWan, root / "vae", torch.float32 if device.type == "cpu" else dtype)
        text_encoder = UMT5EncoderModel.from_pretrained(root / "text_encoder", dtype=dtype, use_safetensors=True)
        tokenizer = AutoTokenizer.from_pretrained(root / "tokenizer")
        scheduler = _scheduler(root, index)
    parts = (text_encoder.eval().to(device), transformer.eval().to(device), vae.eval().to(device))
    return Checkpoint(facts, tokenizer, *parts, scheduler)


def checkpoint_of(pipeline: WanPipeline) -> Checkpoint:
    """The parts of a pipeline that is already loaded, where they are and in their dtype."""
    origin = Path(str(pipeline.config.get("_name_or_path") or ""))
    extra = extra_facts(origin) if origin.is_dir() else {}
    facts = facts_from("pipeline", extra, pipeline.transformer.config, pipeline.vae.config, pipeline.config)
    parts = (pipeline.tokenizer, pipeline.text_encoder, pipeline.transformer, pipeline.vae, pipeline.scheduler)
    return Checkpoint(facts, *parts)


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
