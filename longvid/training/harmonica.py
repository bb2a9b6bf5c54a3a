"""HarmoniCa (arXiv 2410.01723): a router that learns, on whole denoising runs, which modules each step can leave out.

The router is one free number a step, layer and module. Its sigmoid says whether the module is computed (above a
threshold) or gives what it gave before; gradients pass the threshold straight. Every step of a run goes on from what
the steps before made of their caches (step-wise denoising training), and is held to what the whole model makes of the
same input. Steps in which a module left out did more harm to the final latents weigh more.

Shapes: C channels, F latents, L layers, S steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from longvid.cache.plan import MODULES
from longvid.cache.table import Row, computed_share
from longvid.calibrate import Calibration
from longvid.errors import InputError
from longvid.models.accelerate_subjects import WanSubject
from longvid.models.loader import open_checkpoint
from longvid.models.parts import ModelPart
from longvid.models.wan import TEXT_COLUMNS
from longvid.models.wan_checkpoint import WanCheckpoint
from longvid.plan import make_plan
from longvid.ranks import pick_device
from longvid.sampler import Sampler
from longvid.script import load_script
from longvid.settings import Settings

THRESHOLD = 0.1


@dataclass(frozen=True)
class HarmonicaSettings:
    """`price` is what a computed module costs in the loss: the higher, the more is left out."""

    runs: int = 200
    rate: float = 0.05
    price: float = 1e-3
    seed: int = 0


@dataclass(frozen=True)
class Clip:
    """What one run denoises: noise fp32 [C, F, h, w], and its prompt's states [512, E]."""

    noise: Tensor
    text: Tensor


class Router(nn.Module):
    """The scores [S, L, modules]. Everything is computed at first, and at the first and the last step always."""

    def __init__(self, num_steps: int, num_layers: int) -> None:
        super().__init__()
        self.scores = nn.Parameter(torch.full((num_steps, num_layers, len(MODULES)), 2.0))

    def gates(self, step: int) -> Tensor:
        """[L, modules]: 1 computed, 0 left out; their gradient is that of the sigmoid."""
        soft = torch.sigmoid(self.scores[step])
        if step in (0, len(self.scores) - 1):
            return torch.ones_like(soft)
        hard = (soft > THRESHOLD).float()
        return hard + soft - soft.detach()

    def rows(self) -> tuple[Row, ...]:
        """What each step leaves out."""
        return tuple(
            frozenset(
                (layer, module)
                for layer, gates in enumerate(self.gates(step).tolist())
                for module, gate in zip(MODULES, gates, strict=True)
                if gate < 0.5
            )
            for step in range(len(self.scores))
        )


class _Routed:
    """The modules of a Wan transformer with a router in front: what they give is mixed with what they gave."""

    def __init__(self, dit: Any) -> None:
        self.gates: Tensor | None = None
        """[L, modules] of the step at hand; None: everything is computed and nothing kept."""
        self.caches: dict[tuple[int, int], Tensor] = {}
        self._modules: list[nn.Module] = []
        for layer, block in enumerate(dit.blocks):
            for index, module in enumerate(MODULES):
                part: Any = getattr(block, WanSubject.modules[module])
                part.forward = partial(self._run, part.forward, layer, index)
                self._modules.append(part)

    def remove(self) -> None:
        for module in self._modules:
            del module.forward

    def _run(self, inner: Callable[..., Tensor], layer: int, index: int, *args: Any, **kwargs: Any) -> Tensor:
        found = inner(*args, **kwargs)
        if self.gates is None:
            return found
        gate, before = self.gates[layer, index], self.caches.get((layer, index))
        mixed = found if before is None else gate * found + (1 - gate) * before
        self.caches[layer, index] = mixed.detach()
        return mixed


