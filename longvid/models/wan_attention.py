"""Attention processors for Wan layers in a queue: neighbour K/V, and text that is computed once.

Shapes: B = 1, l input tokens on this rank, N text columns, H heads, D of a head.
A Wan layer hands its ``rotary_emb`` and ``encoder_hidden_states`` on to its processors unread: the
contexts below travel in their place, and no layer is changed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from longvid.cache.plan import Module
from longvid.kernels.dense import attend
from longvid.parallel.sequence import (
    Around,
    Attention,
    DenseAttention,
    KvPart,
    Rope,
    SequenceAttention,
    without_scene,
)

LayerKv = tuple[Tensor, Tensor]
"""Keys and values of some tokens in one layer, each [1, tokens, H, D]."""

RunModule = Callable[[int, Module, Callable[[], Tensor]], Tensor]
"""Gives what a module of a layer (an index in the stage) computes, or in its place what a cache forecasts."""


def run_module(_index: int, _module: Module, compute: Callable[[], Tensor]) -> Tensor:
    """Without a cache."""
    return compute()


@dataclass(frozen=True)
class SelfContext:
    """What self-attention needs besides its input: one a forward pass and guidance branch.

    ``rope`` covers the left neighbour's tokens, all of the unit's, and the right neighbour's. ``left`` and ``right``
    hold K/V a layer. K/V of the spans in ``store`` (of the unit's tokens) are appended to ``stored``, a layer each.
    ``attention`` and ``head_costs`` give those of a layer of the stage. A layer of which no K/V are computed stores
    those that an earlier step stored: for each span a layer's, ``kept``.

    Layers of the stage in ``sharing`` also read ``shared``, how the scene before ended, in the place before token
    ``shared_stop`` of ``rope``; with ``stores_scene`` the last of ``store`` is such an end, kept by them alone.
    """

    rope: Rope
    left: list[KvPart] | None = None
    right: list[KvPart] | None = None
    num_left: int = 0
    store: tuple[slice, ...] = ()
    stored: list[list[KvPart]] = field(default_factory=list)
    attention: Callable[[int], Attention] = field(default=lambda _layer: DenseAttention())
    head_costs: Callable[[int], Sequence[float] | None] = field(default=lambda _layer: None)
    kept: tuple[list[KvPart], ...] = ()
    run: RunModule = run_module
    shared: list[KvPart] | None = None
    shared_stop: int = 0
    stores_scene: bool = False
    sharing: range = range(0)

    def keep_earlier(self, index: int) -> None:
        """For a layer of which no K/V are computed."""
        self.stored.append([span[index] for span in self.kept])


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
        query = attn.norm_q(attn.to_q(hidden)).view(shape)
        key = attn.norm_k(attn.to_k(hidden)).view(shape)
        value = attn.to_v(hidden).view(shape)
        is_sharing = self.index in context.sharing
        around = Around(
            rope=context.rope,
            left=context.left[self.index] if context.left else None,
            right=context.right[self.index] if context.right else None,
            num_left=context.num_left,
            store=context.store if is_sharing else without_scene(context.store, context.stores_scene),
            attention=context.attention(self.index),
            head_costs=context.head_costs(self.index),
            shared=context.shared[self.index] if context.shared and is_sharing else None,
            shared_stop=context.shared_stop,
        )
        out, stored = self.sequence.attend(query, key, value, around)
        context.stored.append(stored)
        return _project_out(attn, out)


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
        return context.run(self.index, "text", lambda: self._compute(attn, hidden, context.spans))

    def _compute(self, attn: Any, hidden: Tensor, spans: list[TextSpan]) -> Tensor:
        query = attn.norm_q(attn.to_q(hidden)).view(1, hidden.shape[1], attn.heads, -1)
        parts = [self.attend_span(query[:, span.tokens], span) for span in spans]
        return _project_out(attn, torch.cat(parts, dim=1) if len(parts) > 1 else parts[0])

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


class CachedFeedForward(nn.Module):
    """A layer's feed-forward, with a cache in front. ``run`` is the pass's at hand."""

    def __init__(self, index: int, inner: nn.Module) -> None:
        super().__init__()
        self.index, self.inner = index, inner
        self.run: RunModule = run_module

    def forward(self, hidden: Tensor) -> Tensor:
        return self.run(self.index, "ffn", lambda: self.inner(hidden))


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


def _project_out(attn: Any, out_BLHD: Tensor) -> Tensor:
    projected: Tensor = attn.to_out[0](out_BLHD.flatten(2))
    return projected
