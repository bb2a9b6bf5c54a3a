"""Checkpoints: a stock diffusers directory, checked and opened. Safetensors only, never pickles."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanPipeline, WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from transformers import AutoTokenizer, UMT5EncoderModel

from longvid.errors import InputError
from longvid.geometry import LatentGrid
from longvid.plan import ModelFacts

NAMES = {"mini": "assets/mini"}
FACTS_FILE = "longvid.json"
"""Beside a checkpoint, optional: what diffusers' configs do not say (fps, native size, vocabulary)."""


@dataclass(frozen=True)
class Checkpoint:
    """The parts of one Wan checkpoint, loaded."""

    facts: ModelFacts
    tokenizer: Any
    text_encoder: Any
    transformer: WanTransformer3DModel
    vae: AutoencoderKLWan
    scheduler: Any


def find_model(name: str) -> Path:
    """The directory of a model: a known name, or a path. Raises InputError when there is none."""
    if name in NAMES:
        return Path(str(files("longvid").joinpath(NAMES[name])))
    path = Path(name).expanduser()
    if not path.is_dir():
        known = ", ".join(sorted(NAMES))
        raise InputError(f"model.path: {name!r} is neither a directory nor a known name ({known})")
    return path


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
    facts = _facts("pipeline", {}, pipeline.transformer.config, pipeline.vae.config, pipeline.config)
    parts = (pipeline.tokenizer, pipeline.text_encoder, pipeline.transformer, pipeline.vae, pipeline.scheduler)
    return Checkpoint(facts, *parts)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises InputError, naming the file."""
    try:
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except ValueError as error:
        raise InputError(f"{path}: is not JSON ({error})") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: expected a JSON object")
    return value


def check_pipeline(root: Path, index: Mapping[str, Any]) -> None:
    """Only pipelines that the engine runs. Raises InputError for another."""
    if index.get("_class_name") != "WanPipeline":
        raise InputError(f"{root / 'model_index.json'}: expected a WanPipeline, got {index.get('_class_name')!r}")
    if index.get("transformer_2", [None])[0] is not None:
        raise InputError(f"{root}: has two transformers (Wan 2.2 A14B), which longvid cannot run yet")


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
def _errors_name(root: Path) -> Any:
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(f"{root}: cannot be loaded as a Wan checkpoint ({first})") from error


def facts_of(name: str) -> ModelFacts:
    """What planning needs to know of a checkpoint, from its config files alone. Raises InputError."""
    root = find_model(name)
    index = read_json(root / "model_index.json")
    check_pipeline(root, index)
    extra = read_json(root / FACTS_FILE) if (root / FACTS_FILE).exists() else {}
    configs = [read_json(root / part / "config.json") for part in ("transformer", "vae")]
    try:
        return _facts(name, extra, *configs, index)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{root}: its config files lack what a Wan checkpoint has ({error})") from None


def _facts(name: str, extra: Mapping[str, Any], transformer: Any, vae: Any, index: Mapping[str, Any]) -> ModelFacts:
    patch = tuple(transformer["patch_size"])
    grid = LatentGrid(
        vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8), (patch[0], patch[1], patch[2])
    )
    words = extra.get("vocabulary")
    return ModelFacts(
        name=name,
        family="wan",
        grid=grid,
        latent_channels=transformer["in_channels"],
        num_layers=transformer["num_layers"],
        fps=float(extra.get("fps", 16)),
        width=int(extra.get("width", 832)),
        height=int(extra.get("height", 480)),
        per_token_timesteps=bool(extra.get("per_token_timesteps", index.get("expand_timesteps", False))),
        max_latents=transformer["rope_max_seq_len"],
        vocabulary=frozenset(words) if words else None,
    )
