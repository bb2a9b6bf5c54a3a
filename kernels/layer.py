"""A layer with modulation, cross-attention and a feed-forward in few calls of C++ (`csrc/layer.cpp`).

Each runs the kernels of `rows.py` and `matmul.py` one after the other, and gives their bits. A small unit spends more
time between kernels than in them where each is called from Python. For CPUs with matrix units, without gradients.

Shapes: l tokens of a unit on this rank, E their width, K noise levels among them, H heads, D of a head. `kinds` int32
[l] tells each token's level; None: all have the one. Hidden states are [1, l, E], contiguous.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from longvid.kernels import matmul, native
from longvid.kernels.arguments import DTYPES


class _Linear(ctypes.Structure):
    _fields_ = [("packed", ctypes.c_void_p), ("bias", ctypes.c_void_p), ("columns", ctypes.c_int64)]


_LINEARS = ("qkv", "self_out", "text_query", "text_out", "up", "down")
_TABLES = ("table", "query_gain", "key_gain", "text_query_gain", "text_gain", "text_shift")


class _Layer(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in _TABLES),
        *((name, _Linear) for name in _LINEARS),
        *((name, ctypes.c_int64) for name in ("width", "inner")),
        *((name, ctypes.c_int32) for name in ("dtype", "isa")),
        ("eps", ctypes.c_float),
    ]


class _Pass(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("modulation", "kinds", "hidden", "attended", "out", "query", "scratch")),
        *((name, ctypes.c_int64) for name in ("tokens", "num_kinds")),
        ("threads", ctypes.c_int32),
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
        self._heads, self._inner, self._width = weights.heads, len(weights.query_gain), weights.table.shape[-1]
        self.dtype = self._biases[0].dtype
        self._most = self._width + max(weights.up.columns, self._width)
        packed = zip(self._packed, self._biases, strict=True)
        self._args = _Layer(
            *(None if table is None else table.data_ptr() for table in self._tables),
            *(_Linear(weight.data_ptr(), bias.data_ptr(), len(bias)) for weight, bias in packed),
            self._width,
            self._inner,
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
        num_tokens, num_kinds = hidden.shape[1], modulation.shape[1]
        scratch = torch.empty(self._scratch_bytes(num_tokens, num_kinds), dtype=torch.uint8)
        args = _Pass(
            modulation.data_ptr(),
            None if kinds is None else kinds.data_ptr(),
            hidden.data_ptr(),
            None if attended is None else attended.data_ptr(),
            out.data_ptr(),
            None if query is None else query.data_ptr(),
            scratch.data_ptr(),
            num_tokens,
            num_kinds,
            torch.get_num_threads(),
        )
        status = getattr(native.library(), name)(ctypes.byref(self._args), ctypes.byref(args))
        if status == 2:
            raise MemoryError("no memory for the linear layers of a transformer's layer")
        assert status == 0, "the processor's matrix units passed the checks"

    def _scratch_bytes(self, num_tokens: int, num_kinds: int) -> int:
        """Of two steps between kernels, and three modulations; each begins at 64 bytes."""
        return num_tokens * self._most * self.dtype.itemsize + 3 * num_kinds * self._width * 4 + 5 * 64
