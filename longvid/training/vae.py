"""Training of the causal video VAE (a stock ``AutoencoderKLWan``) on drawn clips."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanRMS_norm
from torch import Tensor
from torch.nn import functional as F

from longvid.training import world
from longvid.training.loop import Ema, LoopSettings, OnLog, Run, finite_or_stop
from longvid.training.muon import Muon, split_parameters

VAE_CONFIG = {
    "base_dim": 32,
    "z_dim": 8,
    "dim_mult": [1, 2, 2],
    "num_res_blocks": 1,
    # Averaging shortcuts carry pixels to the latent from the first step on: training converges faster.
    "is_residual": True,
    "temperal_downsample": [True, True],
    # The encoder sees 2x2 pixels as 12 channels, so that 8x8x4 costs what 4x4x4 would at half the side.
    "patch_size": 2,
    "in_channels": 12,
    "out_channels": 12,
    "scale_factor_spatial": 8,
    "scale_factor_temporal": 4,
    "latents_mean": [0.0] * 8,
    "latents_std": [1.0] * 8,
}


@dataclass(frozen=True)
class VaeSettings:
    """Sizes and losses of a VAE training."""

    loop: LoopSettings
    side: int = 64
    num_frames: int = 17
    kl_weight: float = 5e-4
    mse_weight: float = 2.0
    decoder_only: bool = False
    """Go on with the decoder alone: latents stay what they are, so a DiT that was trained on them stays right."""
    compile_norms: bool = True


def to_pixels(frames: np.ndarray) -> Tensor:
    """uint8 [B, T, H, W, 3] to float32 [B, 3, T, H, W] in [-1, 1]."""
    return torch.from_numpy(frames).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def draw_batch(rng: np.random.Generator, batch: int, num_frames: int, side: int) -> Tensor:
    clips = [world.make_clip(rng, num_frames, side, change_share=0.15).frames for _ in range(batch)]
    return to_pixels(np.stack(clips))


def train_vae(folder: Path, settings: VaeSettings, on_log: OnLog = lambda _: None) -> None:
    """Train, or go on training, in ``folder``; the averaged VAE is saved in ``folder/vae`` at the end."""
    loop = settings.loop
    torch.manual_seed(loop.seed)
    vae = AutoencoderKLWan(**VAE_CONFIG)
    start_nearly_deterministic(vae)
    if settings.compile_norms:
        compile_norms(vae)
    ema = Ema(vae, loop.ema_decay)
    hidden, others = split_parameters(vae, lambda name, param: param.ndim >= 4 and min(param.shape[:2]) >= 8)
    muon = Muon(hidden, lr=loop.lr, weight_decay=0.0)
    adamw = torch.optim.AdamW(others, lr=loop.lr, betas=(0.9, 0.99), weight_decay=0.0)
    run = Run(folder, loop, {"kind": "vae", "config": VAE_CONFIG})
    parts = {"vae": vae, "ema": ema, "muon": muon, "adamw": adamw}
    run.load(parts)
    if settings.decoder_only:
        freeze_encoder(vae, ema)
    for step in run.steps(parts, [muon, adamw]):
        rng = np.random.default_rng((loop.seed, 1, step))
        torch.manual_seed(loop.seed * 1_000_003 + step)
        loss, error = _vae_loss(vae, draw_batch(rng, loop.batch, settings.num_frames, settings.side), settings)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), loop.grad_clip)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(vae, step)
        if step % loop.log_every == 0:
            values: dict[str, float | str] = {"loss": finite_or_stop(loss, step), "psnr": psnr(error)}
            run.log(**values)
            on_log({"step": step, **values})
    ema.copy_to(vae)
    if settings.decoder_only:
        vae.register_to_config(**_latent_statistics(folder / "vae"))
    else:
        set_latent_statistics(vae, loop.seed, settings)
    vae.save_pretrained(folder / "vae", safe_serialization=True)


@torch.no_grad()
def start_nearly_deterministic(vae: AutoencoderKLWan) -> None:
    """Start with a posterior deviation of 0.05: with deviation 1 the decoder first learns to ignore z."""
    channels = vae.config.z_dim
    vae.quant_conv.weight[channels:] *= 0.1
    vae.quant_conv.bias[channels:] = -6.0


@torch.no_grad()
def freeze_encoder(vae: AutoencoderKLWan, ema: Ema) -> None:
    """Fix the encoder at its averaged weights: those made the latents."""
    for name, param in vae.named_parameters():
        if name.startswith(("encoder.", "quant_conv.")):
            param.copy_(ema.weights[name])
            param.requires_grad_(False)


def _latent_statistics(folder: Path) -> dict[str, list[float]]:
    config = json.loads((folder / "config.json").read_text())
    return {name: config[name] for name in ("latents_mean", "latents_std")}


def compile_norms(vae: AutoencoderKLWan) -> None:
    """Fuse the normalisations: uncompiled, they take longer than the convolutions on a CPU."""
    torch._dynamo.config.recompile_limit = 128
    torch._dynamo.config.accumulated_recompile_limit = 1024
    for module in vae.modules():
        if isinstance(module, WanRMS_norm):
            module.compile(dynamic=False)


def _vae_loss(vae: AutoencoderKLWan, pixels: Tensor, settings: VaeSettings) -> tuple[Tensor, float]:
    with torch.autocast(pixels.device.type, torch.bfloat16):
        posterior = vae.encode(pixels).latent_dist
        decoded = decode_unclamped(vae, posterior.sample())
    difference = decoded.float() - pixels
    mse = difference.square().mean()
    kl = 0.5 * (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean()
    loss = difference.abs().mean() + settings.mse_weight * mse + settings.kl_weight * kl
    return loss, float(mse.detach())


def decode_unclamped(vae: AutoencoderKLWan, latents: Tensor) -> Tensor:
    """The whole decode of [B, C, F, h, w] without the final clamp, which would stop gradients."""
    vae.clear_cache()
    x = vae.post_quant_conv(latents)
    parts = []
    for i in range(x.shape[2]):
        vae._conv_idx = [0]
        part = vae.decoder(x[:, :, i : i + 1], feat_cache=vae._feat_map, feat_idx=vae._conv_idx, first_chunk=i == 0)
        parts.append(part)
    vae.clear_cache()
    out = torch.cat(parts, dim=2)
    batch, _, frames, height, width = out.shape
    # Channels hold (c, x, y) of a 2x2 patch: the order of the stock unpatchify.
    out = out.reshape(batch, 3, 2, 2, frames, height, width).permute(0, 1, 4, 5, 3, 6, 2)
    return out.reshape(batch, 3, frames, height * 2, width * 2)


def psnr(mse: float) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1]."""
    return float(10 * np.log10(4 / max(mse, 1e-12)))


