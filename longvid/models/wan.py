"""The Wan family's video model as a stage of the queue: patches in, layers, velocity out.

Shapes: C channels, F latents (left context, then own), S tokens a latent, L = F·S, E text width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor

from longvid.models.wan_attention import (
    LayerKv,
    QueueSelfAttention,
    Rope,
    SceneTextAttention,
    SelfContext,
    TextKv,
    TextSpan,
    text_kv,
)
from longvid.parallel.executor import Prediction, Unit
from longvid.plan import PromptBlend
from longvid.sampler import guide

TEXT_COLUMNS = 512
"""Length to which the stock pipeline pads every prompt with zeros, unmasked."""

BranchKv = list[list[LayerKv]]
"""K/V of a span of latents: [branch][layer]; branch 0 is conditional, 1 unconditional."""


class WanStage:
    """All layers of a ``WanTransformer3DModel``; implements the executor's Stage.

    Takes the transformer over: its attention processors are replaced, its layers are not.
    """

    def __init__(self, dit: WanTransformer3DModel, guidance: float = 1.0) -> None:
        self.dit = dit.eval()
        self.guidance = guidance
        self.dtype = dit.patch_embedding.weight.dtype
        for layer, block in enumerate(dit.blocks):
            block.attn1.set_processor(QueueSelfAttention(layer))
            block.attn2.set_processor(SceneTextAttention(layer))
        self._texts: list[list[TextKv]] = []
        self._times: dict[float, tuple[Tensor, Tensor]] = {}
        self._ropes: dict[tuple[int, int, int], Rope] = {}

    @torch.no_grad()
    def set_prompts(self, prompts: Sequence[Tensor], negatives: Sequence[Tensor]) -> None:
        """Compute text K/V of every prompt once. Embeddings are [n, E] each, without padding.

        ``negatives`` belong to the prompts one by one; they are used with guidance alone.
        """
        branches = [prompts] if self.guidance == 1.0 else [prompts, negatives]
        known: dict[int, TextKv] = {}
        self._texts = [[self._text(states, known) for states in branch] for branch in branches]

    def _text(self, states: Tensor, known: dict[int, TextKv]) -> TextKv:
        if id(states) not in known:
            padded = torch.cat([states, states.new_zeros(1, states.shape[1])]).to(self.dtype)
            embedded = self.dit.condition_embedder.text_embedder(padded)
            known[id(states)] = text_kv(self.dit.blocks, embedded, TEXT_COLUMNS)
        return known[id(states)]

    @torch.no_grad()
    def forward(self, unit: Unit) -> Prediction:
        """Velocity of the unit's own latents, and K/V for its neighbour where the unit asks for them."""
        height, width = unit.latents.shape[2] // 2, unit.latents.shape[3] // 2
        per_latent = height * width
        hidden = self.dit.patch_embedding(unit.latents[None].to(self.dtype)).flatten(2).transpose(1, 2).contiguous()
        temb, modulation = self._modulation(unit.timesteps.tolist(), per_latent)
        rope = self._rope(unit.latents.shape[1] + unit.chunk.num_right, height, width)
        velocities: list[Tensor] = []
        stored: BranchKv = []
        for branch, texts in enumerate(self._texts):
            context = self._self_context(unit, branch, rope, per_latent)
            spans = text_spans(unit.chunk.prompts, texts, per_latent)
            out = hidden
            for block in self.dit.blocks:
                out = block(out, spans, modulation, context)
            velocities.append(self._head(out, temb, unit, (height, width)))
            stored.append(context.stored)
        cond, *uncond = velocities
        velocity = guide(cond, uncond[0], self.guidance) if uncond else cond
        return Prediction(velocity, stored if unit.store_kv else None)

    def _self_context(self, unit: Unit, branch: int, rope: Rope, per_latent: int) -> SelfContext:
        right: list[LayerKv] | None = None
        tokens = unit.latents.shape[1] * per_latent
        if unit.right is not None:
            assert isinstance(unit.right, list)
            right = unit.right[branch]
            tokens += right[0][0].shape[1]
        store = unit.store_kv and slice(unit.store_kv.start * per_latent, unit.store_kv.stop * per_latent)
        return SelfContext((rope[0][:, :tokens], rope[1][:, :tokens]), right, store)

    def _head(self, hidden: Tensor, temb: Tensor, unit: Unit, grid: tuple[int, int]) -> Tensor:
        """The output layer on the own latents' tokens: fp32 [C, num_latents, h, w]."""
        own = unit.chunk.num_latents * grid[0] * grid[1]
        hidden, table = hidden[:, -own:], self.dit.scale_shift_table.unsqueeze(0)
        shift, scale = (table + temb[:, -own:].unsqueeze(2)).unbind(2)
        hidden = (self.dit.norm_out(hidden.float()) * (1 + scale) + shift).type_as(hidden)
        out = self.dit.proj_out(hidden).view(unit.chunk.num_latents, *grid, 2, 2, -1)
        channels = out.shape[-1]
        velocity: Tensor = out.permute(5, 0, 1, 3, 2, 4).reshape(channels, -1, grid[0] * 2, grid[1] * 2).float()
        return velocity

    def _modulation(self, timesteps: list[float], per_latent: int) -> tuple[Tensor, Tensor]:
        """Time embedding [1, L or 1, D] and modulation [1, L, 6, D], or [1, 6, D] when all levels are equal."""
        for t in set(timesteps) - self._times.keys():
            self._times[t] = self._embed_time(t)
        if len(set(timesteps)) == 1:
            temb, modulation = self._times[timesteps[0]]
            return temb[:, None], modulation
        parts = [self._times[t] for t in timesteps]
        temb = torch.cat([temb for temb, _ in parts]).repeat_interleave(per_latent, dim=0)
        modulation = torch.cat([m for _, m in parts]).repeat_interleave(per_latent, dim=0)
        return temb[None], modulation[None]

    def _embed_time(self, timestep: float) -> tuple[Tensor, Tensor]:
        """Embedding [1, D] and modulation [1, 6, D] of a noise level: once, since steps come again."""
        embedder = self.dit.condition_embedder
        device = self.dit.scale_shift_table.device
        frequencies = embedder.timesteps_proj(torch.tensor([timestep], device=device))
        time_dtype = embedder.time_embedder.linear_1.weight.dtype
        temb = embedder.time_embedder(frequencies.to(time_dtype)).to(self.dtype)
        return temb, embedder.time_proj(embedder.act_fn(temb)).unflatten(1, (6, -1))

    def _rope(self, num_latents: int, height: int, width: int) -> Rope:
        """Rotary rows of a chunk-local grid of tokens, from position 0."""
        key = (num_latents, height, width)
        if key not in self._ropes:
            rope = self.dit.rope
            sizes = [rope.t_dim, rope.h_dim, rope.w_dim]
            shapes = [(num_latents, 1, 1, -1), (1, height, 1, -1), (1, 1, width, -1)]
            tables = []
            for table in (rope.freqs_cos, rope.freqs_sin):
                parts = [
                    rows[:count].view(shape).expand(*key, -1)
                    for rows, count, shape in zip(table.split(sizes, dim=1), key, shapes, strict=True)
                ]
                tables.append(torch.cat(parts, dim=-1).reshape(1, math.prod(key), 1, -1))
            self._ropes[key] = (tables[0], tables[1])
        return self._ropes[key]


def text_spans(prompts: Sequence[PromptBlend], texts: Sequence[TextKv], per_latent: int) -> list[TextSpan]:
    """Spans of consecutive latents that attend the same text, in tokens."""
    spans, start = [], 0
    for blend, latents in groupby(prompts):
        stop = start + per_latent * len(list(latents))
        second = texts[blend.b] if blend.weight and blend.b != blend.a else None
        spans.append(TextSpan(slice(start, stop), texts[blend.a], second, blend.weight))
        start = stop
    return spans
