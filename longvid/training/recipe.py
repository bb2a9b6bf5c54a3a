"""``longvid train``: the whole recipe of the embedded model, in resumable parts of one folder.

``vae`` makes FOLDER/vae; ``dit`` makes, one after the other and each only if it is not there yet,
FOLDER/text_encoder, FOLDER/latents, FOLDER/dit and at last FOLDER/pipeline, which any part of the
engine and stock diffusers load.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import AutoencoderKLWan
from transformers import UMT5EncoderModel

from longvid.errors import InputError
from longvid.training.export import export_pipeline
from longvid.training.latents import encode_world, load_latents
from longvid.training.loop import LoopSettings, OnLog
from longvid.training.text import AttributeReader, make_text_encoder, make_tokenizer, teach_text_encoder
from longvid.training.train_dit import DitSettings, World, train_dit
from longvid.training.vae import VaeSettings, compile_norms, train_vae

CLIP_FRAMES = 41
"""11 latents: a window of 10 fits at the start of a shot, and one latent later."""


@dataclass(frozen=True)
class DitRecipe:
    """What ``train dit`` adds to the loop: how much is encoded, and the sizes of the curriculum."""

    dit: DitSettings
    clips: int = 16384
    images: int = 24576
    text_steps: int = 400
    side: int = 64


def run_vae(folder: Path, settings: VaeSettings, on_log: OnLog) -> Path:
    """Train the VAE in ``folder``; returns the directory of the finished one."""
    if settings.decoder_only and not (folder / "vae" / "config.json").exists():
        raise InputError(f"{folder / 'vae'}: there is no trained VAE to refine")
    train_vae(folder, settings, on_log)
    return folder / "vae"


def run_dit(folder: Path, recipe: DitRecipe, on_log: OnLog) -> Path:
    """Train text encoder and DiT on the VAE in ``folder``; returns the finished pipeline's directory."""
    loop = recipe.dit.loop
    if not (folder / "vae" / "config.json").exists():
        raise InputError(f"{folder / 'vae'}: there is no trained VAE; run `longvid train vae --out {folder}` first")
    tokenizer = make_tokenizer()
    encoder = _text_encoder(folder / "text_encoder", recipe, on_log)
    _encode(folder, recipe, on_log)
    latents = folder / "latents"
    world = World(load_latents(latents, 1), load_latents(latents, CLIP_FRAMES), tokenizer, encoder)
    dit = train_dit(folder / "dit", recipe.dit, world, on_log)
    export_pipeline(
        folder / "pipeline",
        vae=AutoencoderKLWan.from_pretrained(folder / "vae"),
        dit=dit,
        encoder=encoder,
        tokenizer=tokenizer,
        shift=recipe.dit.shift,
        side=recipe.side,
    )
    on_log({"step": loop.steps, "stage": "exported"})
    return folder / "pipeline"


def _text_encoder(folder: Path, recipe: DitRecipe, on_log: OnLog) -> UMT5EncoderModel:
    if not (folder / "config.json").exists():
        torch.manual_seed(recipe.dit.loop.seed)
        tokenizer = make_tokenizer()
        encoder = make_text_encoder(len(tokenizer))
        reader = AttributeReader(encoder.config.d_model)
        loss = teach_text_encoder(encoder, reader, tokenizer, steps=recipe.text_steps, seed=recipe.dit.loop.seed)
        on_log({"step": recipe.text_steps, "stage": "text", "loss": loss})
        encoder.save_pretrained(folder)
    encoder = UMT5EncoderModel.from_pretrained(folder)
    return encoder.eval()


def _encode(folder: Path, recipe: DitRecipe, on_log: OnLog) -> None:
    vae = AutoencoderKLWan.from_pretrained(folder / "vae")
    if recipe.dit.compile_blocks:
        compile_norms(vae)
    for count, num_frames in ((recipe.images, 1), (recipe.clips, CLIP_FRAMES)):
        encode_world(
            vae,
            folder / "latents",
            clips=count,
            num_frames=num_frames,
            side=recipe.side,
            seed=recipe.dit.loop.seed,
            on_shard=lambda done: on_log({"step": done, "stage": "encode"}),
        )


def vae_settings(
    *, steps: int, batch: int, lr: float, seed: int, threads: int, decoder_only: bool = False
) -> VaeSettings:
    """The VAE recipe with the figures that a user may change; refinement weighs squared error more, for PSNR."""
    loop = LoopSettings(steps=steps, lr=lr, batch=batch, seed=seed, threads=threads, save_every=50)
    return VaeSettings(loop, decoder_only=decoder_only, mse_weight=8.0 if decoder_only else 2.0)


def dit_recipe(*, steps: int, batch: int, lr: float, seed: int, threads: int, clips: int, images: int) -> DitRecipe:
    """The DiT recipe with the figures that a user may change; a fifth of the steps go to first latents."""
    loop = LoopSettings(steps=steps, lr=lr, batch=batch, seed=seed, threads=threads, save_every=100, ema_decay=0.998)
    return DitRecipe(DitSettings(loop, image_steps=steps // 5), clips=clips, images=images)
