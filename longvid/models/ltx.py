"""LTX-Video's model as a stage of the queue. Attention is Wan's: only what is around it differs.

Shapes: C channels, F latents (left context, then own), S tokens a latent, L = F·S, l of them on this rank, E width, H
heads, D of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor, nn

from longvid.models.checkpoint import FilmInputs
from longvid.models.layer_stage import CachedFeedForward, LayerStage, Pass, RunModule, context_of, neighbours, token_map
from longvid.models.wan import text_spans
from longvid.models.wan_attention import (
    QueueSelfAttention,
    SceneTextAttention,
    SelfContext,
    TextContext,
    TextKv,
    text_kv,
)
from longvid.parallel.around import Rope
from longvid.parallel.spans import length
from longvid.parallel.stage import Unit


class LtxStage(LayerStage):
    """Some layers of an ``LTXVideoTransformer3DModel``.

    `compression` is that of the VAE in time and space, for positions are in seconds and pixels. Takes the transformer
    over: its attention processors are replaced, its layers are not.
    """

    def __init__(self, dit: LTXVideoTransformer3DModel, *, compression: tuple[int, int], **options: Any) -> None:
        super().__init__(**options)
        self.dit = dit.eval()
        self._compression = compression
        self.dtype = dit.time_embed.linear.weight.dtype
        self._device = dit.time_embed.linear.weight.device
        self._heads, width = dit.config.num_attention_heads, dit.config.attention_head_dim
        self._width = self._heads * width
        for index, block in enumerate(dit.transformer_blocks):
            block.attn1.set_processor(QueueSelfAttention(index, self.sequence))
            block.attn2.set_processor(SceneTextAttention(index))
            if self.caches_modules:
                block.ff = CachedFeedForward(index, block.ff)
        self._take_linears()
        self._fps = 0.0
        self._texts: list[list[TextKv]] = []
        self._times: dict[float, tuple[Tensor, Tensor]] = {}
        self._ropes: dict[tuple[float, int, int, int], Rope] = {}

    @property
    def layers(self) -> Sequence[nn.Module]:
        blocks: Sequence[nn.Module] = self.dit.transformer_blocks
        return blocks

    @torch.no_grad()
    def prepare(self, inputs: FilmInputs) -> None:
        """Compute text K/V of every prompt [n, text width] once."""
        self._fps = inputs.fps
        known: dict[int, TextKv] = {}
        prompts = [(inputs.prompts, inputs.negatives)[branch] for branch in self.branches]
        self._texts = [[self._text(states, known) for states in branch] for branch in prompts]

    def _text(self, states: Tensor, known: dict[int, TextKv]) -> TextKv:
        """The stock pipeline masks its padding, so there is none."""
        if id(states) not in known:
            projected = self.dit.caption_projection(states.to(self.dtype))
            no_padding = projected.new_zeros(1, projected.shape[1])
            known[id(states)] = text_kv(self.dit.transformer_blocks, torch.cat([projected, no_padding]), len(states))
        return known[id(states)]

    def hidden_shape(self, num_latents: int, latent_size: Sequence[int]) -> tuple[tuple[int, ...], torch.dtype]:
        """[branches, l, E] for F latents."""
        part = self.sequence.part(num_latents * math.prod(latent_size))
        return (self.num_branches, length(part), self._width), self.dtype

    def passes(self, unit: Unit) -> list[Pass]:
        """Each branch of a unit as it enters the stage."""
        num_latents, per_latent = len(unit.timesteps), math.prod(unit.latent_size)
        num_tokens = num_latents * per_latent
        part = self.sequence.part(num_tokens)
        temb, modulation = self._modulation(unit.timesteps.tolist(), per_latent, part)
        entering, anchors = self._enter(unit, part) if self.is_first else self.entering(unit)
        passes = []
        for index, (branch, texts) in enumerate(zip(self.branches[: unit.num_branches], self._texts, strict=False)):
            run = self.run_module(unit, branch)
            spans = text_spans(unit.chunk.prompts[-num_latents:], texts, per_latent, part)
            context = self._context(unit, index, run)
            layer = partial(self._layer, TextContext(spans, run), modulation, context)
            ways = context, layer, partial(self._head, temb, unit), num_tokens
            passes.append(Pass(branch, entering[index], anchors[index], *ways, start=part.start))
        return passes

    def _layer(self, text: TextContext, modulation: Tensor, context: SelfContext, index: int, hidden: Tensor) -> Tensor:
        block = self.dit.transformer_blocks[index]
        if isinstance(block.ff, CachedFeedForward):
            block.ff.run = context.run
        out: Tensor = block(hidden, text, modulation, context)
        return out

    def _enter(self, unit: Unit, part: slice) -> tuple[Sequence[Tensor], Sequence[None]]:
        """What each branch begins with, [1, l, E]."""
        assert unit.latents is not None
        entering = self.dit.proj_in(unit.latents.flatten(1).T[None, part].to(self.dtype))
        return [entering] * self.num_branches, [None] * self.num_branches

    def _context(self, unit: Unit, index: int, run: RunModule) -> SelfContext:
        height, width = unit.latent_size
        before, after = neighbours(unit)
        tokens = token_map(unit, before, after, (height, width))
        return SelfContext(
            **context_of(unit, index, height * width),
            rope=self._rope(before + len(unit.timesteps) + after, height, width),
            attention=self.layer_attention(unit, self.branches[index], tokens, self._device),
            head_costs=self.layer_costs,
            run=run,
        )

    def _head(self, temb: Tensor, unit: Unit, hidden: Tensor) -> Tensor:
        """The output layer on the last `num_predicted` latents: fp32 [C, F, h, w], on every rank of the sequence."""
        count, (height, width) = unit.num_predicted, unit.latent_size
        own, num_tokens = count * height * width, len(unit.timesteps) * height * width
        if hidden.shape[1] == num_tokens:  # all tokens are here: those of the left context need no velocity
            hidden, temb, num_tokens = hidden[:, -own:], temb[:, -own:], own
        shift, scale = (self.dit.scale_shift_table[None, None] + temb[:, :, None]).unbind(2)
        tokens = self.dit.proj_out(self.dit.norm_out(hidden) * (1 + scale) + shift)
        if tokens.shape[1] != own or num_tokens != own:
            tokens = self.sequence.gather(tokens, num_tokens)[:, -own:]
        latents: Tensor = tokens[0].T.reshape(-1, count, height, width)
        return latents.float()

    def _modulation(self, timesteps: Sequence[float], per_latent: int, part: slice) -> tuple[Tensor, Tensor]:
        """Time embedding [1, l or 1, E] and modulation [1, l or 1, 6·E]; one row when all levels are equal."""
        for t in set(timesteps) - self._times.keys():
            modulation, temb = self.dit.time_embed(
                torch.tensor([t], device=self._device), batch_size=1, hidden_dtype=self.dtype
            )
            self._times[t] = temb, modulation
        if len(set(timesteps)) == 1:
            temb, modulation = self._times[timesteps[0]]
            return temb[None], modulation[None]
        rows = zip(*(self._times[t] for t in timesteps), strict=True)
        temb, modulation = (torch.cat(row).repeat_interleave(per_latent, dim=0)[None, part] for row in rows)
        return temb, modulation

    def _rope(self, num_latents: int, height: int, width: int) -> Rope:
        """Rotary rows [1, tokens, H, D] of a chunk-local grid, from time 0; frequencies differ from head to head."""
        key = (self._fps, num_latents, height, width)
        if key not in self._ropes:
            temporal, spatial = self._compression
            scale = (temporal / self._fps, spatial, spatial)
            like = torch.empty(1, device=self._device)
            cos, sin = self.dit.rope(like, num_latents, height, width, rope_interpolation_scale=scale)
            self._ropes[key] = (cos.unflatten(2, (self._heads, -1)), sin.unflatten(2, (self._heads, -1)))
        return self._ropes[key]
