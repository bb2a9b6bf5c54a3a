"""LTX-Video's model as a stage of the queue. Attention is Wan's: only what is around it differs.

Shapes: C channels, F latents (left context, then own), S tokens a latent, L = F·S, E width, H heads, D of a head.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from diffusers import LTXVideoTransformer3DModel
from torch import Tensor

from longvid.models.checkpoint import FilmInputs
from longvid.models.wan import text_spans
from longvid.models.wan_attention import (
    QueueSelfAttention,
    SceneTextAttention,
    SelfContext,
    TextContext,
    TextKv,
    text_kv,
)
from longvid.parallel.sequence import KvPart, Rope, WholeSequence
from longvid.parallel.stage import Output, Unit


class LtxStage:
    """Some layers of an ``LTXVideoTransformer3DModel``; implements the executor's Stage.

    `compression` is that of the VAE in time and space, for positions are in seconds and pixels. Takes the transformer
    over: its attention processors are replaced, its layers are not.
    """

    def __init__(
        self,
        dit: LTXVideoTransformer3DModel,
        *,
        compression: tuple[int, int],
        branches: Sequence[int] = (0,),
        is_first: bool,
        is_last: bool,
    ) -> None:
        self.dit = dit.eval()
        self.branches = tuple(branches)
        self._compression = compression
        self._is_first, self._is_last = is_first, is_last
        self.dtype = dit.time_embed.linear.weight.dtype
        self._device = dit.time_embed.linear.weight.device
        self._heads, width = dit.config.num_attention_heads, dit.config.attention_head_dim
        self._width = self._heads * width
        for index, block in enumerate(dit.transformer_blocks):
            block.attn1.set_processor(QueueSelfAttention(index, WholeSequence()))
            block.attn2.set_processor(SceneTextAttention(index))
        self._fps = 0.0
        self._texts: list[list[TextKv]] = []
        self._times: dict[float, tuple[Tensor, Tensor]] = {}
        self._ropes: dict[tuple[float, int, int, int], Rope] = {}

    @property
    def num_branches(self) -> int:
        return len(self.branches)

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
        """[branches, L, E] for F latents."""
        return (self.num_branches, num_latents * latent_size[0] * latent_size[1], self._width), self.dtype

    @torch.no_grad()
    def forward(self, unit: Unit) -> Output:
        """Hidden states, or on the last stage the velocity of the unit's own latents; and the K/V that it asks for."""
        num_latents, per_latent = len(unit.timesteps), math.prod(unit.latent_size)
        temb, modulation = self._modulation(unit.timesteps.tolist(), per_latent)
        entering = self._enter(unit)
        branches, stored = [], []
        for branch, texts in enumerate(self._texts):
            context = self._context(unit, branch)
            spans = text_spans(unit.chunk.prompts[-num_latents:], texts, per_latent, slice(0, num_latents * per_latent))
            hidden = entering[branch]
            for block in self.dit.transformer_blocks:
                hidden = block(hidden, TextContext(spans), modulation, context)
            branches.append(self._head(hidden, temb, unit) if self._is_last else hidden)
            stored.append(context.stored)
        kv = tuple([[layer[span] for layer in layers] for layers in stored] for span in range(len(unit.store)))
        if self._is_last:
            return Output(velocity=torch.stack(branches), kv=kv)
        return Output(hidden=torch.cat(branches), kv=kv)

    def _enter(self, unit: Unit) -> Sequence[Tensor]:
        """What each branch begins with, [1, L, E]."""
        if not self._is_first:
            assert unit.hidden is not None
            parts: Sequence[Tensor] = unit.hidden.split(1)
            return parts
        assert unit.latents is not None
        return [self.dit.proj_in(unit.latents.flatten(1).T[None].to(self.dtype))] * self.num_branches

    def _context(self, unit: Unit, branch: int) -> SelfContext:
        height, width = unit.latent_size
        before = unit.chunk.num_left if unit.left is not None else 0
        after = unit.chunk.num_right if unit.right is not None else 0
        per_latent = height * width
        return SelfContext(
            rope=self._rope(before + len(unit.timesteps) + after, height, width),
            left=_of_branch(unit.left, branch),
            right=_of_branch(unit.right, branch),
            num_left=before * per_latent,
            store=tuple(slice(span.start * per_latent, span.stop * per_latent) for span in unit.store),
            shared=_of_branch(unit.shared, branch),
            shared_stop=unit.chunk.num_left * per_latent,
            stores_scene=unit.stores_scene,
            sharing=unit.sharing,
        )

    def _head(self, hidden: Tensor, temb: Tensor, unit: Unit) -> Tensor:
        """The output layer on the own latents' tokens: fp32 [C, num_latents, h, w]."""
        count, (height, width) = unit.chunk.num_latents, unit.latent_size
        own = count * height * width
        shift, scale = (self.dit.scale_shift_table[None, None] + temb[:, -own:, None]).unbind(2)
        tokens = self.dit.proj_out(self.dit.norm_out(hidden[:, -own:]) * (1 + scale) + shift)
        latents: Tensor = tokens[0].T.reshape(-1, count, height, width)
        return latents.float()

    def _modulation(self, timesteps: Sequence[float], per_latent: int) -> tuple[Tensor, Tensor]:
        """Time embedding [1, L or 1, E] and modulation [1, L or 1, 6·E]; one row when all levels are equal."""
        for t in set(timesteps) - self._times.keys():
            modulation, temb = self.dit.time_embed(
                torch.tensor([t], device=self._device), batch_size=1, hidden_dtype=self.dtype
            )
            self._times[t] = temb, modulation
        if len(set(timesteps)) == 1:
            temb, modulation = self._times[timesteps[0]]
            return temb[None], modulation[None]
        rows = zip(*(self._times[t] for t in timesteps), strict=True)
        temb, modulation = (torch.cat(row).repeat_interleave(per_latent, dim=0)[None] for row in rows)
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


def _of_branch(kv: object, branch: int) -> list[KvPart] | None:
    if kv is None:
        return None
    assert isinstance(kv, list)
    layers: list[KvPart] = kv[branch]
    return layers
