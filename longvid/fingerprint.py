"""The fingerprint of a render: all that its pixels depend on, as plain data, and what changed since another. Pure.

Two renders of one fingerprint give the same bytes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib.metadata import version
from itertools import takewhile
from os.path import expanduser
from pathlib import Path
from typing import Any

from longvid.document import show
from longvid.parallel.topology import Topology
from longvid.plan import ModelFacts, Plan
from longvid.script import Script, transition_frames
from longvid.settings import Settings

Plain = dict[str, Any]
"""What JSON holds: mappings, lists, text, numbers, nothing."""

WHOLE_BYTES = 64 << 20
"""Files up to this size are digested whole, larger ones by their head and samples."""

_PARTS = (
    *("transformer", "transformer_2", "vae", "text_encoder", "tokenizer", "scheduler"),
    *("image_encoder", "image_processor", "text_encoder_2", "tokenizer_2"),
)
_SAMPLES, _SAMPLE_BYTES = 64, 1 << 16
_SHOWN = 48
"""Characters of a text in a message."""

_LIBRARIES = ("longvid", "torch", "diffusers", "transformers", "av")
_FREE: dict[str, Any] = {
    "model": {"path", "lora"},
    "memory": {"text_encoder", "prompt_cache", "offload", "group"},
    "vin": {"path"},
    "mesh": True,
    "output": {"keep_state"},
    "runtime": {"device", "threads", "timeout_s", "checkpoint_s"},
}
"""Settings that may change between runs: files of the model and of LoRAs count, wherever they are; see `Machine`."""


_FILES = (("attention", "profile"), ("cache", "table"))
"""Settings that name a file, of which the content counts."""


@dataclass(frozen=True)
class Machine:
    """What was really used where the settings say `auto`. Tokens spread over ranks are summed in another order, and so
    they are by another processor's instructions (`kernels`)."""

    device: str
    threads: int
    topology: Topology
    kernels: str = ""


_NO_MATTER = ("name", "vocabulary", "decoder_passes")
"""Facts of a model that are free to change: who decodes a latent makes no difference to it."""


def fingerprint(
    script: Script, plan: Plan, settings: Settings, facts: ModelFacts, *, model: Plain, machine: Machine
) -> Plain:
    """That of a render; `model` as `describe_model` says. Layers and guidance branches may be spread in any way."""
    kept: Plain = settings.model_dump(mode="json", exclude=_FREE)
    kept["model"]["lora"] = [
        {**entry.model_dump(exclude={"path"}), "file": describe_lora(Path(entry.path))} for entry in settings.model.lora
    ]
    for section, name in _FILES:
        if path := kept[section].get(name):
            kept[section][name] = describe_file(Path(expanduser(path)))["digest"]
    kept["mesh"] = {"seq": machine.topology.seq, "ring": machine.topology.ring}
    kept["runtime"] |= {"device": machine.device, "threads": machine.threads, "kernels": machine.kernels}
    kept_facts = {name: value for name, value in asdict(facts).items() if name not in _NO_MATTER}
    kept_facts["grid"]["patch"] = list(facts.grid.patch)
    kept_facts["max_size"] = list(facts.max_size) if facts.max_size else None
    return {
        "versions": {name: version(name) for name in _LIBRARIES},
        "model": {"files": model, "facts": kept_facts},
        "settings": kept,
        "story": _story(script, plan),
    }


def _story(script: Script, plan: Plan) -> Plain:
    """What the storyboard means: times in frames, sizes and rates as they are used, prompts with their style."""
    scenes: list[Plain] = []
    seed = script.seed
    for scene, span in zip(script.scenes, plan.scenes, strict=True):
        # A scene without a seed goes on with that of the scene before, or after a cut with the film's.
        inherited = script.seed if scene.transition.kind == "cut" else seed
        seed = inherited if scene.seed is None else scene.seed
        described: Plain = {"prompt": scene.prompt, "negative": scene.negative, "frames": span.num_frames, "seed": seed}
        described["transition"] = scene.transition.kind
        if scene.image:
            described["image"] = describe_file(scene.image)["digest"]
        if scene.transition.kind != "cut":
            described[f"{scene.transition.kind} frames"] = transition_frames(script, scene, plan.fps)
        scenes.append(described)
    return {"fps": plan.fps, "width": plan.width, "height": plan.height, "scenes": scenes}


# --------------------------------------------------------------------------------------------------------------- model


