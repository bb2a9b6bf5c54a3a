"""What planning needs to know of a checkpoint, from its config files alone: no torch, no weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

from longvid.errors import InputError
from longvid.geometry import LatentGrid
from longvid.plan import ModelFacts

NAMES = {"mini": "assets/mini"}
FACTS_FILE = "longvid.json"
"""Beside a checkpoint, optional: what diffusers' configs do not say (fps, native size, vocabulary)."""


def find_model(name: str) -> Path:
    """The directory of a model: a known name, or a path. Raises InputError when there is none."""
    if name in NAMES:
        return Path(str(files("longvid").joinpath(NAMES[name])))
    path = Path(name).expanduser()
    if not path.is_dir():
        known = ", ".join(sorted(NAMES))
        raise InputError(f"model.path: {name!r} is neither a directory nor a known name ({known})")
    return path


def facts_of(name: str) -> ModelFacts:
    """What planning needs to know of a checkpoint, from its config files alone. Raises InputError."""
    root = find_model(name)
    index = read_json(root / "model_index.json")
    check_pipeline(root, index)
    extra = extra_facts(root)
    transformer, vae = (read_json(root / part / "config.json") for part in ("transformer", "vae"))
    try:
        return facts_from(name, extra, transformer, vae, index)
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{root}: its config files lack what a Wan checkpoint has ({error})") from None


def extra_facts(root: Path) -> dict[str, Any]:
    """What the FACTS_FILE of a checkpoint's directory says, if there is one."""
    path = root / FACTS_FILE
    return read_json(path) if path.exists() else {}


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


def facts_from(name: str, extra: Mapping[str, Any], transformer: Any, vae: Any, index: Mapping[str, Any]) -> ModelFacts:
    """Facts from a pipeline's configs and, in ``extra``, from its FACTS_FILE."""
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
        num_heads=transformer["num_attention_heads"],
    )
