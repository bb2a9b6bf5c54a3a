"""LTX-Video checkpoints, opened."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXVideoTransformer3DModel
from diffusers.pipelines.ltx.pipeline_ltx import calculate_shift
from torch import Tensor, nn
from transformers import T5EncoderModel

from longvid.errors import InputError
from longvid.models.checkpoint import FilmInputs, StageOptions
from longvid.models.configs import Configs
from longvid.models.ltx import LtxStage
from longvid.models.ltx_facts import LTX_PARTS
from longvid.models.ltx_sizes import TEXT_COLUMNS
from longvid.models.ltx_vae import LtxStreamDecoder
from longvid.models.opened import OpenedCheckpoint, open_scheduler
from longvid.models.parts import ModelPart
from longvid.models.weights import errors_name, load_part, load_text, load_vae, take_layers
from longvid.plan import ModelFacts
from longvid.sampler import EulerSampler, Sampler
from longvid.settings import SamplerSettings

MAX_TOKENS = 128
"""Tokens of a prompt, and the length that the stock pipeline pads to."""


def open_family(configs: Configs, facts: ModelFacts, pipeline: Any = None) -> LtxCheckpoint:
    """Check an LTX-Video directory, or take a loaded pipeline. Raises InputError."""
    if pipeline is not None:
        return LtxCheckpoint(configs, facts, pipeline.scheduler, pipeline, pipeline.transformer.transformer_blocks)
    scheduler = open_scheduler(configs, "LTX-Video", ["text_encoder", "vae", "transformer"])
    return LtxCheckpoint(configs, facts, scheduler)


class LtxCheckpoint(OpenedCheckpoint[nn.ModuleList]):
    """Of LTX-Video."""

    def load_prompts(self, dtype: torch.dtype, device: torch.device) -> LtxPrompts:
        if self.pipeline is not None:
            return LtxPrompts(self.pipeline.tokenizer, self.pipeline.text_encoder)
        assert self.root is not None
        with errors_name(self.root, "LTX-Video"):
            return LtxPrompts(*load_text(T5EncoderModel, self.root, dtype, device))

    def load_decoder(self, dtype: torch.dtype, device: torch.device) -> LtxStreamDecoder:
        """With the VAE in fp32 on a CPU."""
        if self.pipeline is not None:
            return LtxStreamDecoder(self.pipeline.vae)
        assert self.root is not None
        with errors_name(self.root, "LTX-Video"):
            return LtxStreamDecoder(load_vae(AutoencoderKLLTXVideo, self.root, dtype, device))

    def load_stage(self, part: ModelPart, dtype: torch.dtype, device: torch.device, options: StageOptions) -> LtxStage:
        if self.pipeline is not None:
            assert self.layers is not None
            dit = self.pipeline.transformer
            dit.transformer_blocks = take_layers(part, self.layers)
        else:
            assert self.root is not None
            with errors_name(self.root, "LTX-Video"):
                folder, loading = self.root / "transformer", options.loading
                dit = load_part(LTXVideoTransformer3DModel, folder, part, LTX_PARTS, dtype, device, loading)
        grid = self.facts.grid
        return LtxStage(dit, compression=(grid.temporal, grid.spatial), **options.of(part))

    def blank_inputs(self, device: torch.device, size: tuple[int, int]) -> FilmInputs:
        width = self.configs.of("transformer")["caption_channels"]
        return FilmInputs([torch.zeros(TEXT_COLUMNS, width, device=device)], fps=self.facts.fps)

    def make_sampler(self, settings: SamplerSettings, num_tokens: int) -> Sampler:
        """Euler on the stock noise levels, which may depend on the tokens that are denoised together."""
        scheduler = self.scheduler
        if not isinstance(scheduler, FlowMatchEulerDiscreteScheduler):
            raise InputError(
                f"model: its scheduler {type(scheduler).__name__} is not the flow-matching Euler of LTX-Video"
            )
        if settings.solver == "unipc":
            raise InputError("sampler.solver must be auto or euler, not unipc: LTX-Video's noise levels are Euler's")
        config = scheduler.config
        sizes = config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096)
        shifts = config.get("base_shift", 0.5), config.get("max_shift", 1.15)
        mu = calculate_shift(num_tokens, *sizes, *shifts)
        if settings.shift is not None:
            mu = math.log(settings.shift)
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(config, shift=settings.shift)
        else:
            scheduler = FlowMatchEulerDiscreteScheduler.from_config(config)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 1 / settings.steps, settings.steps), mu=mu)
        return EulerSampler(tuple(float(sigma) for sigma in scheduler.sigmas), config.num_train_timesteps)


@dataclass(frozen=True)
class LtxPrompts:
    """Tokenizer and T5. As in the stock pipeline the encoder sees the padding, and the transformer does not."""

    tokenizer: Any
    encoder: Any

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[Tensor]:
        """Text states [n, width] of each prompt, n its tokens; equal prompts share one tensor."""
        known: dict[str, Tensor] = {}
        for prompt in prompts:
            if prompt not in known:
                options = {"padding": "max_length", "max_length": MAX_TOKENS, "truncation": True}
                batch = self.tokenizer(prompt, return_tensors="pt", **options)
                states = self.encoder(batch.input_ids.to(self.encoder.device))[0][0]
                known[prompt] = states[batch.attention_mask[0].bool().to(states.device)]
        return [known[prompt] for prompt in prompts]
