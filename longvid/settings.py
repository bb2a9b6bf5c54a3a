"""Settings: everything about a render that is not the story. Read from presets and `--set`, validated once, frozen."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from importlib.resources import files
from os.path import expanduser
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationInfo, field_validator
from pydantic_core import PydanticCustomError

from longvid.cache.settings import CacheSettings, NoCache
from longvid.document import Document, Section, nearest, parse_document, parse_scalar, read_document, validate
from longvid.errors import InputError
from longvid.sparsity.settings import AttentionSettings, Dense


class LoraSettings(Section):
    """One LoRA: a safetensors file, how much of it counts, and which of two experts it is for."""

    path: Annotated[str, Field(min_length=1)]
    weight: Annotated[float, Field(ge=-100, le=100)] = 1.0
    expert: Literal["both", "high", "low"] = "both"


class ModelSettings(Section):
    """Which model: `mini`, the directory of a diffusers pipeline, or its id on the Hub, OWNER/NAME@REVISION.

    And the LoRAs that change its transformer.
    """

    path: Annotated[str, Field(min_length=1)] = "mini"
    lora: list[LoraSettings] = Field(default_factory=list)


LARGE_ENCODER_BYTES = 256 << 20
"""Of a text encoder that `auto` frees."""


class MemorySettings(Section):
    """What is held, where, and in how many bits.

    `text_encoder`: `keep` it loaded, or `free` it once the prompts are encoded and keep their embeddings on disk, in
    `prompt_cache` (None: the user's cache folder). `offload`: layers wait in host memory, or in the checkpoint's files,
    and come to the device in groups of `group`, ahead of use; or the ranks of `mesh.seq` keep a part of each weight,
    and DeepSpeed gathers a group when it is called (`zero`). `quantize`: the weights of layers in 8 bits, with `w8a8`
    their inputs, too. `vae_rows`: rows of a latent that the VAE decodes at a time (0: all).
    """

    text_encoder: Literal["auto", "keep", "free"] = "auto"
    prompt_cache: Annotated[str, Field(min_length=1)] | None = None
    offload: Literal["none", "host", "disk", "zero"] = "none"
    group: Annotated[int, Field(ge=1, le=1024)] = 1
    quantize: Literal["none", "int8", "fp8", "w8a8"] = "none"
    vae_rows: Annotated[int, Field(ge=0, le=4096)] = 0

    def frees_encoder(self, num_bytes: int) -> bool:
        """Whether a text encoder of so many bytes goes once the prompts are encoded."""
        return self.text_encoder == "free" or (self.text_encoder == "auto" and num_bytes > LARGE_ENCODER_BYTES)


class SamplerSettings(Section):
    """How noise becomes latents. `auto` and None mean what the checkpoint's own scheduler says."""

    solver: Literal["auto", "euler", "unipc"] = "auto"
    steps: Annotated[int, Field(ge=1, le=1000)] = 8
    shift: Annotated[float, Field(gt=0, le=100)] | None = None
    guidance: Annotated[float, Field(ge=0, le=100)] = 1.0
    guidance_low: Annotated[float, Field(ge=0, le=100)] | None = None
    """With two experts, that of the one for low noise; None: the same."""
    embedded_guidance: Annotated[float, Field(ge=0, le=100)] | None = None
    """What a guidance-distilled model is told, beside the guidance by a second pass; None: as its pipeline does."""

    @property
    def num_branches(self) -> int:
        """Passes a step: one follows the prompts; with guidance, another the negatives."""
        return 1 if self.guidance == 1.0 and self.guidance_low in (None, 1.0) else 2


class QueueSettings(Section):
    """The queue schedule: latents a chunk owns, latents it sees of each neighbour, and at which noise level."""

    chunk_latents: Annotated[int, Field(ge=1, le=1024)] = 6
    context_latents: Annotated[int, Field(ge=0, le=1024)] = 2
    left: Literal["recompute", "cached"] = "recompute"
    left_level: Literal["same", "fresher"] = "fresher"
    gap: Annotated[int, Field(ge=1, le=1000)] = 1
    noise: Literal["coordinated", "independent"] = "coordinated"

    @field_validator("context_latents")
    @classmethod
    def _context_fits_a_chunk(cls, context: int, info: ValidationInfo) -> int:
        chunk = info.data.get("chunk_latents", context)
        if context > chunk:
            raise PydanticCustomError(
                "too_much_beside",
                "must be at most chunk_latents ({chunk}), not {context}",
                {"chunk": chunk, "context": context, "beside": "chunk_latents"},
            )
        return context


class ChunksSettings(Section):
    """The chunk schedule: `group` chunks at most are denoised side by side, all at one step.

    What two neighbours predict for the latents that both see is fused in the first `fuse` of the steps. Sizes, context
    and noise of the chunks are those of `queue`.
    """

    group: Annotated[int, Field(ge=1, le=65536)] = 64
    fuse: Annotated[float, Field(ge=0, le=1)] = 0.4


Axis = Annotated[int, Field(ge=1, le=65536)] | Literal["auto"]


class MeshSettings(Section):
    """How ranks are spread: films x layers x chunks x guidance branches x tokens. `auto` decides by the film.

    `ring` is the part of `seq` that passes K/V around in a ring; the rest exchanges heads (Ulysses). `buffers` is how
    many messages a rank may have under way to another, `films` how many films go through the stages side by side.
    `decode` says who decodes: the stages, as much as suits their layers, and owners of chunks, each some of the
    decoder's layers; owners of chunks by the rows of latents; or the leader alone. With `shares_memory` CPU ranks of
    one machine give each other messages through memory, otherwise through the network like all others.
    """

    replica: Axis = "auto"
    stage: Axis = "auto"
    chunk: Axis = "auto"
    guidance: Axis = "auto"
    seq: Axis = "auto"
    ring: Annotated[int, Field(ge=1, le=1024)] = 1
    buffers: Annotated[int, Field(ge=1, le=64)] = 2
    films: Annotated[int, Field(ge=1, le=4096)] | Literal["auto"] = "auto"
    decode: Literal["stages", "rows", "leader"] = "stages"
    shares_memory: bool = True


SequenceBackend = Literal["longvid", "deepspeed", "xfuser"]


class SequenceSettings(Section):
    """Whose code spreads a unit's tokens over `mesh.seq`: ours, DeepSpeed-Ulysses (no ring), or xfuser's USP (CUDA)."""

    backend: SequenceBackend = "longvid"


class VinSettings(Section):
    """Global tokens that tie far chunks together. `path` is the adapter's directory; None: the model's own.

    Of a shot's finished chunks `memory` are read beside its first: the one before those in flight, then one of the 2
    before that, of the 4 before those, and so on.
    """

    policy: Literal["none", "on"] = "none"
    path: Annotated[str, Field(min_length=1)] | None = None
    memory: Annotated[int, Field(ge=0, le=16)] = 4


class OutputSettings(Section):
    """The film's file: codec, quality, integer upscaling, seconds a segment; whether the working directory stays."""

    codec: Literal["h264"] = "h264"
    crf: Annotated[int, Field(ge=0, le=51)] = 18
    scale: Annotated[int, Field(ge=1, le=16)] = 1
    segment_s: Annotated[float, Field(ge=0.1, le=60)] = 2.0
    keep_state: bool = False


class RuntimeSettings(Section):
    """The machine: device, the dtype of weights and activations, and threads a rank (0: torch decides).

    `linear` says who computes the layers' linear layers: by the matrix units of an x86 processor, where it has them
    (`auto`), or `torch`.

    `timeout_s` is how long one rank may wait for another. Every `checkpoint_s` seconds the state of a render is saved.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    linear: Literal["auto", "torch"] = "auto"
    threads: Annotated[int, Field(ge=0, le=1024)] = 0
    timeout_s: Annotated[float, Field(gt=0, le=86400)] = 600.0
    checkpoint_s: Annotated[float, Field(ge=0, le=1e9)] = 30.0


class Settings(Section):
    """All settings of a render, section by section."""

    model: ModelSettings = ModelSettings()
    sampler: SamplerSettings = SamplerSettings()
    schedule: Literal["queue", "chunks", "sequential"] = "queue"
    queue: QueueSettings = QueueSettings()
    chunks: ChunksSettings = ChunksSettings()
    mesh: MeshSettings = MeshSettings()
    sequence: SequenceSettings = SequenceSettings()
    attention: AttentionSettings = Dense()
    cache: CacheSettings = NoCache()
    memory: MemorySettings = MemorySettings()
    vin: VinSettings = VinSettings()
    output: OutputSettings = OutputSettings()
    runtime: RuntimeSettings = RuntimeSettings()

    @property
    def recomputes_left(self) -> bool:
        """Whether left context enters as tokens: chunks at one step have no K/V of each other."""
        return self.queue.left == "recompute" or self.schedule == "chunks"


def with_whole_paths(settings: Settings) -> Settings:
    """The same from any folder: files that settings name are absolute. The model is left: it need be none."""

    def whole(section: Any, *names: str) -> Any:
        paths = {name: path for name in names if (path := getattr(section, name, None)) is not None}
        return section.model_copy(update={name: str(Path(expanduser(path)).absolute()) for name, path in paths.items()})

    sections = {
        "model": settings.model.model_copy(update={"lora": [whole(lora, "path") for lora in settings.model.lora]}),
        "attention": whole(settings.attention, "profile"),
        "cache": whole(settings.cache, "table"),
        "memory": whole(settings.memory, "prompt_cache"),
        "vin": whole(settings.vin, "path"),
    }
    return settings.model_copy(update=sections)


def load_settings(
    preset: str | None = None, overrides: Sequence[str] = (), values: Mapping[str, Any] | None = None
) -> Settings:
    """Settings from a preset (a name, or a YAML file's path; None: the defaults) and overrides like `sampler.steps=4`.

    `values`, as `model_dump` gives them, are in a preset's place. Raises InputError that names the preset's file and
    line, or the override.
    """
    document = Document("settings", dict(values or {})) if preset is None else _read_preset(preset)
    for override in overrides:
        keys, equals, value = override.partition("=")
        option = f"--set {override}"
        if not equals or not all(keys.split(".")):
            raise InputError(f"{option}: must look like section.key=value")
        document.set(tuple(keys.split(".")), _parse_value(value, option), option)
    return validate(Settings, document)


def text_override(key: str, text: str) -> str:
    """The override that sets a key to this text, also where YAML would take it for a number or a list."""
    is_plain = not text.startswith(("[", '"')) and parse_scalar(text) == text
    return f"{key}={text}" if is_plain else f"{key}={json.dumps(text, ensure_ascii=False)}"


def _parse_value(text: str, option: str) -> Any:
    return parse_document(text.encode(), option).data if text.startswith(("[", '"')) else parse_scalar(text)


def preset_names() -> list[str]:
    """The presets that come with longvid."""
    return sorted(
        file.name.removesuffix(".yaml") for file in files("longvid.configs").iterdir() if file.name.endswith(".yaml")
    )


def _read_preset(preset: str) -> Document:
    if preset in preset_names():
        resource = files("longvid.configs") / f"{preset}.yaml"
        document = parse_document(resource.read_bytes(), f"{preset}.yaml")
    elif "/" in preset or preset.endswith((".yaml", ".yml")):
        document = read_document(Path(preset))
    else:
        raise InputError(f"--preset {preset}: no such preset, {nearest(preset, preset_names())}")
    if document.data is None:  # comments alone
        return Document(document.name, {})
    if not isinstance(document.data, dict):
        raise InputError(f"{document.place(())}: must be a mapping of sections")
    return document
