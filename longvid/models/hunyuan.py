"""HunyuanVideo's model as a stage of the queue: layers of two kinds, one behind the other.

Shapes: C channels of a latent, F latents of a unit, n text tokens of a prompt, S video tokens of a unit, E width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import HunyuanVideoTransformer3DModel
from torch import Tensor

from longvid.models.checkpoint import FilmInputs
from longvid.models.joint_attention import JointContext, joint_attention
from longvid.models.joint_stage import JointStage
from longvid.parallel.around import Rope
from longvid.parallel.sequence import SequenceAttention
from longvid.parallel.stage import Unit


@dataclass(frozen=True)
class HunyuanPrompt:
    """A prompt: `states` [n, width] of its tokens, and `pooled` [width'] of the second encoder."""

    states: Tensor
    pooled: Tensor

    def to(self, device: torch.device) -> HunyuanPrompt:
        return HunyuanPrompt(self.states.to(device), self.pooled.to(device))


class HunyuanStage(JointStage):
    """Some layers of a ``HunyuanVideoTransformer3DModel``: first of the dual kind, then of the single.

    Takes the transformer over: its attention processors are replaced, its layers are not. The noise level, the pooled
    prompt and `guidance` modulate all tokens of a unit alike, so a unit of several prompts has the mean of their pooled
    vectors, by its own latents.
    """

    def __init__(self, dit: HunyuanVideoTransformer3DModel, *, guidance: float, **options: Any) -> None:
        super().__init__(**options)
        self.dit = dit.eval()
        weight = dit.time_text_embed.timestep_embedder.linear_1.weight
        self.dtype, self.device = weight.dtype, weight.device
        self.width = dit.config.num_attention_heads * dit.config.attention_head_dim
        self._guidance = torch.tensor([guidance], dtype=self.dtype, device=self.device) * 1000.0
        for index, block in enumerate(self.layers):
            block.attn.set_processor(QueueDualAttention(index, self.sequence))
        self._take_linears()
        self._prompts: list[Sequence[HunyuanPrompt]] = []
        self._ropes: dict[tuple[int, int, int], Rope] = {}

    @property
    def layers(self) -> Sequence[Any]:
        return [*self.dit.transformer_blocks, *self.dit.single_transformer_blocks]

    def prepare(self, inputs: FilmInputs) -> None:
        """Take the prompts; there are as many places for each of a chunk's as the longest of the film has tokens."""
        self._prompts = [(inputs.prompts, inputs.negatives)[branch] for branch in self.branches]
        self.text_lengths = [[len(prompt.states) for prompt in branch] for branch in self._prompts]
        longest = max(len(prompt.states) for prompt in (*inputs.prompts, *inputs.negatives))
        self.text_places = inputs.prompts_a_chunk * longest

    def token_grid(self, latent_size: Sequence[int]) -> tuple[int, int]:
        patch = self.dit.config.patch_size
        return latent_size[0] // patch, latent_size[1] // patch

    def embed_time(self, unit: Unit, index: int) -> Tensor:
        blends = unit.chunk.prompts[-unit.chunk.num_latents :]
        shares: dict[int, float] = {}
        for blend in blends:
            for prompt, weight in ((blend.a, 1 - blend.weight), (blend.b, blend.weight)):
                shares[prompt] = shares.get(prompt, 0.0) + weight / len(blends)
        prompts = self._prompts[index]
        if len(shares) == 1:
            pooled = prompts[blends[0].a].pooled
        else:
            pooled = torch.stack([share * prompts[prompt].pooled for prompt, share in shares.items()]).sum(0)
        temb: Tensor = self.dit.time_text_embed(self._timestep(unit), pooled[None].to(self.dtype), self._guidance)[0]
        return temb

    def embed_text(self, unit: Unit, index: int, prompt: int) -> Tensor:
        """The refined text, [1, n, E]: it depends on the noise level."""
        states = self._prompts[index][prompt].states[None].to(self.dtype)
        text: Tensor = self.dit.context_embedder(states, self._timestep(unit))
        return text

    def _timestep(self, unit: Unit) -> Tensor:
        return unit.timesteps[-1:].to(self.device)

    def embed_video(self, latents: Tensor) -> Tensor:
        video: Tensor = self.dit.x_embedder(latents[None].to(self.dtype))
        return video

    def run_block(
        self, index: int, video: Tensor, text: Tensor, temb: Tensor, context: JointContext
    ) -> tuple[Tensor, Tensor]:
        video, text = self.layers[index](video, text, temb, None, context)
        return video, text

    def project(self, video: Tensor, temb: Tensor) -> Tensor:
        patches: Tensor = self.dit.proj_out(self.dit.norm_out(video, temb))
        return patches

    def unpatch(self, patches: Tensor, unit: Unit) -> Tensor:
        height, width = self.token_grid(unit.latent_size)
        count, patch = unit.num_predicted, self.dit.config.patch_size
        cells = patches.view(count, height, width, -1, patch, patch)  # [F, h, w, C, p, p]
        latents: Tensor = cells.permute(3, 0, 1, 4, 2, 5).reshape(-1, count, height * patch, width * patch)
        return latents.float()

    def rope(self, num_latents: int, height: int, width: int) -> Rope:
        """Rotary rows of a chunk-local grid of tokens, from position 0."""
        key = (num_latents, height, width)
        if key not in self._ropes:
            patch = self.dit.config.patch_size
            like = torch.empty(1, device=self.device).expand(1, 1, num_latents, height * patch, width * patch)
            cos, sin = self.dit.rope(like)
            self._ropes[key] = (cos[None, :, None], sin[None, :, None])
        return self._ropes[key]


class QueueDualAttention:
    """Joint attention of one layer of the stage; a layer hands its ``image_rotary_emb`` on to it unread.

    A dual layer has projections of its own for text.
    """

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
        num_text = encoder_hidden_states.shape[1]
        text, video = dual_projections(attn, encoder_hidden_states, hidden_states)
        out = joint_attention(self.index, text, video, image_rotary_emb, self.sequence)
        return dual_outputs(attn, out.flatten(2), num_text)


def dual_projections(attn: Any, text_1NE: Tensor, video_1SE: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Queries, keys and values of text and of video, normed, each [1, tokens, H, D]."""

    def project(
        hidden: Tensor, linears: Sequence[Any], norms: Sequence[Callable[[Tensor], Tensor] | None]
    ) -> list[Tensor]:
        heads = (linear(hidden).unflatten(2, (attn.heads, -1)) for linear in linears)
        return [norm(x) if norm else x for x, norm in zip(heads, norms, strict=True)]

    own = (attn.to_q, attn.to_k, attn.to_v), (attn.norm_q, attn.norm_k, None)
    added = own
    if attn.add_q_proj is not None:
        added = (attn.add_q_proj, attn.add_k_proj, attn.add_v_proj), (attn.norm_added_q, attn.norm_added_k, None)
    return project(text_1NE, *added), project(video_1SE, *own)


def dual_outputs(attn: Any, out_1LE: Tensor, num_text: int) -> tuple[Tensor, Tensor]:
    """Video and text of attention's output, text first, projected where the layer does that."""
    text, video = out_1LE[:, :num_text], out_1LE[:, num_text:]
    if attn.to_out is not None:
        video = attn.to_out[0](video)
    if attn.to_add_out is not None:
        text = attn.to_add_out(text)
    return video, text
