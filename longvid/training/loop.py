"""The training loop's bookkeeping: schedule, averaged weights, resumable state, log and progress."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from longvid.errors import InputError

OnLog = Callable[[dict[str, float | str]], None]
"""Receives what a training logs: its step, and values or the name of a stage."""


@dataclass(frozen=True)
class LoopSettings:
    """What every training shares. A run is a function of these, the data settings and the seed."""

    steps: int
    lr: float
    batch: int
    seed: int = 0
    warmup: int = 100
    final_lr_share: float = 0.02
    decay: Literal["linear", "cosine"] = "linear"
    ema_decay: float = 0.999
    grad_clip: float = 1.0
    save_every: int = 500
    log_every: int = 20
    threads: int = 0


def lr_share(step: int, settings: LoopSettings) -> float:
    """Warm-up, then a decay: along a cosine to 0, or flat at first and linear over the last 30 % of the steps."""
    warm = min(1.0, (step + 1) / settings.warmup)
    if settings.decay == "cosine":
        return warm * (1 + math.cos(math.pi * step / settings.steps)) / 2
    decay_from = 0.7 * settings.steps
    if step < decay_from:
        return warm
    left = (settings.steps - step) / (settings.steps - decay_from)
    return warm * (settings.final_lr_share + (1 - settings.final_lr_share) * max(0.0, left))


class Ema:
    """Averaged weights, fp32; the average starts short and lengthens to ``decay``."""

    def __init__(self, module: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights = {n: p.detach().float().clone() for n, p in module.named_parameters()}

    @torch.no_grad()
    def update(self, module: nn.Module, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        names, params = zip(*module.named_parameters(), strict=True)
        torch._foreach_lerp_([self.weights[n] for n in names], [p.detach().float() for p in params], 1 - decay)

    @torch.no_grad()
    def copy_to(self, module: nn.Module) -> None:
        for name, param in module.named_parameters():
            param.copy_(self.weights[name])


class Run:
    """A resumable run in a folder: ``state.pt``, ``log.jsonl`` and the settings that made them."""

    def __init__(self, folder: Path, settings: LoopSettings, extra: dict[str, Any] | None = None) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder, self.settings = folder, settings
        self.facts = {**asdict(settings), **(extra or {})}
        self.started = time.monotonic()
        self.spent_s = 0.0
        self.step = 0
        if settings.threads:
            torch.set_num_threads(settings.threads)

    def load(self, parts: dict[str, Any]) -> bool:
        """Restore ``parts`` (anything with state_dict) from the folder; False when there is nothing."""
        path = self.folder / "state.pt"
        if not path.exists():
            return False
        state = torch.load(path, map_location="cpu", weights_only=True)
        if state["facts"]["seed"] != self.settings.seed:
            raise InputError(f"{path}: was trained with seed {state['facts']['seed']}, asked for {self.settings.seed}")
        for name, part in parts.items():
            if isinstance(part, Ema):
                part.weights = state["parts"][name]
            else:
                part.load_state_dict(state["parts"][name])
        self.step, self.spent_s = state["step"], state["spent_s"]
        return True

    def save(self, parts: dict[str, Any]) -> None:
        state = {
            "facts": self.facts,
            "step": self.step,
            "spent_s": self.spent_s + time.monotonic() - self.started,
            "parts": {n: p.weights if isinstance(p, Ema) else p.state_dict() for n, p in parts.items()},
        }
        part_path = self.folder / "state.pt.part"
        torch.save(state, part_path)
        os.replace(part_path, self.folder / "state.pt")

    def log(self, **values: float | str) -> None:
        line = {"step": self.step, "s": round(self.spent_s + time.monotonic() - self.started, 1), **values}
        with open(self.folder / "log.jsonl", "a") as file:
            file.write(json.dumps(line) + "\n")

    def steps(self, parts: dict[str, Any], optimizers: list[torch.optim.Optimizer]) -> Iterator[int]:
        """Count steps, set learning rates, save on the way and at the end, also when interrupted."""
        try:
            while self.step < self.settings.steps:
                share = lr_share(self.step, self.settings)
                for optimizer in optimizers:
                    for group in optimizer.param_groups:
                        group["lr"] = group.setdefault("base_lr", group["lr"]) * share
                yield self.step
                self.step += 1
                if self.step % self.settings.save_every == 0:
                    self.save(parts)
        finally:
            self.save(parts)


def finite_or_stop(loss: torch.Tensor, step: int) -> float:
    """The loss as a number; a run that diverges stops at once."""
    value = float(loss.detach())
    if not math.isfinite(value):
        raise FloatingPointError(f"the loss is {value} at step {step}: lower the learning rate")
    return value
