"""CogVideoX's video model as a stage of the queue.

Shapes: C channels of a VAE latent, T of them that a token holds (`patch_size_t`, or 1), F of the engine's latents (T
of the VAE's in one), N text tokens of a prompt, P prompts of a unit, S video tokens of a unit, E width.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor

from longvid.models.checkpoint import FilmInputs
from longvid.models.joint_attention import JointContext, JointSpan, joint_attention
from longvid.parallel.sequence import KvPart, Rope
from longvid.parallel.stage import Output, Unit
from longvid.plan import PromptBlend


class CogVideoXStage:
    """Some layers of a ``CogVideoXTransformer3DModel``; implements the executor's Stage.

    Takes the transformer over: its attention processors are replaced, its layers are not. Between stages travel the
    text of up to `FilmInputs.prompts_a_chunk` prompts, then the video tokens.
    """

    def __init__(
        self, dit: CogVideoXTransformer3DModel, *, branches: Sequence[int] = (0,), is_first: bool, is_last: bool
    ) -> None:
        self.dit = dit.eval()
        self.branches = tuple(branches)
        self._is_first, self._is_last = is_first, is_last
        self.dtype = dit.time_embedding.linear_1.weight.dtype
        self._device = dit.time_embedding.linear_1.weight.device
        config = dit.config
        self._width = config.num_attention_heads * config.attention_head_dim
        self._together, self._text_tokens = config.patch_size_t or 1, config.max_text_seq_length
        for index, block in enumerate(dit.transformer_blocks):
            block.attn1.set_processor(QueueJointAttention(index))
        self._texts: list[Sequence[Tensor]] = []
        self._slots = 1
        self._ropes: dict[tuple[int, int, int], Rope] = {}

    @property
    def num_branches(self) -> int:
        return len(self.branches)

    @torch.no_grad()
    def prepare(self, inputs: FilmInputs) -> None:
        """Project every prompt [N, text width] once."""
        self._slots = inputs.prompts_a_chunk
        prompts = [(inputs.prompts, inputs.negatives)[branch] for branch in self.branches]
        if self._is_first:
            project = self.dit.patch_embed.text_proj
            self._texts = [[project(states[None].to(self.dtype)) for states in branch] for branch in prompts]

    def hidden_shape(self, num_latents: int, latent_size: Sequence[int]) -> tuple[tuple[int, ...], torch.dtype]:
        """[branches, slots·N + S, E] for F latents."""
        height, width = self._grid(latent_size)
        num_tokens = self._slots * self._text_tokens + num_latents * height * width
        return (self.num_branches, num_tokens, self._width), self.dtype

    def _grid(self, latent_size: Sequence[int]) -> tuple[int, int]:
        patch = self.dit.config.patch_size
        return latent_size[0] // patch, latent_size[1] // patch

    @torch.no_grad()
    def forward(self, unit: Unit) -> Output:
        """Hidden states, or on the last stage the prediction for the unit's own latents; and the K/V it asks for."""
        blends = unit.chunk.prompts[-len(unit.timesteps) :]
        prompts = list(dict.fromkeys(prompt for blend in blends for prompt in (blend.a, blend.b)))
        temb = self._embed_time(float(unit.timesteps[-1]))
        branches, stored = [], []
        for branch in range(self.num_branches):
            text, video = self._enter(unit, branch, prompts)
            context = self._context(unit, branch, joint_spans(blends, prompts, math.prod(self._grid(unit.latent_size))))
            for block in self.dit.transformer_blocks:
                video, text = block(video, text, temb, context)
            branches.append(self._head(video, temb, unit) if self._is_last else self._leave(text, video))
            stored.append(context.stored)
        kv = tuple([[layer[span] for layer in layers] for layers in stored] for span in range(len(unit.store)))
        if self._is_last:
            return Output(velocity=torch.stack(branches), kv=kv)
        return Output(hidden=torch.cat(branches), kv=kv)

    def _enter(self, unit: Unit, branch: int, prompts: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Text [1, P·N, E] and video [1, S, E] that a branch begins with."""
        count = len(prompts) * self._text_tokens
        if not self._is_first:
            assert unit.hidden is not None
            hidden = unit.hidden[branch : branch + 1]
            return hidden[:, :count].contiguous(), hidden[:, self._slots * self._text_tokens :].contiguous()
        assert unit.latents is not None
        latents = unpack(unit.latents, self._together)[None].to(self.dtype)
        nothing = latents.new_zeros(1, self._text_tokens, self.dit.config.text_embed_dim)
        video = self.dit.patch_embed(nothing, latents)[:, self._text_tokens :]
        return torch.cat([self._texts[branch][prompt] for prompt in prompts], 1), video

    def _leave(self, text: Tensor, video: Tensor) -> Tensor:
        empty = text.new_zeros(1, self._slots * self._text_tokens - text.shape[1], text.shape[2])
        return torch.cat([text, empty, video], 1)

    def _context(self, unit: Unit, branch: int, spans: Sequence[JointSpan]) -> JointContext:
        height, width = self._grid(unit.latent_size)
        per_latent, num_latents = height * width, len(unit.timesteps)
        before = unit.chunk.num_left if unit.left is not None else 0
        after = unit.chunk.num_right if unit.right is not None else 0
        rotary = self.dit.config.use_rotary_positional_embeddings
        return JointContext(
            rope=self._rope(before + num_latents + after, height, width) if rotary else None,
            spans=spans,
            text_tokens=self._text_tokens,
            left=_of_branch(unit.left, branch),
            right=_of_branch(unit.right, branch),
            num_left=before * per_latent,
            store=tuple(slice(span.start * per_latent, span.stop * per_latent) for span in unit.store),
            shared=_of_branch(unit.shared, branch),
            shared_stop=unit.chunk.num_left * per_latent,
            stores_scene=unit.stores_scene,
            sharing=unit.sharing,
        )

    def _head(self, video: Tensor, temb: Tensor, unit: Unit) -> Tensor:
        """The output layers on the own latents' tokens: fp32 [T·C, num_latents, h, w]."""
        height, width = self._grid(unit.latent_size)
        count, patch = unit.chunk.num_latents, self.dit.config.patch_size
        own = self.dit.norm_final(video[:, -count * height * width :])
        patches = self.dit.proj_out(self.dit.norm_out(own, temb=temb))
        cells = patches.view(count, height, width, -1, self._together, patch, patch)  # [F, h, w, C, T, p, p]
        latents: Tensor = cells.permute(4, 3, 0, 1, 5, 2, 6).reshape(-1, count, height * patch, width * patch)
        return latents.float()

    def _embed_time(self, timestep: float) -> Tensor:
        frequencies = self.dit.time_proj(torch.tensor([timestep], device=self._device))
        temb: Tensor = self.dit.time_embedding(frequencies.to(self.dtype))
        return temb

    def _rope(self, num_latents: int, height: int, width: int) -> Rope:
        """Rotary rows of a chunk-local grid of tokens, from position 0: as the stock pipeline makes them."""
        key = (num_latents, height, width)
        if key not in self._ropes:
            config = self.dit.config
            base = config.sample_height // config.patch_size, config.sample_width // config.patch_size
            options: dict[str, Any]
            if config.patch_size_t is None:
                options = {"crops_coords": get_resize_crop_region_for_grid((height, width), base[1], base[0])}
            else:
                options = {"crops_coords": None, "grid_type": "slice", "max_size": base}
            tables = get_3d_rotary_pos_embed(
                config.attention_head_dim,
                grid_size=(height, width),
                temporal_size=num_latents,
                device=self._device,
                **options,
            )
            self._ropes[key] = (tables[0][None, :, None], tables[1][None, :, None])
        return self._ropes[key]


class QueueJointAttention:
    """Joint attention of one layer of the stage; a layer hands its ``image_rotary_emb`` on to it unread."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor,
        attention_mask: None,
        image_rotary_emb: JointContext,
    ) -> tuple[Tensor, Tensor]:
        text_tokens = encoder_hidden_states.shape[1]
        hidden = torch.cat([encoder_hidden_states, hidden_states], 1)
        shape = (1, hidden.shape[1], attn.heads, -1)
        query, key, value = (project(hidden).view(shape) for project in (attn.to_q, attn.to_k, attn.to_v))
        if attn.norm_q is not None:
            query, key = attn.norm_q(query), attn.norm_k(key)
        text, video = zip(*((x[:, :text_tokens], x[:, text_tokens:]) for x in (query, key, value)), strict=True)
        out: Tensor = attn.to_out[0](joint_attention(self.index, text, video, image_rotary_emb).flatten(2))
        return out[:, text_tokens:], out[:, :text_tokens]


def joint_spans(blends: Sequence[PromptBlend], prompts: Sequence[int], per_latent: int) -> list[JointSpan]:
    """Spans of consecutive latents that follow the same prompts, as places among the unit's."""
    spans, start = [], 0
    for blend, latents in groupby(blends):
        stop = start + per_latent * len(list(latents))
        second = prompts.index(blend.b) if blend.weight and blend.b != blend.a else None
        spans.append(JointSpan(slice(start, stop), prompts.index(blend.a), second, blend.weight))
        start = stop
    return spans


def unpack(latents: Tensor, together: int) -> Tensor:
    """The engine's latents [T·C, F, h, w] as the VAE's [F·T, C, h, w]."""
    cells: Tensor = latents.unflatten(0, (together, -1))
    return cells.permute(2, 0, 1, 3, 4).flatten(0, 1)


def _of_branch(kv: object, branch: int) -> list[KvPart] | None:
    if kv is None:
        return None
    assert isinstance(kv, list)
    layers: list[KvPart] = kv[branch]
    return layers
