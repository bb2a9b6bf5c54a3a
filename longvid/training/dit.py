"""Training of the embedded video DiT (a stock ``WanTransformer3DModel``) on encoded clips.

Shapes: B clips, F latents a window, S tokens a latent, N text tokens, D width, T frames.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttention
from torch import Tensor

from longvid.models.wan import TEXT_COLUMNS
from longvid.parallel.around import Rope, rotate
from longvid.training.muon import Muon, split_parameters

DIT_CONFIG = {
    "patch_size": [1, 2, 2],
    "num_attention_heads": 4,
    "attention_head_dim": 64,
    "in_channels": 8,
    "out_channels": 8,
    "text_dim": 128,
    "freq_dim": 128,
    "ffn_dim": 1024,
    "num_layers": 8,
    "cross_attn_norm": True,
    "rope_max_seq_len": 1024,
}


@dataclass(frozen=True)
class WindowText:
    """Captions of a batch of windows.

    ``states`` is [M, N + 1, E]: the encoder's output of M captions, zero in the padding, of which
    the last column stands for all; ``bias`` [M, N + 1] is its log-count, and -inf for the padding
    before it; ``index`` [B, F] says which caption each latent of each window attends.
    """

    states: Tensor
    bias: Tensor
    index: Tensor


def window_text(states: Tensor, mask: Tensor, index: Tensor) -> WindowText:
    """Merge the identical padding columns of [M, N, E] into one with a log-count bias, exactly."""
    keep = mask.bool()
    count = TEXT_COLUMNS - keep.sum(1, keepdim=True)
    bias = torch.where(keep, 0.0, -math.inf)
    states = torch.cat([states * keep[..., None], torch.zeros_like(states[:, :1])], dim=1)
    return WindowText(states, torch.cat([bias, count.log()], dim=1), index)


class SelfAttention:
    """Attention processor over a whole window; every token sees every token."""

    def __call__(self, attn: WanAttention, hidden_states: Tensor, _context: None, _mask: None, rope: Rope) -> Tensor:
        batch, length, _ = hidden_states.shape
        shape = (batch, length, attn.heads, -1)
        query = rotate(attn.norm_q(attn.to_q(hidden_states)).view(shape), rope)
        key = rotate(attn.norm_k(attn.to_k(hidden_states)).view(shape), rope)
        value = attn.to_v(hidden_states).view(shape)
        q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key, value))
        out = attend(q, k, v)
        projected: Tensor = attn.to_out[0](out.transpose(1, 2).reshape(batch, length, -1))
        return projected


class TextAttention:
    """Attention processor in which each latent attends its own caption."""

    def __call__(self, attn: WanAttention, hidden_states: Tensor, text: WindowText, *_: None) -> Tensor:
        batch, length, _width = hidden_states.shape
        num_latents = text.index.shape[1]
        query = attn.norm_q(attn.to_q(hidden_states))
        query = query.view(batch * num_latents, length // num_latents, attn.heads, -1)
        captions, columns = text.states.shape[:2]
        shape = (captions, columns, attn.heads, -1)
        key = attn.norm_k(attn.to_k(text.states)).view(shape)
        value = attn.to_v(text.states).view(shape)
        index = text.index.flatten()
        q, k, v = (x.transpose(1, 2).to(value.dtype) for x in (query, key[index], value[index]))
        out = attend(q, k, v, text.bias[index][:, None, None])
        projected: Tensor = attn.to_out[0](out.transpose(1, 2).reshape(batch, length, -1))
        return projected


def attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention over [B, H, S, D], written out: on a CPU the fused kernel's backward pass takes 5 times as long."""
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    if bias is not None:
        scores = scores + bias
    out: Tensor = scores.softmax(dim=-1).to(v.dtype) @ v
    return out


def make_dit(seed: int) -> WanTransformer3DModel:
    """A fresh model whose text attention starts out ignoring the padding, and whose output starts at 0."""
    torch.manual_seed(seed)
    dit = WanTransformer3DModel(**DIT_CONFIG)
    for block in dit.blocks:
        block.attn1.set_processor(SelfAttention())
        block.attn2.set_processor(TextAttention())
    _ignore_padding(dit)
    torch.nn.init.zeros_(dit.proj_out.weight)
    torch.nn.init.zeros_(dit.proj_out.bias)
    return dit


