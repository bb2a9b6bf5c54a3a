"""``longvid train dit``: first latents for looks, then windows with staircases of noise for motion."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from longvid.training.dit import WindowText, block_forward, make_dit, make_optimizers, window_text, window_velocity
from longvid.training.latents import LatentSet, WindowBatch, draw_windows
from longvid.training.levels import Span, draw_levels, shift_levels
from longvid.training.loop import Ema, LoopSettings, OnLog, Run, finite_or_stop
from longvid.training.text import tokenize

IMAGE = Span(0, 1, 0)
MAX_CAPTION_TOKENS = 18
"""What the longest caption of the drawn world takes with the embedded model's tokenizer."""


@dataclass(frozen=True)
class DitSettings:
    """Sizes of a DiT training. ``image_steps`` come first; then windows, with some images among them."""

    loop: LoopSettings
    image_steps: int = 1000
    image_batch: int = 256
    image_share: float = 0.1
    chunk_latents: int = 6
    context_latents: int = 2
    shift: float = 5.0
    guidance: float = 2.0
    """Guidance that the model learns to give in one pass, from ``guided_from`` of the steps on; 1 is none."""
    guided_from: float = 0.65
    compile_blocks: bool = True

    def pull(self, step: int) -> float:
        """Weight of the guidance term at a step: 1 - 1/guidance."""
        return 1 - 1 / self.guidance if step >= self.guided_from * self.loop.steps else 0.0


@dataclass(frozen=True)
class World:
    """What the DiT learns from: encoded images and clips, and the (frozen) text encoder."""

    images: LatentSet
    clips: LatentSet
    tokenizer: PreTrainedTokenizerFast
    encoder: UMT5EncoderModel


def draw_span(rng: np.random.Generator, settings: DitSettings) -> tuple[Span, int]:
    """A window's division and its first latent: at the start of a shot, or in its midst."""
    own, context = settings.chunk_latents, settings.context_latents
    right = context if rng.random() < 0.75 else 0
    if rng.random() < 0.5:
        return Span(0, own + context, right), 0
    return Span(context, own, right), 1


def encode_captions(world: World, captions: list[str], index: Tensor) -> WindowText:
    """Text of a batch, with a constant number of columns so that compiled code is reused."""
    unique = sorted(set(captions))
    place = {caption: i for i, caption in enumerate(unique)}
    ids, mask = tokenize(world.tokenizer, unique)
    with torch.no_grad():
        states = world.encoder(ids, mask).last_hidden_state
    spare = max(0, MAX_CAPTION_TOKENS - mask.shape[1])
    states = torch.nn.functional.pad(states, (0, 0, 0, spare))
    mask = torch.nn.functional.pad(mask, (0, spare))
    rows = torch.tensor([place[caption] for caption in captions])
    return window_text(states[rows], mask[rows], index)


@dataclass(frozen=True)
class Objective:
    """How a batch is judged: the compiled block to run, and how far guidance pulls the target."""

    run_block: Any = block_forward
    pull: float = 0.0


def window_loss(
    dit: WanTransformer3DModel,
    world: World,
    batch: WindowBatch,
    sigma: Tensor,
    generator: torch.Generator,
    objective: Objective = Objective(),
) -> Tensor:
    """Rectified flow: mean squared error of the velocity eps - x0, each latent at its own level.

    With a pull w, the target is moved by w·(v - v_null), both of the model itself: where that is at rest,
    v = v_null + (v_data - v_null) / (1 - w), so one pass gives what guidance of 1 / (1 - w) gave in two
    ("model guidance", Tang et al., 2025, arXiv 2502.12154).
    """
    text = encode_captions(world, batch.captions, batch.index)
    noise = torch.randn(batch.clean.shape, generator=generator)
    level = sigma[:, None, :, None, None]
    noisy = (1 - level) * batch.clean + level * noise
    target = noise - batch.clean
    with torch.autocast("cpu", torch.bfloat16):
        velocity = window_velocity(dit, noisy, sigma, text, objective.run_block)
        if objective.pull:
            null = encode_captions(world, [""] * len(batch.captions), batch.index)
            with torch.no_grad():
                unguided = window_velocity(dit, noisy, sigma, null, objective.run_block)
            target = target + objective.pull * (velocity.detach().float() - unguided.float())
    return (velocity.float() - target).square().mean()


def draw_training_batch(
    rng: np.random.Generator, step: int, world: World, settings: DitSettings
) -> tuple[str, WindowBatch, Tensor]:
    """What step ``step`` trains on: its kind, the windows, and their levels [B, F]."""
    if step < settings.image_steps or rng.random() < settings.image_share:
        kind, span, first, data, size = "image", IMAGE, 0, world.images, settings.image_batch
        levels = rng.random((size, 1))
    else:
        (span, first), data, size = draw_span(rng, settings), world.clips, settings.loop.batch
        kind, levels = "window", draw_levels(rng, size, span)
    max_captions = size if kind == "image" else size * 3 // 2
    batch = draw_windows(data, rng, batch=size, num_latents=span.num_latents, first=first, max_captions=max_captions)
    return kind, batch, torch.from_numpy(shift_levels(levels, settings.shift)).float()


def train_dit(
    folder: Path,
    settings: DitSettings,
    world: World,
    on_log: OnLog = lambda _: None,
) -> WanTransformer3DModel:
    """Train, or go on training, in ``folder``; returns the model with averaged weights."""
    loop = settings.loop
    dit = make_dit(loop.seed)
    run_block = block_forward
    if settings.compile_blocks:
        torch._dynamo.config.recompile_limit = 64
        run_block = torch.compile(block_forward, dynamic=False)
    ema = Ema(dit, loop.ema_decay)
    muon, adamw = make_optimizers(dit, loop.lr)
    run = Run(folder, loop, {"kind": "dit"})
    parts = {"dit": dit, "ema": ema, "muon": muon, "adamw": adamw}
    run.load(parts)
    sums: dict[str, list[float]] = {}
    for step in run.steps(parts, [muon, adamw]):
        rng = np.random.default_rng((loop.seed, 5, step))
        generator = torch.Generator().manual_seed(loop.seed * 1_000_003 + step)
        kind, batch, sigma = draw_training_batch(rng, step, world, settings)
        loss = window_loss(dit, world, batch, sigma, generator, Objective(run_block, settings.pull(step)))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(dit.parameters(), loop.grad_clip)
        for optimizer in (muon, adamw):
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        ema.update(dit, step)
        sums.setdefault(kind, []).append(finite_or_stop(loss, step))
        if step % loop.log_every == 0:
            values: dict[str, float | str] = {name: float(np.mean(losses)) for name, losses in sums.items()}
            run.log(**values)
            on_log({"step": step, **values})
            sums = {}
    ema.copy_to(dit)
    return dit
