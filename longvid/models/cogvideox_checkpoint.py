"""CogVideoX checkpoints, opened."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import AutoencoderKLCogVideoX, CogVideoXTransformer3DModel
from torch import Tensor, nn
from transformers import T5EncoderModel

from longvid.models.checkpoint import FilmInputs, StageOptions
from longvid.models.cogvideox import CogVideoXStage
from longvid.models.cogvideox_facts import COGVIDEOX_PARTS
from longvid.models.cogvideox_solvers import CogVideoXSampler
from longvid.models.cogvideox_vae import CogVideoXStreamDecoder
from longvid.models.configs import Configs
from longvid.models.opened import OpenedCheckpoint, open_scheduler
from longvid.models.parts import ModelPart
from longvid.models.weights import errors_name, load_part, load_text, load_vae, take_layers
from longvid.plan import ModelFacts
from longvid.sampler import Sampler
from longvid.settings import SamplerSettings


def open_family(configs: Configs, facts: ModelFacts, pipeline: Any = None) -> CogVideoXCheckpoint:
    """Check a CogVideoX directory, or take a loaded pipeline. Raises InputError."""
    if pipeline is not None:
        layers = pipeline.transformer.transformer_blocks
        return CogVideoXCheckpoint(configs, facts, pipeline.scheduler, pipeline, layers)
    scheduler = open_scheduler(configs, "CogVideoX", ["text_encoder", "vae", "transformer"])
    return CogVideoXCheckpoint(configs, facts, scheduler)


class CogVideoXCheckpoint(OpenedCheckpoint[nn.ModuleList]):
    """Of CogVideoX."""

    @property
    def _together(self) -> int:
        return self.configs.of("transformer").get("patch_size_t") or 1

    @property
    def _text_tokens(self) -> int:
        return int(self.configs.of("transformer")["max_text_seq_length"])

    def load_prompts(self, dtype: torch.dtype, device: torch.device) -> CogVideoXPrompts:
        if self.pipeline is not None:
            return CogVideoXPrompts(self.pipeline.tokenizer, self.pipeline.text_encoder, self._text_tokens)
        assert self.root is not None
        with errors_name(self.root, "CogVideoX"):
            return CogVideoXPrompts(*load_text(T5EncoderModel, self.root, dtype, device), self._text_tokens)

    def load_decoder(self, dtype: torch.dtype, device: torch.device) -> CogVideoXStreamDecoder:
        """With the VAE in fp32 on a CPU."""
        if self.pipeline is not None:
            return CogVideoXStreamDecoder(self.pipeline.vae, self._together)
        assert self.root is not None
        with errors_name(self.root, "CogVideoX"):
            vae = load_vae(AutoencoderKLCogVideoX, self.root, dtype, device)
            return CogVideoXStreamDecoder(vae, self._together)

    def load_stage(
        self, part: ModelPart, dtype: torch.dtype, device: torch.device, options: StageOptions
    ) -> CogVideoXStage:
        if self.pipeline is not None:
            assert self.layers is not None
            dit = self.pipeline.transformer
            dit.transformer_blocks = take_layers(part, self.layers)
            return CogVideoXStage(dit, **options.of(part))
        assert self.root is not None
        with errors_name(self.root, "CogVideoX"):
            folder, loading = self.root / "transformer", options.loading
            dit = load_part(CogVideoXTransformer3DModel, folder, part, COGVIDEOX_PARTS, dtype, device, loading)
            return CogVideoXStage(dit, **options.of(part))

    def blank_inputs(self, device: torch.device, size: tuple[int, int]) -> FilmInputs:
        width = self.configs.of("transformer")["text_embed_dim"]
        return FilmInputs([torch.zeros(self._text_tokens, width, device=device)])

    def make_sampler(self, settings: SamplerSettings, num_tokens: int) -> Sampler:
        return CogVideoXSampler(self.scheduler, settings, self._together)


@dataclass(frozen=True)
class CogVideoXPrompts:
    """Tokenizer and T5. As in the stock pipeline, prompts are padded to `num_tokens`, and padding is not masked."""

    tokenizer: Any
    encoder: Any
    num_tokens: int

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text states [num_tokens, width] of each prompt; equal prompts share one tensor."""
        known: dict[str, Tensor] = {}
        for prompt in prompts:
            if prompt not in known:
                options = {"padding": "max_length", "max_length": self.num_tokens, "truncation": True}
                ids = self.tokenizer(prompt, return_tensors="pt", **options).input_ids
                known[prompt] = self.encoder(ids.to(self.encoder.device))[0][0]
        return [known[prompt] for prompt in prompts]