@torch.no_grad()
def set_latent_statistics(vae: AutoencoderKLWan, seed: int, settings: VaeSettings) -> None:
    """Write each channel's mean and deviation over drawn clips into the VAE's config."""
    rng = np.random.default_rng((seed, 2))
    means = []
    for _ in range(16):
        with torch.autocast("cpu", torch.bfloat16):
            means.append(vae.encode(draw_batch(rng, 8, settings.num_frames, settings.side)).latent_dist.mean.float())
    latents = torch.cat(means)
    vae.register_to_config(
        latents_mean=[round(v, 5) for v in latents.mean((0, 2, 3, 4)).tolist()],
        latents_std=[round(v, 5) for v in latents.std((0, 2, 3, 4)).tolist()],
    )


@torch.no_grad()
def held_out_psnr(vae: AutoencoderKLWan, *, clips: int, seed: int, num_frames: int = 33, side: int = 64) -> float:
    """PSNR in dB of posterior-mean reconstructions of drawn clips of held-out looks."""
    errors = []
    for i in range(clips):
        rng = np.random.default_rng((seed, 3, i))
        clip = world.make_clip(rng, num_frames, side, looks=[world.sample_look(rng, held_out=True)])
        pixels = to_pixels(clip.frames[None])
        decoded = vae.decode(vae.encode(pixels).latent_dist.mode()).sample
        errors.append(float(F.mse_loss(decoded, pixels)))
    return psnr(float(np.mean(errors)))
