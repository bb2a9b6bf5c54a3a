"""A layer with modulation, cross-attention and a feed-forward in few calls of C++ (`csrc/layer.cpp`).

One where attention is dense and all tokens are here; else three, between the attentions. Each runs the kernels of
`rows.py`, `matmul.py` and `cpu.py` one after the other, and gives their bits. A small unit spends as much time between
kernels as in them where each is called from Python. For CPUs with matrix units, without gradients.

Shapes: l tokens of a unit on this rank, E their width, K noise levels among them, H heads, D of a head, N text tokens.
`kinds` int32 [l] tells each token's level; None: all have the one. Hidden states are [1, l, E], contiguous.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longvid.kernels import cpu, dense, matmul, native
from longvid.kernels.arguments import DTYPES

Kv = tuple[Tensor, Tensor]
"""Keys and values of some tokens, each [1, tokens, H, D]."""

MOST_STORED = 3


class _Linear(ctypes.Structure):
    _fields_ = [("packed", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("columns", ctypes.c_int64)]


_LINEARS = ("qkv", "self_out", "text_query", "text_out", "up", "down")
_TABLES = ("table", "query_gain", "key_gain", "text_query_gain", "text_gain", "text_shift")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _TABLES),
        *((name, _Linear) for name in _LINEARS),
        *((name, ctypes.c_int64) for name in ("width", "inner")),
        *((name, ctypes.c_int32) for name in ("heads", "dtype", "isa")),
        ("eps", ctypes.c_float),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("modulation", "kinds", "hidden", "attended", "out", "query")),
        *((name, ctypes.c_int64) for name in ("tokens", "num_kinds")),
        ("threads", ctypes.c_int32),
    ]


class _Kv(ctypes.Structure):
    _fields_ = [("key", ctypes.c_void_p), ("value", ctypes.c_void_p), ("tokens", ctypes.c_int64)]


class _Store(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("key", "value")),
        *((name, ctypes.c_int64) for name in ("first", "count")),
    ]


class _Around(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("cosines", "sines")),
        *((name, _Kv) for name in ("left", "right", "text")),
        ("text_bias", ctypes.c_void_p),
        ("store", _Store * MOST_STORED),
        *((name, ctypes.c_int64) for name in ("num_stored", "packed_together")),
    ]


@dataclass(frozen=True)
class Linear:
    """A linear layer's weight [N, K], or several side by side with as many biases, of a dtype that is packed."""

    weights: Sequence[Tensor]
    biases: Sequence[Tensor]

    @property
    def columns(self) -> int:
        return sum(len(weight) for weight in self.weights)


@dataclass(frozen=True, kw_only=True)
class LayerWeights:
    """``table`` [6, E] holds shift, scale and gate of self-attention, then of the feed-forward.

    ``query_gain``, ``key_gain`` and ``text_query_gain`` [H·D] are those of RMS norms; ``text_norm`` gain and shift [E]
    before cross-attention, where it has a norm. All norms have one ``eps``.
    """

    heads: int
    eps: float
    table: Tensor
    query_gain: Tensor
    key_gain: Tensor
    text_query_gain: Tensor
    text_norm: tuple[Tensor, Tensor] | None
    qkv: Linear
    self_out: Linear
    text_query: Linear
    text_out: Linear
    up: Linear
    down: Linear