def describe_model(root: Path) -> Plain:
    """Every file of a checkpoint's parts: its size and digest, by its path in the directory."""
    files = [*root.glob("*.json"), *(file for part in _PARTS for file in (root / part).rglob("*") if file.is_file())]
    return {str(file.relative_to(root)): describe_file(file) for file in sorted(files)}


def describe_lora(path: Path) -> Plain:
    """The file of a LoRA, or those of the folder that peft wrote."""
    path = Path(expanduser(path))
    files = sorted(path.glob("adapter_*")) if path.is_dir() else [path]
    return {f"{i}": describe_file(file)["digest"] for i, file in enumerate(files)}


def describe_folder(folder: Path) -> Plain:
    """Every file of something that is used beside a model, by the folder's name."""
    return {f"{folder.name}/{file.name}": describe_file(file) for file in sorted(folder.iterdir()) if file.is_file()}


def mark_of(root: Path, part: str) -> str:
    """A short text that stands for the files of one part of a checkpoint."""
    paths = sorted(file for file in (root / part).rglob("*") if file.is_file())
    files = {str(file.relative_to(root)): describe_file(file) for file in paths}
    return hashlib.blake2b(repr(files).encode(), digest_size=8).hexdigest()


def marks_of(root: Path, *kinds: str) -> str:
    """The same for all parts whose names begin so: `text_encoder` and `text_encoder_2`."""
    parts = sorted(part.name for part in root.iterdir() if part.is_dir() and part.name.startswith(kinds))
    return " ".join(mark_of(root, part) for part in parts)


def describe_file(path: Path) -> Plain:
    """Its size and digest. A change in a large file shows in its head (names and shapes) or in samples all over it."""
    size, digest = path.stat().st_size, hashlib.blake2b(digest_size=16)
    with path.open("rb") as file:
        if size <= WHOLE_BYTES:
            digest.update(file.read())
        else:
            digest.update(file.read(1 << 20))
            for i in range(_SAMPLES):
                file.seek((size - _SAMPLE_BYTES) * i // (_SAMPLES - 1))
                digest.update(file.read(_SAMPLE_BYTES))
    return {"bytes": size, "digest": digest.hexdigest()}


# --------------------------------------------------------------------------------------------------------- differences


def differences(old: Plain, new: Plain) -> list[str]:
    """What is not the same in two fingerprints, in the words of the user; nothing where they are equal."""
    return [_words(path, *values) for path, *values in _changes((), old, new)]


_Place = tuple[str | int, ...]
_Change = tuple[_Place, Any, Any]


def _changes(path: _Place, old: Any, new: Any) -> Iterator[_Change]:
    """The innermost values that differ, and where. A file of the model is one value."""
    if len(path) == 3 and path[:2] == ("model", "files"):
        if old != new:
            yield path, old, new
    elif isinstance(old, Mapping) and isinstance(new, Mapping):
        for key in dict.fromkeys((*old, *new)):
            yield from _changes((*path, key), old.get(key), new.get(key))
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for i, pair in enumerate(zip(old, new, strict=True)):
            yield from _changes((*path, i), *pair)
    elif old != new:
        if isinstance(old, list) and isinstance(new, list):
            old, new = len(old), len(new)
        yield path, old, new


def _words(path: _Place, old: Any, new: Any) -> str:
    match path:
        case ("model", "files", file):
            kind = "weights" if str(file).endswith(".safetensors") else "files"
            return f"the model's {kind} changed ({file})"
        case ("story", "scenes", int(index), *rest):
            name = f"scene {index + 1}, {_joined(rest)}"
        case ("settings", "model", "lora", int(index), "file", *_):
            return f"the file of LoRA {index + 1} changed"
        case ("settings", str(section), str(setting)) if (section, setting) in _FILES and old and new:
            return f"the file of {section}.{setting} changed"
        case ("model", "facts", *rest):
            name = f"the model's {_joined(rest)}"
        case (_, *rest):
            name = _joined(rest)
    return f"{name}: {_shown(old, new)} then, {_shown(new, old)} now"


def _joined(path: Any) -> str:
    return ".".join(map(str, path))


def _shown(value: Any, other: Any) -> str:
    """A value as a message shows it; of a long text, what is around the first place where it differs from another."""
    if not isinstance(value, str) or not isinstance(other, str) or len(value) <= _SHOWN:
        return show(value)
    same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(value, other, strict=False)))
    start = max(0, same - _SHOWN // 3)
    end = start + _SHOWN
    return repr(f"{'...' * (start > 0)}{value[start:end]}{'...' * (end < len(value))}")
