"""``longvid train vin``: the loop around `training.vin`, on one process or, with DeepSpeed's ZeRO, on many."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from longvid.models.vin import Vin
from longvid.training.latents import LatentSet
from longvid.training.loop import Ema, LoopSettings, OnLog, Run, finite_or_stop
from longvid.training.muon import Muon, split_parameters
from longvid.training.vin import KINDS, FilmBatch, FilmLayout, VinTrainee, draw_batch, draw_moment

HELD_OUT = 64
"""Films that are never trained on: the first ones."""


@dataclass(frozen=True)
class VinSettings:
    """Sizes of a training. ``loop.batch`` counts films; ``pull`` is 1 - 1 / the guidance that the model learned."""

    loop: LoopSettings
    layout: FilmLayout = field(default_factory=FilmLayout)
    tokens: int = 32
    processors: int = 2
    pull: float = 0.5
    compare_every: int = 200


def make_optimizers(vin: Vin, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for matrices, AdamW for the rest; gates open faster than the rest learns."""
    matrices, others = split_parameters(vin, lambda name, p: p.ndim == 2 and not name.endswith(".start"))
    gates = [layer.gate for layer in vin.layers.values()]
    rest = [p for p in others if all(p is not gate for gate in gates)]
    groups = [{"params": rest, "lr": lr}, {"params": gates, "lr": 5 * lr}]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    return [Muon(matrices, lr=lr, weight_decay=0.01), adamw]


def part_of(data: LatentSet, rows: slice) -> LatentSet:
    """Some of the films."""
    return LatentSet(data.latents[rows], data.looks[rows], data.look_of_latent[rows])


def train_batch(data: LatentSet, settings: VinSettings, step: int, rank: int = 0) -> FilmBatch:
    """What a rank trains on at a step."""
    rng = np.random.default_rng((settings.loop.seed, 6, step, rank))
    return draw_batch(part_of(data, slice(HELD_OUT, None)), settings.layout, rng, settings.loop.batch)


@torch.no_grad()
def compare(trainee: VinTrainee, data: LatentSet, settings: VinSettings) -> dict[str, float | str]:
    """How much less error there is with tokens than without, a kind of moment, on films that were held out."""
    held_out, gains = part_of(data, slice(HELD_OUT)), {}
    for number, kind in enumerate(KINDS):
        rng = np.random.default_rng((settings.loop.seed, 7, number))
        errors = np.zeros(2)
        for _ in range(4):
            moment = draw_moment(rng, settings.layout, np.eye(len(KINDS))[number].tolist())
            batch = draw_batch(held_out, settings.layout, rng, settings.loop.batch, moment)
            errors += [float(error) for error in trainee(batch, settings.pull)]
        gains[f"{kind} gain"] = float(1 - errors[0] / errors[1])
    return dict(gains)


def train_vin(
    folder: Path, settings: VinSettings, trainee: VinTrainee, data: LatentSet, on_log: OnLog = lambda _: None
) -> Vin:
    """Train, or go on training, in ``folder``; returns the adapter with averaged weights."""
    loop, vin = settings.loop, trainee.vin
    optimizers = make_optimizers(vin, loop.lr)
    ema = Ema(vin, loop.ema_decay)
    run = Run(folder, loop, {"kind": "vin"})
    parts: dict[str, Any] = {"vin": vin, "ema": ema, "muon": optimizers[0], "adamw": optimizers[1]}
    run.load(parts)
    losses: list[tuple[float, float]] = []
    for step in run.steps(parts, optimizers):
        loss, alone = trainee(train_batch(data, settings, step), settings.pull)
        _update(loss, vin, optimizers, loop.grad_clip)
        ema.update(vin, step)
        losses.append((finite_or_stop(loss, step), float(alone)))
        if step % loop.log_every == 0:
            mean, mean_alone = np.mean(losses, axis=0)
            values: dict[str, float | str] = {"loss": float(mean), "gain": float(1 - mean / mean_alone)}
            if step % settings.compare_every == 0:
                values |= compare(trainee, data, settings)
            run.log(**values)
            on_log({"step": step, **values})
            losses = []
    ema.copy_to(vin)
    return vin


def _update(loss: Tensor, vin: Vin, optimizers: list[torch.optim.Optimizer], clip: float) -> None:
    loss.backward()
    torch.nn.utils.clip_grad_norm_(vin.parameters(), clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