class NativeLayer:
    """A layer's weights as the C++ takes them: a copy, packed."""

    def __init__(self, weights: LayerWeights) -> None:
        norm = weights.text_norm or (None, None)
        gains = weights.query_gain, weights.key_gain, weights.text_query_gain
        self._tables = [None if x is None else x.detach().float().contiguous() for x in (weights.table, *gains, *norm)]
        linears = [getattr(weights, name) for name in _LINEARS]
        self._packed = [matmul.pack(torch.cat([*linear.weights])) for linear in linears]
        self._biases = [torch.cat([*linear.biases]).detach() for linear in linears]
        self._heads, self._inner = weights.heads, len(weights.query_gain)
        self.dtype = self._biases[0].dtype
        packed = zip(self._packed, self._biases, strict=True)
        self.args = _Layer(
            *(None if table is None else table.data_ptr() for table in self._tables),
            *(_Linear(weight.data_ptr(), bias.data_ptr(), len(bias)) for weight, bias in packed),
            weights.table.shape[-1],
            self._inner,
            self._heads,
            DTYPES[self.dtype],
            native.isa_index(None),
            weights.eps,
        )

    def begin(self, hidden: Tensor, modulation_6KE: Tensor, kinds: Tensor | None) -> Tensor:
        """Queries, keys and values of self-attention [1, l, 3, H, D], the first two normed."""
        out = torch.empty((1, hidden.shape[1], 3, self._heads, self._inner // self._heads), dtype=self.dtype)
        self._call("longvid_layer_begin", modulation_6KE, kinds, hidden, None, out)
        return out

    def middle(
        self, hidden: Tensor, attended: Tensor, modulation_6KE: Tensor, kinds: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Hidden states with what self-attention gave, [1, l, H, D], and queries of the text [1, l, H, D], normed."""
        attended = attended.contiguous()
        out, query = torch.empty_like(hidden), torch.empty_like(attended)
        self._call("longvid_layer_middle", modulation_6KE, kinds, hidden, attended, out, query)
        return out, query

    def end(self, hidden: Tensor, attended: Tensor, modulation_6KE: Tensor, kinds: Tensor | None) -> Tensor:
        """Hidden states with what attention to the text gave, [1, l, H, D], behind the feed-forward: in place."""
        self._call("longvid_layer_end", modulation_6KE, kinds, hidden, attended.contiguous(), hidden)
        return hidden

    def _call(
        self,
        name: str,
        modulation: Tensor,
        kinds: Tensor | None,
        hidden: Tensor,
        attended: Tensor | None,
        out: Tensor,
        query: Tensor | None = None,
    ) -> None:
        args = _pass(modulation, kinds, hidden.shape[1])
        args.hidden, args.out = hidden.data_ptr(), out.data_ptr()
        args.attended, args.query = (None if x is None else x.data_ptr() for x in (attended, query))
        _check(getattr(native.library(), name)(ctypes.byref(self.args), ctypes.byref(args)))


class DensePass:
    """The way of a unit's tokens through layers with dense attention, each one call.

    ``rope`` has fp32 rows [1, tokens, 1, D] of the left neighbour's tokens, those of the unit and the right
    neighbour's. ``text_bias`` fp32 [N]. K/V of the spans in ``store`` (of the unit's tokens) are kept in each layer.
    """

    def __init__(
        self,
        num_layers: int,
        modulation_6KE: Tensor,
        kinds: Tensor | None,
        rope: Kv,
        num_tokens: int,
        store: Sequence[slice],
        text: Kv,
        text_bias: Tensor,
    ) -> None:
        self._alive = modulation_6KE, kinds, rope, text_bias
        self._pass = _pass(modulation_6KE, kinds, num_tokens)
        around = self._around = _Around(packed_together=cpu.PACKED_TOGETHER, num_stored=len(store))
        around.cosines, around.sines = (table.data_ptr() for table in rope)
        around.text.tokens, around.text_bias = text[0].shape[1], text_bias.data_ptr()
        self._stored = []
        for span, place in zip(store, around.store, strict=False):
            place.first, place.count = span.start, span.stop - span.start
            kept = text[0].new_empty((num_layers * 2, 1, place.count, *text[0].shape[2:]))
            self._stored.append((place, kept.unbind()))

    @staticmethod
    def serves(rope: Kv, sides: Sequence[Kv], num_tokens: int, store: Sequence[slice], text: Kv) -> bool:
        """Whether it takes all this: ``sides`` are the neighbours' K/V in every layer, the others as it has them."""
        dim, num_keys = text[0].shape[-1], rope[0].shape[1]
        tensors = [x for kv in (rope, text, *sides) for x in kv]
        return (
            all(x.is_contiguous() for x in tensors)
            and all(x.shape[1:] == (num_keys, 1, dim) and x.dtype == torch.float32 for x in rope)
            and all(dense.is_for_matrix_units(text[0].dtype, count, dim) for count in (num_keys, text[0].shape[1]))
            and len(store) <= MOST_STORED
            and dim % 2 == 0
        )

    def run(
        self, index: int, layer: NativeLayer, hidden: Tensor, left: Kv | None, right: Kv | None, text: Kv
    ) -> tuple[Tensor, list[Kv]]:
        """Hidden states behind the layer of an index, and the K/V that it keeps of each span."""
        out, around, stored = torch.empty_like(hidden), self._around, []
        self._pass.hidden, self._pass.out = hidden.data_ptr(), out.data_ptr()
        around.text.key, around.text.value = text[0].data_ptr(), text[1].data_ptr()
        for side, kv in ((around.left, left), (around.right, right)):
            if kv is not None:
                side.key, side.value, side.tokens = kv[0].data_ptr(), kv[1].data_ptr(), kv[0].shape[1]
        for place, kept in self._stored:
            key, value = kept[2 * index], kept[2 * index + 1]
            place.key, place.value = key.data_ptr(), value.data_ptr()
            stored.append((key, value))
        _check(native.library().longvid_layer(*map(ctypes.byref, (layer.args, self._pass, around))))
        return out, stored


def _pass(modulation_6KE: Tensor, kinds: Tensor | None, num_tokens: int) -> _Pass:
    return _Pass(
        modulation=modulation_6KE.data_ptr(),
        kinds=None if kinds is None else kinds.data_ptr(),
        tokens=num_tokens,
        num_kinds=modulation_6KE.shape[1],
        threads=torch.get_num_threads(),
    )


def _check(status: int) -> None:
    if status == 2:
        raise MemoryError("no memory for a transformer's layer")
    assert status == 0, "the processor's matrix units passed the checks"
