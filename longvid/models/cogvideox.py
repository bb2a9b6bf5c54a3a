"""CogVideoX's video model as a stage of the queue.

Shapes: C channels of a VAE latent, T of them that a token holds (`patch_size_t`, or 1), F of the engine's latents (T
of the VAE's in one), N text tokens of a prompt, S video tokens of a unit, E width.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from diffusers import CogVideoXTransformer3DModel
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from diffusers.pipelines.cogvideo.pipeline_cogvideox import get_resize_crop_region_for_grid
from torch import Tensor, nn

from longvid.models.checkpoint import FilmInputs
from longvid.models.joint_attention import JointContext, joint_attention
from longvid.models.joint_stage import JointStage
from longvid.parallel.around import Rope
from longvid.parallel.sequence import SequenceAttention
from longvid.parallel.stage import Unit


class CogVideoXStage(JointStage):
    """Some layers of a ``CogVideoXTransformer3DModel``.

    Takes the transformer over: its attention processors are replaced, its layers are not. Between stages travel the
    text of up to `FilmInputs.prompts_a_chunk` prompts, then the video tokens.
    """

    def __init__(self, dit: CogVideoXTransformer3DModel, **options: Any) -> None:
        super().__init__(**options)
        self.dit = dit.eval()
        self.dtype = dit.time_embedding.linear_1.weight.dtype
        self.device = dit.time_embedding.linear_1.weight.device
        config = dit.config
        self.width = config.num_attention_heads * config.attention_head_dim
        self._together, self._text_tokens = config.patch_size_t or 1, config.max_text_seq_length
        for index, block in enumerate(dit.transformer_blocks):
            block.attn1.set_processor(QueueJointAttention(index, self.sequence))
        self._take_linears()
        self._texts: list[Sequence[Tensor]] = []
        self._ropes: dict[tuple[int, int, int], Rope] = {}

    @property
    def layers(self) -> Sequence[nn.Module]:
        blocks: Sequence[nn.Module] = self.dit.transformer_blocks
        return blocks

    @torch.no_grad()
    def prepare(self, inputs: FilmInputs) -> None:
        """Project every prompt [N, text width] once."""
        self.text_places = inputs.prompts_a_chunk * self._text_tokens
        prompts = [(inputs.prompts, inputs.negatives)[branch] for branch in self.branches]
        self.text_lengths = [[len(states) for states in branch] for branch in prompts]
        if self.is_first:
            project = self.dit.patch_embed.text_proj
            self._texts = [[project(states[None].to(self.dtype)) for states in branch] for branch in prompts]

    def token_grid(self, latent_size: Sequence[int]) -> tuple[int, int]:
        patch = self.dit.config.patch_size
        return latent_size[0] // patch, latent_size[1] // patch

    def embed_time(self, unit: Unit, index: int) -> Tensor:
        frequencies = self.dit.time_proj(torch.tensor([float(unit.timesteps[-1])], device=self.device))
        temb: Tensor = self.dit.time_embedding(frequencies.to(self.dtype))
        return temb

    def embed_text(self, unit: Unit, index: int, prompt: int) -> Tensor:
        return self._texts[index][prompt]

    def embed_video(self, latents: Tensor) -> Tensor:
        """With a text of zeros, since the embedding takes both together."""
        patches = unpack(latents, self._together)[None].to(self.dtype)
        nothing = patches.new_zeros(1, self._text_tokens, self.dit.config.text_embed_dim)
        video: Tensor = self.dit.patch_embed(nothing, patches)[:, self._text_tokens :]
        return video

    def run_block(
        self, index: int, video: Tensor, text: Tensor, temb: Tensor, context: JointContext
    ) -> tuple[Tensor, Tensor]:
        video, text = self.dit.transformer_blocks[index](video, text, temb, context)
        return video, text

    def project(self, video: Tensor, temb: Tensor) -> Tensor:
        patches: Tensor = self.dit.proj_out(self.dit.norm_out(self.dit.norm_final(video), temb=temb))
        return patches

    def unpatch(self, patches: Tensor, unit: Unit) -> Tensor:
        height, width = self.token_grid(unit.latent_size)
        count, patch = unit.num_predicted, self.dit.config.patch_size
        cells = patches.view(count, height, width, -1, self._together, patch, patch)  # [F, h, w, C, T, p, p]
        latents: Tensor = cells.permute(4, 3, 0, 1, 5, 2, 6).reshape(-1, count, height * patch, width * patch)
        return latents.float()

    def rope(self, num_latents: int, height: int, width: int) -> Rope | None:
        """Rotary rows of a chunk-local grid of tokens, from position 0: as the stock pipeline makes them."""
        if not self.dit.config.use_rotary_positional_embeddings:
            return None
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
                device=self.device,
                **options,
            )
            self._ropes[key] = (tables[0][None, :, None], tables[1][None, :, None])
        return self._ropes[key]


class QueueJointAttention:
    """Joint attention of one layer of the stage; a layer hands its ``image_rotary_emb`` on to it unread."""

    def __init__(self, index: int, sequence: SequenceAttention) -> None:
        self.index, self.sequence = index, sequence

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
        joined = joint_attention(self.index, text, video, image_rotary_emb, self.sequence)
        out: Tensor = attn.to_out[0](joined.flatten(2))
        return out[:, text_tokens:], out[:, :text_tokens]


def unpack(latents: Tensor, together: int) -> Tensor:
    """The engine's latents [T·C, F, h, w] as the VAE's [F·T, C, h, w]."""
    cells: Tensor = latents.unflatten(0, (together, -1))
    return cells.permute(2, 0, 1, 3, 4).flatten(0, 1)
