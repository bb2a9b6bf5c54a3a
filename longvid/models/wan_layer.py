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
from longvid.kernels.layer import DensePass, LayerWeights, Linear, NativeLayer
from longvid.models.layer_stage import CachedFeedForward, dense_everywhere
from longvid.models.linear import MatrixLinear, OnePassGelu
from longvid.models.wan_attention import QueueSelfAttention, SceneTextAttention, SelfContext, TextContext
from longvid.parallel.around import KvPart
from longvid.parallel.sequence import WholeSequence


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

    packed: PackedLayer | None = None

    def forward(self, hidden: Tensor, text: TextContext, levels: Levels, context: SelfContext) -> Tensor:
        """[1, l, E] to the same."""
        if self.packed is None or torch.is_grad_enabled():
            return self._by_kernels(hidden, text, levels, context)
        return self.packed(hidden, text, levels, context)

    def pack(self) -> None:
        """Take the weights as they are now, where they may be kept packed and all of the layer's modules run."""
        if self.packed is None or not self.packed.is_of_now():
            self.packed = PackedLayer(self) if _is_packed(self) else None

    def _by_kernels(self, hidden: Tensor, text: TextContext, levels: Levels, context: SelfContext) -> Tensor:
        table = self.scale_shift_table.float().transpose(0, 1) + levels.modulation
        shift, gain, gate, ffn_shift, ffn_gain, ffn_gate = table.unbind()
        kinds = levels.kinds
        normed = rows.layer_norm(hidden, gain, shift, kinds, self.norm1.eps)
        hidden = rows.add_gated(hidden, self.attn1(normed, None, None, context), gate, kinds)
        hidden = hidden + self.attn2(_text_norm(self.norm2, hidden), text, None, None)
        normed = rows.layer_norm(hidden, ffn_gain, ffn_shift, kinds, self.norm3.eps)
        return rows.add_gated(hidden, self.ffn(normed), ffn_gate, kinds)


class PackedLayer:
    """A `WanLayer` with its weights packed side by side."""

    def __init__(self, layer: WanLayer) -> None:
        own, text, (up, _, down) = layer.attn1, layer.attn2, layer.ffn.net
        self._own: QueueSelfAttention = own.processor
        self._text: SceneTextAttention = text.processor
        # Parameters may be changed, and others may take their place.
        self._places = [(module._parameters, name) for module in layer.modules() for name in module._parameters]
        self._marks = self._found()
        self.native = NativeLayer(
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

    def is_of_now(self) -> bool:
        """Whether the layer's weights are those that were packed."""
        return self._found() == self._marks

    def _found(self) -> list[tuple[int, int]]:
        weights = (parameters[name] for parameters, name in self._places)
        return [(weight.data_ptr(), weight._version) for weight in weights if weight is not None]

    def __call__(self, hidden: Tensor, text: TextContext, levels: Levels, context: SelfContext) -> Tensor:
        """[1, l, E] to the same."""
        native, modulation = self.native, (levels.modulation, levels.kinds)
        hidden = hidden.contiguous()
        query, key, value = native.begin(hidden, *modulation).unbind(2)
        if context.complete:
            key, value = context.complete(self._own.index, key.contiguous(), value.contiguous())
        hidden, asking = native.middle(hidden, self._own.attend(query, key, value, context), *modulation)
        return native.end(hidden, self._text.attend(asking, text), *modulation)

    def reads_no_more(self, text: TextContext, context: SelfContext) -> bool:
        """Whether both attentions are dense, of one prompt, and read beside it the neighbours alone."""
        (span, *others), own = text.spans, self._own
        if others or span.second is not None or type(self._text) is not SceneTextAttention:
            return False
        is_dense = context.attention is dense_everywhere and isinstance(own.sequence, WholeSequence)
        adds = context.read_tokens or context.complete or context.shared or context.stores_scene
        return is_dense and not adds


class WholePass:
    """A unit's pass through packed layers that read its own tokens, its neighbours' and one prompt: a call each."""

    def __init__(
        self, layers: Sequence[PackedLayer], hidden: Tensor, text: TextContext, levels: Levels, context: SelfContext
    ) -> None:
        prompt = text.spans[0].first
        rest = context.rope, hidden.shape[1], context.store, prompt.layers[0], prompt.bias.float()
        self._pass = DensePass(len(layers), levels.modulation, levels.kinds, *rest)
        self._layers, self._text, self._context = layers, prompt.layers, context

    @classmethod
    def of(
        cls, layers: Sequence[nn.Module], hidden: Tensor, text: TextContext, levels: Levels, context: SelfContext
    ) -> WholePass | None:
        """None where the layers or what they read are not such."""
        packed = [layer.packed for layer in layers if isinstance(layer, WanLayer) and layer.packed]
        if not packed or len(packed) < len(layers) or not packed[0].reads_no_more(text, context):
            return None
        sides = [(part.key, part.value) for side in (context.left, context.right) for part in side or ()]
        prompt = text.spans[0].first.layers[0]
        if not DensePass.serves(context.rope, sides, hidden.shape[1], context.store, prompt):
            return None
        return cls(packed, hidden, text, levels, context)

    def run(self, index: int, hidden: Tensor) -> Tensor:
        """Hidden states [1, l, E] behind the stage's layer of an index."""
        context = self._context
        left, right = (_kv(side[index]) if side else None for side in (context.left, context.right))
        out, stored = self._pass.run(
            index, self._layers[index].native, hidden.contiguous(), left, right, self._text[index]
        )
        context.stored.append([KvPart(key, value) for key, value in stored])
        return out


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
    if isinstance(layer.ffn, CachedFeedForward):
        return False
    up, _, down = layer.ffn.net
    linears = [own.to_q, own.to_k, own.to_v, own.to_out[0], text.to_q, text.to_out[0], up.proj, down]
    norms: list[Any] = [layer.norm1, layer.norm3, own.norm_q, own.norm_k, text.norm_q]
    norms += [layer.norm2] if isinstance(layer.norm2, nn.LayerNorm) else []
    are_packed = all(isinstance(linear, MatrixLinear) and linear.keeps_packed for linear in linears)
    return are_packed and all(norm.eps == layer.norm1.eps for norm in norms)


def _linear(*linears: nn.Linear) -> Linear:
    return Linear([linear.weight for linear in linears], [linear.bias for linear in linears])


def _kv(part: KvPart) -> tuple[Tensor, Tensor]:
    return part.key, part.value


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