def train_router(
    dit: Any,
    sampler: Sampler,
    clips: Callable[[int], Clip],
    settings: HarmonicaSettings,
    on_step: Callable[[int, float, float], None],
) -> Router:
    """Train a router on runs of `clips`, by number. `on_step` hears the run, its mean error and the share computed.

    The model is not changed. The same clips, settings and machine give the same router.
    """
    torch.manual_seed(settings.seed)
    router = Router(sampler.num_steps, len(dit.blocks))
    optimiser = torch.optim.Adam(router.parameters(), lr=settings.rate)
    routed = _Routed(dit)
    try:
        weights = torch.ones(sampler.num_steps)
        for run in range(settings.runs):
            errors = _train_on(clips(run), dit, sampler, router, routed, optimiser, weights, settings.price)
            weights = 0.9 * weights + 0.1 * (errors / errors.mean().clamp_min(1e-12))
            on_step(run + 1, float(errors.mean()), computed_share(router.rows(), len(dit.blocks)))
    finally:
        routed.remove()
    return router


def _train_on(
    clip: Clip,
    dit: Any,
    sampler: Sampler,
    router: Router,
    routed: _Routed,
    optimiser: torch.optim.Optimizer,
    weights: Tensor,
    price: float,
) -> Tensor:
    """One run, a step of the optimiser for each of its own. Relative errors of the steps, [S]."""
    latents, solver = clip.noise[None], sampler.new_solver()
    routed.caches = {}
    errors = []
    for step in range(sampler.num_steps):
        time = torch.tensor([sampler.timestep(step)])
        routed.gates = None
        with torch.no_grad():
            whole = dit(latents, time, clip.text[None], return_dict=False)[0]
        routed.gates = router.gates(step)
        found = dit(latents, time, clip.text[None], return_dict=False)[0]
        error = (found - whole).square().mean() / whole.square().mean()
        if routed.gates.requires_grad:
            loss = weights[step] * error + price * torch.sigmoid(router.scores[step]).sum()
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        errors.append(error.detach())
        latents = solver.step(found[0].detach(), step, latents[0])[None]
    return torch.stack(errors)


def run_harmonica(
    story: Path, settings: Settings, how: HarmonicaSettings, on_step: Callable[[int, float, float], None]
) -> Calibration:
    """A table for the settings' model and steps, trained on clips of one chunk with the storyboard's prompts.

    Raises InputError for a wrong storyboard, and for a model that is not Wan's with one transformer.
    """
    checkpoint = open_checkpoint(settings.model.path)
    facts = checkpoint.facts
    if not isinstance(checkpoint, WanCheckpoint) or facts.image == "required" or facts.boundary_ratio is not None:
        raise InputError(f"train cache: {facts.name}: a router is trained for Wan's text-to-video models of one expert")
    device = pick_device(settings)
    plan = make_plan(load_script(story), settings, facts)
    dit = checkpoint.load_layers(ModelPart(range(facts.num_layers)), torch.float32, device).requires_grad_(False)
    texts = [_padded(states) for states in checkpoint.load_prompts(torch.float32, device).encode(plan.prompts)]
    width, height = facts.grid.latent_size(plan.width, plan.height)
    shape = (facts.latent_channels, settings.queue.chunk_latents, height, width)

    def clip(run: int) -> Clip:
        generator = torch.Generator().manual_seed(plan.seed + run)
        return Clip(torch.randn(shape, generator=generator).to(device), texts[run % len(texts)].to(device))

    sampler = checkpoint.make_sampler(settings.sampler, math.prod(shape[1:]))
    rows = train_router(dit, sampler, clip, how, on_step).rows()
    share = computed_share(rows, facts.num_layers)
    return Calibration("harmonica", share, rows=rows, model=facts.name, num_layers=facts.num_layers)


def _padded(states: Tensor) -> Tensor:
    """A prompt's states as the stock transformer takes them, [512, E]."""
    return torch.cat([states, states.new_zeros(TEXT_COLUMNS - len(states), states.shape[1])])
