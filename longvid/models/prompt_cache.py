"""A text encoder that is loaded when a prompt is new, and freed again; what it says is kept on disk."""

from __future__ import annotations

import gc
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from longvid.fingerprint import marks_of
from longvid.models.checkpoint import Checkpoint, Prompt, PromptEncoder
from longvid.models.parts import read_shapes
from longvid.settings import MemorySettings

_STATES = "states"


def open_prompts(
    checkpoint: Checkpoint, memory: MemorySettings, dtype: torch.dtype, device: torch.device
) -> PromptEncoder:
    """A checkpoint's text encoder: loaded and kept, or freed, as the settings say."""
    root = checkpoint.root

    def load() -> PromptEncoder:
        return checkpoint.load_prompts(dtype, device)

    if root is None or checkpoint.pipeline is not None or not memory.frees_encoder(_encoder_bytes(root)):
        return load()
    folder = Path(os.path.expanduser(memory.prompt_cache)) if memory.prompt_cache else user_cache() / "prompts"
    machine = f"{device.type} {torch.get_num_threads()} {torch.backends.cpu.get_cpu_capability()}"
    versions = " ".join(f"{name} {version(name)}" for name in ("longvid", "torch", "transformers"))
    key = f"{marks_of(root, 'text_encoder', 'tokenizer')} {dtype} {machine} {versions}"
    return FreedPrompts(load, PromptCache(folder, key))


def user_cache() -> Path:
    """Where this user's programs keep what they can make again."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "longvid"


def _encoder_bytes(root: Path) -> int:
    """Of all text encoders, by the sizes of their files."""
    return sum(path.stat().st_size for path in root.glob("text_encoder*/*.safetensors") if read_shapes(path))


class PromptCache:
    """Text states [n, E] on disk, a safetensors file a prompt, named by a hash of the prompt and of ``key``.

    ``key`` stands for all else that they depend on. Files are replaced whole, and one that is damaged counts as
    missing; a folder that cannot be written keeps nothing.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self._folder, self._key = folder, key

    def path(self, prompt: str) -> Path:
        """The file of a prompt."""
        digest = hashlib.blake2b(f"{self._key}\0{prompt}".encode(), digest_size=20).hexdigest()
        return self._folder / f"{digest}.safetensors"

    def get(self, prompt: str) -> Tensor | None:
        """What was kept of a prompt; None if there is nothing whole."""
        path = self.path(prompt)
        if not path.is_file():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                states = file.get_tensor(_STATES).clone()  # and not a view of the file, which may go away
                return states if file.metadata() == _mark(states) else None
        except (SafetensorError, OSError):
            return None

    def put(self, prompt: str, states: Tensor) -> None:
        """Keep what a prompt gave."""
        states = states.detach().cpu().contiguous()
        with suppress(OSError):
            self._folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self._folder, suffix=".part")
            try:
                with os.fdopen(handle, "wb") as file:
                    file.write(save({_STATES: states}, _mark(states)))
                os.replace(name, self.path(prompt))
            except OSError:
                os.unlink(name)
                raise


def _mark(states: Tensor) -> dict[str, str]:
    """A digest of the values, for safetensors checks shapes alone."""
    return {"blake2b": hashlib.blake2b(states.view(torch.uint8).numpy().tobytes(), digest_size=16).hexdigest()}


@dataclass
class FreedPrompts:
    """A PromptEncoder that holds none: ``load`` gives one, which goes when the prompts that lack are encoded.

    What a family's encoder gives besides tensors is not kept on disk.
    """

    load: Callable[[], PromptEncoder]
    cache: PromptCache

    def encode(self, prompts: Sequence[str]) -> list[Prompt]:
        """Prompts on the CPU; equal ones share one value."""
        known: dict[str, Prompt] = {}
        missing = []
        for prompt in dict.fromkeys(prompts):
            states = self.cache.get(prompt)
            if states is None:
                missing.append(prompt)
            else:
                known[prompt] = states
        if missing:
            for prompt, states in zip(missing, self._encode_new(missing), strict=True):
                known[prompt] = states
                if isinstance(states, Tensor):
                    self.cache.put(prompt, states)
        return [known[prompt] for prompt in prompts]

    def _encode_new(self, prompts: Sequence[str]) -> list[Prompt]:
        encoded = [states.to("cpu") for states in self.load().encode(prompts)]
        gc.collect()  # models have cycles
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return encoded
