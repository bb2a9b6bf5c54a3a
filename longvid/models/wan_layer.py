"""A Wan layer between its attentions: modulated a noise level at a time, each pass over the tokens one kernel.

Shapes: l tokens of a unit on this rank, E their width, K noise levels among them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from diffusers.models.activations import GELU
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from longvid.kernels import rows
from longvid.models.linear import OnePassGelu
from longvid.models.wan_attention import SelfContext, TextContext


@dataclass(frozen=True)
class Levels:
    """Noise levels of a unit: what each embeds to, and each token's.

    ``embedded`` [K, E]; ``modulation`` fp32 [6, K, E] is what layers add to their tables: shift, 1 + scale and gate of
    self-attention, then of the feed-forward; ``kinds`` int32 [l] tells each token's level; None: all have the one.
    """

    embedded: Tensor
    modulation: Tensor
    kinds: Tensor | None

    def of(self, tokens: Tensor | slice) -> Levels:
        """For some of the tokens."""
        return Levels(self.embedded, self.modulation, None if self.kinds is None else self.kinds[tokens].contiguous())


class WanLayer(WanTransformerBlock):  # type: ignore[misc]
    """diffusers' layer with its arithmetic, for one clip whose tokens have noise levels in common.

    diffusers' own takes a modulation for each token, [l, 6, E], and goes over the tokens once an operation.
    """

    def forward(self, hidden: Tensor, text: TextContext, levels: Levels, context: SelfContext) -> Tensor:
        """[1, l, E] to the same."""
        table = self.scale_shift_table.float().transpose(0, 1) + levels.modulation
        shift, gain, gate, ffn_shift, ffn_gain, ffn_gate = table.unbind()
        kinds = levels.kinds
        normed = rows.layer_norm(hidden, gain, shift, kinds, self.norm1.eps)
        hidden = rows.add_gated(hidden, self.attn1(normed, None, None, context), gate, kinds)
        hidden = hidden + self.attn2(_text_norm(self.norm2, hidden), text, None, None)
        normed = rows.layer_norm(hidden, ffn_gain, ffn_shift, kinds, self.norm3.eps)
        return rows.add_gated(hidden, self.ffn(normed), ffn_gate, kinds)


def take_layer(block: WanTransformerBlock) -> None:
    """Make a diffusers layer, with the weights that it has or will have, a `WanLayer`."""
    block.__class__ = WanLayer
    activation = block.ffn.net[0]
    assert isinstance(activation, GELU) and activation.approximate == "tanh", "Wan's feed-forward"
    activation.__class__ = OnePassGelu


def _text_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """Before cross-attention: with weights of its own, or none."""
    if not isinstance(norm, nn.LayerNorm):
        return hidden
    gain, shift = norm.weight.float()[None], norm.bias.float()[None]
    return rows.layer_norm(hidden, gain, shift, None, norm.eps)


def join_levels(parts: list[tuple[Tensor, Tensor]], per_latent: int, part: slice) -> Levels:
    """The levels of a unit's latents, one after the other, of which this rank has the tokens of ``part``.

    Each latent has ``per_latent`` tokens, and of its level the embedding [1, E] and the modulation [1, 6, E].
    """
    embedded = torch.cat([embedded for embedded, _ in parts])
    modulation = torch.cat([modulation for _, modulation in parts]).float().transpose(0, 1).contiguous()
    modulation[[1, 4]] += 1
    if len(parts) == 1:
        return Levels(embedded, modulation, None)
    kinds = torch.arange(len(parts), dtype=torch.int32, device=embedded.device).repeat_interleave(per_latent)
    return Levels(embedded, modulation, kinds[part])
