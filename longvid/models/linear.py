"""Linear layers of a stage by the matrix units of x86 (AMX), where the processor has them (`longvid.kernels.matmul`).

Their weights stay where they are and are packed in each call, which costs little where a unit has many tokens. A small
stage has them packed once, beside the weights.
"""

from __future__ import annotations

from collections.abc import Iterable

from diffusers.models.activations import GELU
from torch import Tensor, nn

from longvid.kernels import matmul, rows
from longvid.models.sizes import MOST_PACKED_BYTES


class MatrixLinear(nn.Linear):
    """torch's, with its weights: where a gradient is wanted, and for weights of 8 bits, it is torch that computes."""

    keeps_packed = False
    _packed: tuple[tuple[int, int], Tensor] | None = None

    def forward(self, x: Tensor, *, gelu: bool = False) -> Tensor:
        """[..., K] to [..., N], through GELU (tanh) if asked for."""
        packed = self._packed_now() if self.keeps_packed else None
        return matmul.linear(x, self.weight, self.bias, packed, gelu=gelu)

    def _packed_now(self) -> Tensor | None:
        """The weight packed: anew, where it is another or was changed in place."""
        weight = self.weight
        if not matmul.takes(weight):
            return None
        mark = weight.data_ptr(), weight._version
        if self._packed is None or self._packed[0] != mark:
            self._packed = mark, matmul.pack(weight)
        return self._packed[1]


class OnePassGelu(GELU):  # type: ignore[misc]
    """diffusers' linear layer and GELU by tanh."""

    def forward(self, hidden: Tensor) -> Tensor:
        if isinstance(self.proj, MatrixLinear):
            out: Tensor = self.proj(hidden, gelu=True)
            return out
        return rows.gelu(self.proj(hidden))


def take_linears(layers: Iterable[nn.Module]) -> None:
    """Make the projections and feed-forwards of diffusers' layers, with the weights that they have or will have, ours.

    What modulates a layer has one row and stays torch's.
    """
    if not matmul.has_matrix_units():
        return
    taken = []
    for layer in layers:
        for name, module in layer.named_modules():
            if type(module) is nn.Linear and "norm" not in name:
                module.__class__ = MatrixLinear
                taken.append(module)
            if type(module) is GELU and module.approximate == "tanh":
                module.__class__ = OnePassGelu
    are_here = all(_is_here(linear) for linear in taken)
    if are_here and sum(_packed_bytes(linear) for linear in taken) <= MOST_PACKED_BYTES:
        for linear in taken:
            linear.keeps_packed = True  # type: ignore[assignment]


def _is_here(linear: nn.Linear) -> bool:
    """Whether it has its weight, which does not come and go, as the matrix units take it."""
    return matmul.takes(linear.weight) and linear.weight.shape == (linear.out_features, linear.in_features)


def _packed_bytes(linear: nn.Linear) -> int:
    return matmul.packed_bytes(linear.out_features, linear.in_features, linear.weight.dtype)