@torch.no_grad()
def _ignore_padding(dit: WanTransformer3DModel) -> None:
    """Some 500 zero columns would outvote a dozen words at initialisation: turn queries away from them.

    A zero column reaches the keys as the bias of ``to_k`` alone. Queries get a bias in the opposite
    direction, so that the padding's logits start about 5 below those of the words.
    """
    embedder = dit.condition_embedder.text_embedder
    for linear in (embedder.linear_1, embedder.linear_2):
        torch.nn.init.zeros_(linear.bias)
    torch.nn.init.normal_(embedder.linear_1.weight, std=0.1)
    torch.nn.init.normal_(embedder.linear_2.weight, std=0.1)
    for block in dit.blocks:
        direction = torch.randn_like(block.attn2.to_k.bias)
        block.attn2.to_k.bias.copy_(-0.3 * direction)
        block.attn2.to_q.bias.copy_(1.5 * direction)
        torch.nn.init.normal_(block.attn2.to_k.weight, std=0.06)
        torch.nn.init.normal_(block.attn2.to_q.weight, std=0.06)


def block_forward(block: Any, hidden_BFSD: Tensor, text: WindowText, modulation_BF6D: Tensor, rope: Rope) -> Tensor:
    """A stock block's forward with one modulation a latent: the stock one takes one a token, 16 times as much."""
    table = (block.scale_shift_table + modulation_BF6D.float()).unsqueeze(3)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = table.unbind(2)
    hidden = hidden_BFSD
    shape = hidden.shape
    normed = (block.norm1(hidden) * (1 + scale) + shift).flatten(1, 2)
    hidden = hidden + block.attn1(normed, None, None, rope).view(shape) * gate
    normed = block.norm2(hidden).flatten(1, 2)
    hidden = hidden + block.attn2(normed, text, None, None).view(shape)
    normed = block.norm3(hidden) * (1 + mlp_scale) + mlp_shift
    out: Tensor = hidden + block.ffn(normed) * mlp_gate
    return out


def window_velocity(
    dit: WanTransformer3DModel, x: Tensor, sigma: Tensor, text: WindowText, run_block: Any = block_forward
) -> Tensor:
    """The model's velocity, [B, C, F, h, w], of windows with a noise level for each latent.

    ``x`` is [B, C, F, h, w], ``sigma`` [B, F] in [0, 1]; ``run_block`` may be a compiled ``block_forward``.
    """
    batch, _, num_latents, height, width = x.shape
    rope = dit.rope(x)
    hidden = dit.patch_embedding(x).flatten(3).permute(0, 2, 3, 1).float().contiguous()
    temb, modulation, states, _ = dit.condition_embedder(
        sigma.flatten() * 1000, text.states, timestep_seq_len=num_latents
    )
    modulation = modulation.unflatten(2, (6, -1))
    embedded = WindowText(states, text.bias, text.index)
    for block in dit.blocks:
        hidden = run_block(block, hidden, embedded, modulation, rope)
    shift, scale = (dit.scale_shift_table.unsqueeze(0) + temb.unsqueeze(2)).unsqueeze(3).unbind(2)
    out = dit.proj_out(dit.norm_out(hidden) * (1 + scale) + shift)
    out = out.view(batch, num_latents, height // 2, width // 2, 2, 2, -1).permute(0, 6, 1, 2, 4, 3, 5)
    velocity: Tensor = out.reshape(batch, -1, num_latents, height, width)
    return velocity


def make_optimizers(dit: WanTransformer3DModel, lr: float) -> tuple[Muon, torch.optim.AdamW]:
    """Muon for the blocks' matrices, AdamW for embeddings, norms, biases and the output."""
    hidden, others = split_parameters(dit, lambda name, p: name.startswith("blocks.") and p.ndim == 2)
    muon = Muon(hidden, lr=lr, weight_decay=0.01)
    return muon, torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.98), weight_decay=0.0)
