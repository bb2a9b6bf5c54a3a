"""Wan checkpoints, opened: text encoder, VAE, one transformer or two experts, and what makes use of an image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from torch import Tensor, nn
from transformers import AutoImageProcessor, CLIPVisionModel, UMT5EncoderModel

from longvid.models.checkpoint import FamilyStage, FilmInputs, StageOptions, StreamDecoder
from longvid.models.configs import Configs
from longvid.models.parts import ModelPart
from longvid.models.prompts import encode_prompts
from longvid.models.solvers import make_sampler
from longvid.models.vin import Vin
from longvid.models.wan import WanStage
from longvid.models.wan_experts import WanExpertsStage
from longvid.models.wan_facts import WAN_PARTS
from longvid.models.wan_image import ImageCondition, WanImageEncoder, WanImageStage
from longvid.models.wan_vae import WanStreamDecoder
from longvid.models.weights import (
    Loading,
    check_weights,
    errors_name,
    load_part,
    load_scheduler,
    load_text,
    load_vae,
    take_layers,
)
from longvid.plan import ModelFacts
from longvid.sampler import Sampler
from longvid.settings import SamplerSettings


def open_family(configs: Configs, facts: ModelFacts, pipeline: Any = None) -> WanCheckpoint:
    """Check a Wan directory, or take a loaded pipeline. Raises InputError."""
    if pipeline is not None:
        blocks = {name: getattr(pipeline, name).blocks for name in _transformers(configs)}
        return WanCheckpoint(configs, facts, pipeline.scheduler, pipeline, blocks)
    assert configs.root is not None
    images = [name for name in ("image_encoder",) if configs.has(name)]
    check_weights(configs.root, ["text_encoder", "vae", *_transformers(configs), *images])
    with errors_name(configs.root, "Wan"):
        return WanCheckpoint(configs, facts, load_scheduler(configs))


def _transformers(configs: Configs) -> list[str]:
    return [name for name in ("transformer", "transformer_2") if configs.has(name)]


@dataclass(frozen=True)
class WanCheckpoint:
    """The parts of one Wan checkpoint that every rank can share: what opening it costs little."""

    configs: Configs
    facts: ModelFacts
    scheduler: Any
    pipeline: Any = None
    """Where the parts come from instead of ``root``, for a pipeline that is already loaded."""
    blocks: dict[str, nn.ModuleList] | None = None
    """All layers of its transformers."""

    @property
    def root(self) -> Path | None:
        return self.configs.root

    def load_text(self, dtype: torch.dtype, device: torch.device) -> tuple[Any, Any]:
        """Tokenizer and text encoder."""
        if self.pipeline is not None:
            return self.pipeline.tokenizer, self.pipeline.text_encoder
        assert self.root is not None
        with errors_name(self.root, "Wan"):
            return load_text(UMT5EncoderModel, self.root, dtype, device)

    def load_prompts(self, dtype: torch.dtype, device: torch.device) -> WanPrompts:
        return WanPrompts(*self.load_text(dtype, device))

    def load_vae(self, dtype: torch.dtype, device: torch.device) -> AutoencoderKLWan:
        """The VAE, in fp32 on a CPU."""
        if self.pipeline is not None:
            return self.pipeline.vae
        assert self.root is not None
        with errors_name(self.root, "Wan"):
            vae: AutoencoderKLWan = load_vae(AutoencoderKLWan, self.root, dtype, device)
            return vae

    def load_decoder(self, dtype: torch.dtype, device: torch.device) -> WanStreamDecoder:
        return WanStreamDecoder(self.load_vae(dtype, device))

    def load_images(self, decoder: StreamDecoder, dtype: torch.dtype, device: torch.device) -> WanImageEncoder | None:
        if self.facts.image == "none":
            return None
        replaces = self._replaces_first_latent
        if self.configs.of("transformer").get("image_dim") is None:
            return WanImageEncoder(decoder.vae, first_alone=replaces)
        if self.pipeline is not None:
            return WanImageEncoder(decoder.vae, self.pipeline.image_processor, self.pipeline.image_encoder)
        assert self.root is not None
        with errors_name(self.root, "Wan"):
            encoder = CLIPVisionModel.from_pretrained(self.root / "image_encoder", dtype=dtype, use_safetensors=True)
            processor = AutoImageProcessor.from_pretrained(self.root / "image_processor")
            return WanImageEncoder(decoder.vae, processor, encoder.eval().to(device))

    @property
    def _replaces_first_latent(self) -> bool:
        return bool(self.configs.index.get("expand_timesteps"))

    def load_layers(
        self,
        part: ModelPart,
        dtype: torch.dtype,
        device: torch.device,
        name: str = "transformer",
        loading: Loading | None = None,
    ) -> WanTransformer3DModel:
        """A transformer with some of its layers: no tensor of another part is read."""
        if self.pipeline is not None:
            assert self.blocks is not None
            dit = getattr(self.pipeline, name)
            dit.blocks = take_layers(part, self.blocks[name])
            return dit
        assert self.root is not None
        with errors_name(self.root, "Wan"):
            return load_part(WanTransformer3DModel, self.root / name, part, WAN_PARTS, dtype, device, loading)

    def load_stage(
        self, part: ModelPart, dtype: torch.dtype, device: torch.device, options: StageOptions
    ) -> FamilyStage:
        vin = Vin.load(options.vin, part.layers, encodes=part.is_first) if options.vin else None

        def stage(name: str) -> WanStage:
            dit = self.load_layers(part, dtype, device, name, options.loading)
            kind = WanStage if self.facts.image == "none" else WanImageStage
            adapter = vin.to(device, dtype) if vin else None
            return kind(dit, vin=adapter, **options.of(part))

        if self.facts.boundary_ratio is None:
            return stage("transformer")
        return WanExpertsStage(stage("transformer"), stage("transformer_2"), self.boundary)

    @property
    def boundary(self) -> float:
        return float((self.facts.boundary_ratio or 0.0) * self.scheduler.config.num_train_timesteps)

    def blank_inputs(self, device: torch.device, size: tuple[int, int]) -> FilmInputs:
        config, facts = self.configs.of("transformer"), self.facts
        prompt = torch.zeros(16, config["text_dim"], device=device)
        if facts.image != "required":
            return FilmInputs([prompt], images=[None])
        width, height = facts.grid.latent_size(*size)
        latents = torch.zeros(facts.latent_channels, 1, height, width, device=device)
        states = torch.zeros(257, config["image_dim"], device=device) if config.get("image_dim") else None
        image = ImageCondition(latents, self._replaces_first_latent, facts.grid.temporal, states)
        return FilmInputs([prompt], images=[image])

    def make_sampler(self, settings: SamplerSettings, num_tokens: int) -> Sampler:
        return make_sampler(self.scheduler, settings)


@dataclass(frozen=True)
class WanPrompts:
    """Tokenizer and text encoder of a Wan checkpoint."""

    tokenizer: Any
    encoder: Any

    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        return encode_prompts(self.tokenizer, self.encoder, prompts)
