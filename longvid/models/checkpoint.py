"""What the engine asks of a checkpoint, whatever its family: the parts that ranks load, each its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from longvid.cache.runtime import CacheRuntime
from longvid.models.configs import Configs
from longvid.models.parts import ModelPart
from longvid.models.weights import Loading
from longvid.parallel.collectives import Group
from longvid.parallel.sequence import SequenceAttention
from longvid.parallel.stage import Stage
from longvid.plan import ModelFacts
from longvid.sampler import Sampler
from longvid.settings import SamplerSettings
from longvid.sparsity.runtime import SparseRuntime

Prompt = Any
"""A prompt as the family's encoder gives it and its stage takes it: a Tensor, or what has ``to`` as a Tensor has."""

Condition = Any
"""An image as the family's encoder gives it and its stage takes it.

It has ``to``, and ``show(latents, chunk)``: a chunk's finished latents as they are decoded.
"""


@dataclass(frozen=True)
class FilmInputs:
    """What a film is to follow. ``negatives`` go with the prompts one by one; there are none without guidance.

    ``images`` has one or None for every shot; ``prompts_a_chunk`` is how many prompts one chunk's latents attend at the
    most.
    """

    prompts: Sequence[Prompt]
    negatives: Sequence[Prompt] = ()
    images: Sequence[Condition | None] = ()
    prompts_a_chunk: int = 1
    fps: float = 1.0


class FamilyStage(Stage, Protocol):
    """Some layers of a family's transformer."""

    @property
    def branches(self) -> Sequence[int]:
        """Those that it runs: 0 follows the prompts, 1 the negatives."""
        ...

    def prepare(self, inputs: FilmInputs) -> None:
        """Take what the film to come is to follow."""
        ...


class PromptEncoder(Protocol):
    """Text to what a stage takes."""

    def encode(self, prompts: Sequence[str]) -> list[Prompt]:
        """Equal prompts share one value."""
        ...


class ImageEncoder(Protocol):
    """An image to what a stage takes."""

    def encode(self, path: Path, width: int, height: int) -> Condition:
        """The image stretched to the film's size in pixels. Raises InputError for a file that is no image."""
        ...


class StreamDecoder(Protocol):
    """Decodes a shot in pushes of any size."""

    vae: Any

    def reset(self) -> None:
        """Forget the shot."""
        ...

    def push(self, latents: Tensor, is_last: bool = False) -> Tensor:
        """The next latents fp32 [C, F, h, w], as the sampler left them; frames uint8 [T, H, W, 3] on the CPU.

        Frames may come later than their latents, but all have come with the shot's last ones.
        """
        ...

    def frames_after(self, num_latents: int) -> int:
        """Frames that so many latents of a shot have given, before the last ones."""
        ...

    def state(self) -> dict[str, Tensor]: ...

    def load_state(self, state: Mapping[str, Tensor]) -> None: ...


class RowsDecoder(StreamDecoder, Protocol):
    """One that can work in bands of rows, as that of the Wan family."""

    def split_rows(self, rows: int) -> None:
        """Decode so many rows of latents at a time, for memory."""
        ...


class SharedRowsDecoder(StreamDecoder, Protocol):
    """One whose rows can be dealt out to ranks, as that of the Wan family."""

    def share_rows(self, group: Group) -> None:
        """Decode together with the other members of a group from here on: all call `push` at the same time."""
        ...


class PartsDecoder(StreamDecoder, Protocol):
    """One whose layers can be dealt out to ranks in a line, as that of the Wan family on a CPU."""

    def take_part(self, index: int, count: int) -> None:
        """Have some of the layers alone from here on, one of so many parts; `hand_on` takes the place of `push`."""
        ...

    def hand_on(self, x: Tensor) -> Tensor:
        """What this part makes of latents, or of what the part before made of them; the last part's are frames."""
        ...

    def handed_shape(self, num_latents: int, height: int, width: int) -> tuple[Sequence[int], torch.dtype]:
        """Of what comes to a part that is not the first; of a shot's first latents it has fewer rows."""
        ...


@dataclass(frozen=True)
class StageOptions:
    """How a stage runs: which branches, over which ranks, with which policy of sparse attention, and which cache.

    `loading` says what becomes of its weights; a pipeline that is in memory has its own.
    ``embedded_guidance`` is what a guidance-distilled model is told; None: what its pipeline tells it.
    `vin` is the directory of an adapter whose global tokens its layers read. `linear` is `runtime.linear`.
    """

    branches: Sequence[int] = (0,)
    sequence: SequenceAttention | None = None
    attention: SparseRuntime | None = None
    cache: CacheRuntime | None = None
    loading: Loading | None = None
    embedded_guidance: float | None = None
    linear: str = "auto"

    def of(self, part: ModelPart) -> dict[str, Any]:
        """The options of a `LayerStage` of a part."""
        return {
            "branches": self.branches,
            "is_first": part.is_first,
            "is_last": part.is_last,
            "first_layer": part.layers.start,
            "sequence": self.sequence,
            "attention": self.attention,
            "cache": self.cache,
            "linear": self.linear,
        }

    vin: Path | None = None


class Checkpoint(Protocol):
    """An opened checkpoint: what every rank can share, for opening it costs little."""

    @property
    def facts(self) -> ModelFacts: ...

    @property
    def configs(self) -> Configs: ...

    @property
    def root(self) -> Path | None:
        """Its directory; None for a pipeline that is in memory alone."""
        ...

    @property
    def pipeline(self) -> Any:
        """The pipeline that it was taken from, if it is in memory."""
        ...

    def load_prompts(self, dtype: torch.dtype, device: torch.device) -> PromptEncoder: ...

    def load_decoder(self, dtype: torch.dtype, device: torch.device) -> StreamDecoder: ...

    def load_images(self, decoder: StreamDecoder, dtype: torch.dtype, device: torch.device) -> ImageEncoder | None:
        """None for a model that takes no images."""
        ...

    def load_stage(
        self, part: ModelPart, dtype: torch.dtype, device: torch.device, options: StageOptions
    ) -> FamilyStage:
        """A part of the transformer: no tensor of another part is read."""
        ...

    @property
    def boundary(self) -> float:
        """The timestep below which a second expert runs; 0 where there is one alone."""
        ...

    def blank_inputs(self, device: torch.device, size: tuple[int, int]) -> FilmInputs:
        """A prompt of usual length, and an image where there must be one, that show nothing: for measuring.

        They are for a film of so many pixels (width, height) and a single shot.
        """
        ...

    def make_sampler(self, settings: SamplerSettings, num_tokens: int) -> Sampler:
        """Noise levels and solvers; `num_tokens` is how many are denoised together at the most."""
        ...
