"""Puts trained parts together as a stock diffusers WanPipeline directory."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from longvid.models.configs import FACTS_FILE
from longvid.training import world


def export_pipeline(
    folder: Path,
    *,
    vae: AutoencoderKLWan,
    dit: WanTransformer3DModel,
    encoder: UMT5EncoderModel,
    tokenizer: PreTrainedTokenizerFast,
    shift: float,
    side: int,
) -> None:
    """Save the parts in bfloat16 safetensors, with the facts that planning needs beside them."""
    parts = [part.to(torch.bfloat16) for part in (encoder, vae, dit)]
    scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    pipeline = WanPipeline(tokenizer, parts[0], parts[1], scheduler, parts[2])
    pipeline.save_pretrained(folder, safe_serialization=True)
    facts = {
        "fps": world.FPS,
        "width": side,
        "height": side,
        "per_token_timesteps": True,
        "vocabulary": sorted(set(world.vocabulary()) - {",", "."}),
    }
    (folder / FACTS_FILE).write_text(json.dumps(facts, indent=1) + "\n")
