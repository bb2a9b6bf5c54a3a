"""Self-attention of one layer when a unit's tokens are spread over the `seq` axis: what backends are.

Attention processors (such as `models/wan_attention.py`) call it. What attention reads besides the unit's own tokens is
in `around.py`. Our backend is `usp.py`, of `ulysses.py` and `ring.py`; other libraries' are in `sequence_libraries.py`.

Shapes: B batch (1 in the engine), L tokens of a unit, l of them on this rank, H heads, D of a head. Text that goes
through the layers with the unit's tokens has N tokens, which are whole on every rank; it counts to neither L nor l.
"""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from longvid.errors import InputError
from longvid.parallel.around import Around, KvPart, attend_around, store_whole
from longvid.parallel.collectives import Group
from longvid.parallel.sequence_libraries import DeepSpeedAttention, XfuserAttention
from longvid.parallel.usp import UspAttention
from longvid.settings import SequenceBackend
from longvid.sparsity.policy import Heads


class SequenceAttention(Protocol):
    """How the tokens of a unit are spread, and attention over all of them."""

    def part(self, num_tokens: int) -> slice:
        """The tokens of a unit that this rank holds."""
        ...

    def gather(self, x_BlE: Tensor, num_tokens: int) -> Tensor:
        """All tokens [1, L, E], on every rank, of each rank's [1, l, E]."""
        ...

    def attend(self, q_BlHD: Tensor, k_BlHD: Tensor, v_BlHD: Tensor, around: Around) -> tuple[Tensor, list[KvPart]]:
        """Softmax attention of this rank's tokens to all, [B, l, H, D]; and a part for each span of `around.store`.

        With text [B, N + l, H, D], what all of it gets first. Queries and keys come normed and not rotated.
        """
        ...


class WholeSequence:
    """All tokens on one rank."""

    def part(self, num_tokens: int) -> slice:
        return slice(0, num_tokens)

    def gather(self, x_BlE: Tensor, num_tokens: int) -> Tensor:
        assert x_BlE.shape[1] == num_tokens
        return x_BlE

    def attend(self, q_BlHD: Tensor, k_BlHD: Tensor, v_BlHD: Tensor, around: Around) -> tuple[Tensor, list[KvPart]]:
        heads = Heads.all(q_BlHD.shape[2])
        return attend_around(q_BlHD, k_BlHD, v_BlHD, around, heads), store_whole(k_BlHD, v_BlHD, around)


def make_sequence(backend: SequenceBackend, ulysses: Group, ring: Group, seq: Group) -> SequenceAttention:
    """Attention over the ranks of `seq`, which are ulysses x ring; all of them call it together.

    Raises InputError where the backend cannot run on them.
    """
    if seq.size == 1:
        return WholeSequence()
    if backend == "xfuser":
        return XfuserAttention(ulysses, ring, seq)
    if backend == "deepspeed":
        if ring.size > 1:
            raise InputError(f"sequence.backend: deepspeed has no ring, so mesh.ring must be 1, not {ring.size}")
        return DeepSpeedAttention(seq)
    return UspAttention(ulysses, ring)
