"""HunyuanVideo checkpoints, opened: two text encoders, VAE, and a transformer of two kinds of layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKLHunyuanVideo, FlowMatchEulerDiscreteScheduler, HunyuanVideoTransformer3DModel
from diffusers.pipelines.hunyuan_video.pipeline_hunyuan_video import DEFAULT_PROMPT_TEMPLATE
from torch import nn
from transformers import CLIPTextModel, LlamaModel

from longvid.errors import InputError
from longvid.models.checkpoint import FilmInputs, StageOptions
from longvid.models.configs import Configs
from longvid.models.hunyuan import HunyuanPrompt, HunyuanStage
from longvid.models.hunyuan_facts import HUNYUAN_PARTS
from longvid.models.hunyuan_sizes import TEXT_COLUMNS
from longvid.models.hunyuan_vae import HunyuanStreamDecoder
from longvid.models.opened import OpenedCheckpoint, open_scheduler
from longvid.models.parts import ModelPart
from longvid.models.weights import errors_name, load_part, load_text, load_vae, take_layers
from longvid.plan import ModelFacts
from longvid.sampler import EulerSampler, Sampler
from longvid.settings import SamplerSettings

GUIDANCE = 6.0
"""The embedded guidance of the stock pipeline."""
MAX_TOKENS, MAX_POOLED_TOKENS = 256, 77
"""Tokens of a prompt that each text encoder takes."""
SKIPPED_LAYERS = 2
"""Of the first text encoder: its last layers, whose output is not used."""


def open_family(configs: Configs, facts: ModelFacts, pipeline: Any = None) -> HunyuanCheckpoint:
    """Check a HunyuanVideo directory, or take a loaded pipeline. Raises InputError."""
    if pipeline is not None:
        dit = pipeline.transformer
        layers = (dit.transformer_blocks, dit.single_transformer_blocks)
        return HunyuanCheckpoint(configs, facts, pipeline.scheduler, pipeline, layers)
    scheduler = open_scheduler(configs, "HunyuanVideo", ["text_encoder", "text_encoder_2", "vae", "transformer"])
    return HunyuanCheckpoint(configs, facts, scheduler)


class HunyuanCheckpoint(OpenedCheckpoint[tuple[nn.ModuleList, nn.ModuleList]]):
    """Of HunyuanVideo; `layers` are all dual and all single ones."""

    def load_prompts(self, dtype: torch.dtype, device: torch.device) -> HunyuanPrompts:
        pipe = self.pipeline
        if pipe is not None:
            return HunyuanPrompts(pipe.tokenizer, pipe.text_encoder, pipe.tokenizer_2, pipe.text_encoder_2)
        assert self.root is not None
        with errors_name(self.root, "HunyuanVideo"):
            first = load_text(LlamaModel, self.root, dtype, device)
            second = load_text(CLIPTextModel, self.root, dtype, device, "_2")
            return HunyuanPrompts(*first, *second)

    def load_decoder(self, dtype: torch.dtype, device: torch.device) -> HunyuanStreamDecoder:
        """With the VAE in fp32 on a CPU; films beyond 256 pixels are decoded in tiles, as the model's makers advise."""
        if self.pipeline is not None:
            return HunyuanStreamDecoder(self.pipeline.vae)
        assert self.root is not None
        with errors_name(self.root, "HunyuanVideo"):
            vae = load_vae(AutoencoderKLHunyuanVideo, self.root, dtype, device)
            vae.enable_tiling()
            return HunyuanStreamDecoder(vae)

    def load_stage(
        self, part: ModelPart, dtype: torch.dtype, device: torch.device, options: StageOptions
    ) -> HunyuanStage:
        guidance = GUIDANCE if options.embedded_guidance is None else options.embedded_guidance
        if self.pipeline is not None:
            assert self.layers is not None
            dit, (dual, single) = self.pipeline.transformer, self.layers
            dit.transformer_blocks = take_layers(part, dual)
            dit.single_transformer_blocks = take_layers(part, single, len(dual))
            return HunyuanStage(dit, guidance=guidance, **options.of(part))
        assert self.root is not None
        with errors_name(self.root, "HunyuanVideo"):
            folder = self.root / "transformer"
            dit = load_part(HunyuanVideoTransformer3DModel, folder, part, HUNYUAN_PARTS, dtype, device, options.loading)
            return HunyuanStage(dit, guidance=guidance, **options.of(part))

    def blank_inputs(self, device: torch.device, size: tuple[int, int]) -> FilmInputs:
        config = self.configs.of("transformer")
        states = torch.zeros(TEXT_COLUMNS, config["text_embed_dim"], device=device)
        return FilmInputs([HunyuanPrompt(states, torch.zeros(config["pooled_projection_dim"], device=device))])

    def make_sampler(self, settings: SamplerSettings, num_tokens: int) -> Sampler:
        """Euler on the stock noise levels. Raises InputError for another scheduler, and another solver."""
        if not isinstance(self.scheduler, FlowMatchEulerDiscreteScheduler):
            name = type(self.scheduler).__name__
            raise InputError(f"model: its scheduler {name} is not the flow-matching Euler of HunyuanVideo")
        if settings.solver == "unipc":
            raise InputError("sampler.solver must be auto or euler, not unipc: HunyuanVideo's noise levels are Euler's")
        shift = {} if settings.shift is None else {"shift": settings.shift}
        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config, **shift)
        scheduler.set_timesteps(sigmas=np.linspace(1.0, 0.0, settings.steps + 1)[:-1])
        return EulerSampler(tuple(float(sigma) for sigma in scheduler.sigmas), scheduler.config.num_train_timesteps)


@dataclass(frozen=True)
class HunyuanPrompts:
    """Two tokenizers and their encoders: a language model's states of each token, and CLIP's one vector."""

    tokenizer: Any
    encoder: Any
    pooled_tokenizer: Any
    pooled_encoder: Any

    def __post_init__(self) -> None:
        if self.tokenizer.padding_side != "right":
            raise InputError("tokenizer: padding_side must be right, as HunyuanVideo's masks take it to be")

    @torch.no_grad()
    def encode(self, prompts: Sequence[str]) -> list[HunyuanPrompt]:
        """Equal prompts share one value."""
        known = {prompt: HunyuanPrompt(self._states(prompt), self._pooled(prompt)) for prompt in dict.fromkeys(prompts)}
        return [known[prompt] for prompt in prompts]

    def _states(self, prompt: str) -> torch.Tensor:
        """States of a prompt in the stock template, whose first tokens are cut off again. Padding is left out."""
        template, crop = DEFAULT_PROMPT_TEMPLATE["template"], DEFAULT_PROMPT_TEMPLATE["crop_start"]
        options = {"padding": "max_length", "max_length": MAX_TOKENS + crop, "truncation": True}
        batch = self.tokenizer(template.format(prompt), return_tensors="pt", **options).to(self.encoder.device)
        found = self.encoder(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask, output_hidden_states=True
        ).hidden_states[-(SKIPPED_LAYERS + 1)]
        states: torch.Tensor = found[0, crop:][batch.attention_mask[0, crop:].bool()]
        if not len(states):
            raise InputError(f"tokenizer: makes fewer than {crop} tokens of HunyuanVideo's template: it is not its own")
        return states

    def _pooled(self, prompt: str) -> torch.Tensor:
        options = {"padding": "max_length", "max_length": MAX_POOLED_TOKENS, "truncation": True}
        ids = self.pooled_tokenizer(prompt, return_tensors="pt", **options).input_ids
        pooled: torch.Tensor = self.pooled_encoder(ids.to(self.pooled_encoder.device)).pooler_output[0]
        return pooled
