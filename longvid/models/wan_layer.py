"""A Wan layer between its attentions: modulated a noise level at a time, each pass over the tokens one kernel.

On a CPU with matrix units, what stands between attentions is one call (`longvid.kernels.layer`); that gives the same
bits as kernel by kernel.

Shapes: l tokens of a unit on this rank, E their width, K noise levels among them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.activations import GELU
from diffusers.models.transformers.transformer_wan import WanTransformerBlock
from torch import Tensor, nn

from longvid.kernels import rows
from longvid.kernels.layer import LayerWeights, Linear, NativeLayer
from longvid.models.layer_stage import run_module
from longvid.models.linear import MatrixLinear, OnePassGelu
from longvid.models.wan_attention import QueueSelfAttention, SceneTextAttention, SelfContext, TextContext


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

    _packed: PackedLayer | None = None

    def forward(self, hidden: Tensor, text: TextContext, levels: Levels, context: SelfContext) -> Tensor:
        """[1, l, E] to the same."""
        native = self._native(hidden, context)
        return (
            self._by_kernels(hidden, text, levels, context) if native is None else native(hidden, text, levels, context)
        )

    def _by_kernels(self, hidden: Tensor, text: TextContext, levels: Levels, context: SelfContext) -> Tensor:
        table = self.scale_shift_table.float().transpose(0, 1) + levels.modulation
        shift, gain, gate, ffn_shift, ffn_gain, ffn_gate = table.unbind()
        kinds = levels.kinds
        normed = rows.layer_norm(hidden, gain, shift, kinds, self.norm1.eps)
        hidden = rows.add_gated(hidden, self.attn1(normed, None, None, context), gate, kinds)
        hidden = hidden + self.attn2(_text_norm(self.norm2, hidden), text, None, None)
        normed = rows.layer_norm(hidden, ffn_gain, ffn_shift, kinds, self.norm3.eps)
        return rows.add_gated(hidden, self.ffn(normed), ffn_gate, kinds)

    def _native(self, hidden: Tensor, context: SelfContext) -> PackedLayer | None:
        """The layer with its weights of now packed, where all of its modules run, on tokens that suit it."""
        if context.run is not run_module or context.complete is not None or torch.is_grad_enabled():
            return None
        packed = self._packed
        if packed is None or not packed.is_of_now():
            packed = self._packed = PackedLayer(self) if _is_packed(self) else None
        if packed is None or hidden.dtype != packed.dtype or not hidden.is_contiguous():
            return None
        return packed


class PackedLayer:
    """A `WanLayer` with its weights packed side by side."""

    def __init__(self, layer: WanLayer) -> None:
        own, text, (up, _, down) = layer.attn1, layer.attn2, layer.ffn.net
        self._own: QueueSelfAttention = own.processor
        self._text: SceneTextAttention = text.processor
        # Parameters may be changed, and others may take their place.
        self._places = [(module._parameters, name) for module in layer.modules() for name in module._parameters]
        self._marks = self._found()
        self._native = NativeLayer(
            LayerWeights(
                heads=own.heads,
                eps=layer.norm1.eps,
                table=layer.scale_shift_table[0],
                query_gain=own.norm_q.weight,
                key_gain=own.norm_k.weight,
                text_query_gain=text.norm_q.weight,
                text_norm=(layer.norm2.weight, layer.norm2.bias) if isinstance(layer.norm2, nn.LayerNorm) else None,
                qkv=_linear(own.to_q, own.to_k, own.to_v),
                self_out=_linear(own.to_out[0]),
                text_query=_linear(text.to_q),
                text_out=_linear(text.to_out[0]),
                up=_linear(up.proj),
                down=_linear(down),
            )
        )
        self.dtype = self._native.dtype

    def is_of_now(self) -> bool:
        """Whether the layer's weights are those that were packed."""
        return self._found() == self._marks

    def _found(self) -> list[tuple[int, int]]:
        weights = (parameters[name] for parameters, name in self._places)
        return [(weight.data_ptr(), weight._version) for weight in weights if weight is not None]

    def __call__(self, hidden: Tensor, text: TextContext, levels: Levels, context: SelfContext) -> Tensor:
        """[1, l, E] to the same."""
        native, modulation = self._native, (levels.modulation, levels.kinds)
        query, key, value = native.begin(hidden, *modulation).unbind(2)
        hidden, asking = native.middle(hidden, self._own.attend(query, key, value, context), *modulation)
        return native.end(hidden, self._text.attend(asking, text), *modulation)


def take_layer(block: WanTransformerBlock) -> None:
    """Make a diffusers layer, with the weights that it has or will have, a `WanLayer`."""
    block.__class__ = WanLayer
    activation = block.ffn.net[0]
    assert isinstance(activation, GELU) and activation.approximate == "tanh", "Wan's feed-forward"
    activation.__class__ = OnePassGelu


def _is_packed(layer: WanLayer) -> bool:
    """Whether all products are by weights that stay packed, and the layer does nothing that `PackedLayer` does not."""
    own, text = layer.attn1, layer.attn2
    if not (isinstance(own.processor, QueueSelfAttention) and isinstance(text.processor, SceneTextAttention)):
        return False
    up, _, down = layer.ffn.net
    linears = [own.to_q, own.to_k, own.to_v, own.to_out[0], text.to_q, text.to_out[0], up.proj, down]
    norms: list[Any] = [layer.norm1, layer.norm3, own.norm_q, own.norm_k, text.norm_q]
    norms += [layer.norm2] if isinstance(layer.norm2, nn.LayerNorm) else []
    are_packed = all(isinstance(linear, MatrixLinear) and linear.keeps_packed for linear in linears)
    return are_packed and all(norm.eps == layer.norm1.eps for norm in norms)


def _linear(*linears: nn.Linear) -> Linear:
    return Linear([linear.weight for linear in linears], [linear.bias for linear in linears])


def _text_norm(norm: nn.Module, hidden: Tensor) -> Tensor:
    """Before cross-attention: with weights of its own, or none."""
    if not isinstance(norm, nn.LayerNorm):
        return hidden
    gain, shift = norm.weight.float()[None], norm.bias.float()[None]
    return rows.layer_norm(hidden, gain, shift, None, norm.eps)


def join_levels(parts: Sequence[tuple[Tensor, Tensor]], kinds: Tensor | None) -> Levels:
    """Some noise levels, of each the embedding [1, E] and the modulation [1, 6, E]; ``kinds`` as `Levels` has it."""
    embedded = torch.cat([embedded for embedded, _ in parts])
    modulation = torch.cat([modulation for _, modulation in parts]).float().transpose(0, 1).contiguous()
    modulation[1::3] += 1
    return Levels(embedded, modulation, kinds)
