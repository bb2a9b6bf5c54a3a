"""Attention processors for Wan layers in a queue: neighbour K/V, and text that is computed once.

Shapes: B = 1, l input tokens on this rank, N text columns, H heads, D of a head.
A Wan layer's attention hands its ``rotary_emb`` and ``encoder_hidden_states`` on to its processor unread: the
contexts below travel in their place.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from longvid.kernels import rows
from longvid.kernels.dense import attend
from longvid.models.layer_stage import LayerContext, RunModule, run_module
from longvid.parallel.around import Rope
from longvid.parallel.sequence import SequenceAttention

LayerKv = tuple[Tensor, Tensor]
"""Keys and values of some tokens in one layer, each [1, tokens, H, D]."""


ReadTokens = Callable[[int, Tensor], Tensor]
"""What a layer (an index in the stage) gets of global tokens, [1, l, H, D], by its queries, normed and not rotated."""

CompleteKv = Callable[[int, Tensor, Tensor], LayerKv]
"""K/V of all of a unit's tokens in a layer (an index in the stage), by those of the tokens in the pass."""


@dataclass(frozen=True, kw_only=True)
class SelfContext(LayerContext):
    """What self-attention needs besides its input.

    ``rope`` covers the left neighbour's tokens, all of the unit's, and the right neighbour's. Where only ``queries`` of
    the unit's tokens are in the pass, ``complete`` gives a layer's K/V of all. What ``read_tokens`` gives is added to a
    layer's own attention.
    """

    rope: Rope
    run: RunModule = run_module
    queries: Tensor | None = None
    complete: CompleteKv | None = None
    read_tokens: ReadTokens | None = None


class QueueSelfAttention:
    """Self-attention of one layer over the unit's tokens and the neighbours' K/V. ``index`` counts in the stage."""

    def __init__(self, index: int, sequence: SequenceAttention) -> None:
        self.index = index
        self.sequence = sequence

    def __call__(self, attn: Any, hidden: Tensor, _text: None, _mask: None, context: SelfContext) -> Tensor:
        num_stored = len(context.stored)
        out = context.run(self.index, "self", lambda: self._compute(attn, hidden, context))
        if len(context.stored) == num_stored:
            context.keep_earlier(self.index)
        return out

    def _compute(self, attn: Any, hidden: Tensor, context: SelfContext) -> Tensor:
        shape = (1, hidden.shape[1], attn.heads, -1)
        query = _normed(attn.norm_q, attn.to_q(hidden)).view(shape)
        key = _normed(attn.norm_k, attn.to_k(hidden)).view(shape)
        value = attn.to_v(hidden).view(shape)
        if context.complete:
            key, value = context.complete(self.index, key, value)
        return _project_out(attn, self.attend(query, key, value, context))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, context: SelfContext) -> Tensor:
        """What the tokens get, [1, l, H, D]; keeps the K/V that are to be stored. Queries and keys come normed."""
        attention = context.attention(self.index)
        around = context.around(self.index, rope=context.rope, queries=context.queries, attention=attention)
        out, stored = self.sequence.attend(query, key, value, around)
        context.stored.append(stored)
        if context.read_tokens:
            out = out + context.read_tokens(self.index, query)
        return out


@dataclass(frozen=True)
class TextKv:
    """One prompt's K/V in every layer of the stage. ``bias`` [1, 1, 1, N]: 0, and log n for the padding column."""

    layers: list[LayerKv]
    bias: Tensor


@dataclass(frozen=True)
class TextSpan:
    """Input tokens that attend one prompt, or two: (1 - weight) · a + weight · b."""

    tokens: slice
    first: TextKv
    second: TextKv | None = None
    weight: float = 0.0


@dataclass(frozen=True)
class TextContext:
    """What cross-attention reads: the spans of one forward pass and guidance branch."""

    spans: list[TextSpan]
    run: RunModule = run_module


class SceneTextAttention:
    """Cross-attention of a layer (``index`` in the stage) in which each latent attends its own scene's prompt."""

    def __init__(self, index: int) -> None:
        self.index = index

    def __call__(self, attn: Any, hidden: Tensor, context: TextContext, *_: None) -> Tensor:
        return context.run(self.index, "text", lambda: self._compute(attn, hidden, context))

    def _compute(self, attn: Any, hidden: Tensor, context: TextContext) -> Tensor:
        query = _normed(attn.norm_q, attn.to_q(hidden)).view(1, hidden.shape[1], attn.heads, -1)
        return _project_out(attn, self.attend(query, context))

    def attend(self, query: Tensor, context: TextContext) -> Tensor:
        """What the tokens get, [1, l, H, D], by queries that come normed."""
        spans = context.spans
        if len(spans) == 1:
            return self.attend_span(query, spans[0])
        return torch.cat([self.attend_span(query[:, span.tokens], span) for span in spans], dim=1)

    def attend_span(self, query: Tensor, span: TextSpan) -> Tensor:
        """What the tokens of a span get, [1, tokens, H, D]."""
        out = self._attend(query, span.first)
        if span.second is not None:
            # Outputs are blended, not embeddings: two prompts' tokens do not line up.
            out = torch.lerp(out, self._attend(query, span.second), span.weight)
        return out

    def _attend(self, query: Tensor, text: TextKv) -> Tensor:
        key, value = text.layers[self.index]
        return attend(query, key, value, text.bias)


def text_kv(blocks: Any, states: Tensor, columns: int) -> TextKv:
    """K/V of one prompt in every layer, from its projected text states.

    ``states`` [n + 1, width] holds n tokens and one padding column, which stands for the
    ``columns - n`` identical ones that the stock pipeline feeds: one column with bias log(columns - n)
    in the softmax is exactly as many equal columns.
    """
    padding = columns - (states.shape[0] - 1)
    if padding == 0:
        states = states[:-1]
    layers = []
    for block in blocks:
        attn = block.attn2
        shape = (1, states.shape[0], attn.heads, -1)
        layers.append((attn.norm_k(attn.to_k(states)).view(shape), attn.to_v(states).view(shape)))
    bias = torch.zeros(states.shape[0], dtype=states.dtype, device=states.device)
    if padding:
        bias[-1] = torch.tensor(float(padding)).log()
    return TextKv(layers, bias.view(1, 1, 1, -1))


def _normed(norm: nn.RMSNorm, x: Tensor) -> Tensor:
    return rows.rms_norm(x, norm.weight, norm.eps)


def _project_out(attn: Any, out_BLHD: Tensor) -> Tensor:
    projected: Tensor = attn.to_out[0](out_BLHD.flatten(2))
    return projected
